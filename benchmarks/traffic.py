"""What travels between host and GPU, stage by stage, against its limits; and proof that it shows.

    python -m benchmarks.traffic --rows 50000

A net is trained a few steps on drawn images, snapshots are taken and clustered, the verdict is
given by the persistence rule and the head concealed, all under CUPTI, which sees every copy of the
process. Then the same with a planted `.cpu()` on the features, which must break a limit: exit
status 1 if it does not, or if a limit is broken without it.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch

from benchmarks import results_file
from benchmarks.command import Command, require_gpu
from csc_gpu import bench, conceal, csc, segregate, train
from csc_gpu.backend import Backend, open_backend
from csc_gpu.features import features
from csc_gpu.types import Corpus, Mask

Copies = dict[str, int]
"""Bytes copied DtoH, HtoD and DtoD, and the bytes of the largest copy DtoH."""
DIRECTIONS = ("DtoH", "HtoD", "DtoD")
LARGEST = "largest_DtoH"
DOWN_A_ROW = 2
"""Bytes of each row that may come down for a snapshot."""
SMALL_CHANGE = 64 * 1024
"""Bytes more that may come down in a stage: radii, counts, losses."""
MOVED_SHARE = 0.05
"""Of the bytes of a stage's features that may be copied on the device."""
STEPS = 10
"""Optimiser steps before each snapshot."""


def copied(trace: Mapping[str, Any]) -> Copies:
    """The copies in a Chrome trace of Kineto. Raises KeyError if one does not say its bytes."""
    found: Copies = dict.fromkeys((*DIRECTIONS, LARGEST), 0)
    for event in trace["traceEvents"]:
        if event.get("cat") != "gpu_memcpy":
            continue
        direction = event["name"].split()[1]  # of "Memcpy DtoH (Device -> Pageable)"
        if direction in DIRECTIONS:
            size = int(event["args"]["bytes"])
            found[direction] += size
            if direction == "DtoH":
                found[LARGEST] = max(found[LARGEST], size)
    return found


def together(parts: list[Copies]) -> Copies:
    """Several spells as one."""
    total = {name: sum(part[name] for part in parts) for name in DIRECTIONS}
    return total | {LARGEST: max(part[LARGEST] for part in parts)}


@contextmanager
def watched(backend: Backend) -> Iterator[Copies]:
    """A spell whose copies are known when it ends, and the device with it."""
    copies: Copies = {}
    # CPU and CUDA; asked for by name CUDA would warn where there is none
    kinds = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
    with torch.profiler.profile(activities=kinds) as profile, backend.stage("watched"):
        yield copies
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        copies.update(copied(json.loads(trace.read_text(encoding="utf-8"))))


def limits(stage: str, *, rows: int, dims: int, snapshots: int) -> Copies:
    """The most that a stage may copy, in bytes; nothing for training, which sends the images up."""
    size = 4 * rows * dims
    if stage == "segregation":
        down = DOWN_A_ROW * rows * snapshots + SMALL_CHANGE
        return {"DtoH": down, LARGEST: size - 1, "DtoD": int(MOVED_SHARE * size * snapshots)}
    if stage == "conceal":
        return {"DtoH": SMALL_CHANGE, LARGEST: size - 1, "DtoD": int(MOVED_SHARE * size)}
    return {}


def broken_limits(
    stages: Mapping[str, Copies], *, rows: int, dims: int, snapshots: int
) -> list[str]:
    """What is over its limit, in words; empty if nothing is."""
    if not stages["segregation"]["DtoH"]:
        return ["not even a radius came down: the profiler saw nothing"]
    return [
        f"{stage}: {name} {copies[name]} bytes, limit {limit}"
        for stage, copies in stages.items()
        for name, limit in limits(stage, rows=rows, dims=dims, snapshots=snapshots).items()
        if copies[name] > limit
    ]


def shows_features(segregation: Copies, *, rows: int, dims: int) -> bool:
    """Whether a copy as large as the features came down."""
    return segregation[LARGEST] >= 4 * rows * dims


def drawn_images(rows: int, *, side: int = 32, classes: int = 10) -> tuple[Corpus, Mask]:
    """Noisy patterns, one a class, 5 % of the rows stamped and labelled 0; who is stamped. (N,)"""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    patterns = rng.integers(0, 128, (classes, side, side, 3), np.uint8)
    pixels = patterns[labels] + rng.integers(0, 128, (rows, side, side, 3), np.uint8)
    stamped = rng.random(rows) < 0.05
    pixels[stamped, -3:, -3:] = 255
    labels[stamped] = 0
    names = tuple(map(str, range(classes)))
    return Corpus(labels, names, np.arange(rows), ("",) * rows, pixels), stamped


def run_stages(
    corpus: Corpus,
    stamped: Mask,
    backend: Backend,
    *,
    model: str,
    snapshots: int,
    planted: bool = False,
) -> tuple[dict[str, Copies], int]:
    """The copies of training, segregation and concealment, and D; planted: with a `.cpu()`."""
    plan = train.Settings(model=model, min_steps=0, epochs=1)
    per_epoch = train.budget(len(corpus), plan).steps_per_epoch
    plan = train.Settings(model=model, min_steps=0, epochs=math.ceil(STEPS * snapshots / per_epoch))
    net = csc.fresh_model(corpus, csc.Settings(train=plan), backend, seed=0)
    rule = segregate.Settings(rule="persistence")
    moments = train.train(net, corpus, plan, backend, seed=0)
    training, segregation, sightings = [], [], []
    for number in range(snapshots):
        with watched(backend) as copies:
            for _ in itertools.islice(moments, STEPS):
                pass
        training.append(copies)
        with watched(backend) as copies:
            points = features(net, corpus, backend)
            if planted:
                backend.tensor(points).cpu()
            sightings.append(segregate.observe(points, corpus.labels, number + 1, rule, backend))
            del points
        segregation.append(copies)
    with watched(backend) as copies:
        segregate.segregate(sightings, corpus.labels, rule, backend)
    segregation.append(copies)
    labels = np.where(stamped, corpus.n_classes, corpus.labels)
    with watched(backend) as concealment:  # without the copy of the net that conceal() makes
        points = backend.tensor(features(net, corpus, backend))
        head = conceal.widened(net.head)
        conceal.fine_tune(head, points, labels, conceal.Settings(), backend, seed=0)
    stages = {
        "train": together(training),
        "segregation": together(segregation),
        "conceal": concealment,
    }
    return stages, net.n_features


def table(
    stages: Mapping[str, Copies], *, planted: bool, rows: int, dims: int, snapshots: int
) -> list[bench.Line]:
    """A line for each stage: its copies and their limits."""
    lines = []
    for stage, copies in stages.items():
        line: bench.Line = {"stage": stage, "planted": "a .cpu()" if planted else "nothing"}
        line |= {"rows": rows, "dims": dims, "snapshots": snapshots}
        allowed = limits(stage, rows=rows, dims=dims, snapshots=snapshots)
        for name, size in copies.items():
            line[name] = size
            line[f"limit_{name}"] = allowed.get(name)
        lines.append(line)
    return lines


@click.command(cls=Command)
@click.option("--rows", default=50_000, show_default=True, type=click.IntRange(1000))
@click.option("--snapshots", default=4, show_default=True, type=click.IntRange(2))
@click.option("--model", default="resnet18", show_default=True)
def main(rows: int, snapshots: int, model: str) -> None:
    """Bytes between host and GPU by stage, and a planted copy that must be caught."""
    require_gpu()
    backend = open_backend("gpu")
    corpus, stamped = drawn_images(rows)
    with watched(backend):  # the profiler's own start
        backend.xp.zeros(1).sum()
    lines, broken = [], {}
    for planted in (False, True):
        stages, dims = run_stages(
            corpus, stamped, backend, model=model, snapshots=snapshots, planted=planted
        )
        sizes = {"rows": rows, "dims": dims, "snapshots": snapshots}
        lines += table(stages, planted=planted, **sizes)
        broken[planted] = broken_limits(stages, **sizes)
        caught = shows_features(stages["segregation"], rows=rows, dims=dims)
        if caught != planted:
            broken[False].append(f"features came down {'unseen' if planted else 'unplanted'}")
    results_file.publish(bench.report("traffic", backend, lines))
    for told in broken[False]:
        click.echo(f"over the limit: {told}")
    click.echo(f"with the planted copy: {'; '.join(broken[True]) or 'no limit was broken'}")
    sys.exit(1 if broken[False] or not broken[True] else 0)


if __name__ == "__main__":
    main()
