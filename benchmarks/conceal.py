"""Fine-tuning the head, recorded as a CUDA graph and step by step, over the steps of a replay.

    python -m benchmarks.conceal                    CIFAR-10's shape
    python -m benchmarks.conceal --shape imagenet   on a GPU alone

The weights after a recorded run and after the same run step by step must agree, else the speed
means nothing: exit status 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import click

from benchmarks import results_file
from benchmarks.command import Command
from csc_gpu import bench, conceal
from csc_gpu.backend import Backend
from csc_gpu.cli import machine
from csc_gpu.errors import BackendUnavailable

TOLERANCE = 1e-5
"""Largest |W - W'| / |W'| (Frobenius) between recorded and eager weights."""
REPLAYS = (1, 8, 32, 0)
"""Optimiser steps in one graph; 0: a whole epoch."""


@dataclass(frozen=True)
class Shape:
    """What the head of a data set is trained on."""

    rows: int
    dims: int
    classes: int  # outputs but the virtual one


SHAPES = {
    "cifar": Shape(50_000, 512, 10),  # ResNet-18
    "imagenet": Shape(1_281_167, 2048, 1000),  # ResNet-50
}


def sweep(
    backend: Backend, shape: Shape, replays: tuple[int, ...], *, epochs: int, repeats: int
) -> list[bench.Line]:
    """Two lines of bench.conceal, captured and eager, for each length of a replay."""
    lines = []
    for replay in replays:
        settings = conceal.Settings(replay=replay, epochs=epochs)
        found = bench.conceal(
            backend,
            rows=shape.rows,
            dims=shape.dims,
            classes=shape.classes,
            repeats=repeats,
            settings=settings,
        )
        about = {"replay": replay or "epoch", "tolerance": TOLERANCE}
        lines += [about | line for line in found]
    return lines


@click.command(cls=Command)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="cifar", show_default=True)
@click.option("--rows", type=click.IntRange(8), help="Fewer rows than the shape has.")
@click.option("--replay", "replays", multiple=True, type=click.IntRange(0), default=REPLAYS)
@click.option("--epochs", default=conceal.Settings().epochs, show_default=True)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@machine
def main(
    shape: str,
    rows: int | None,
    replays: tuple[int, ...],
    epochs: int,
    repeats: int,
    backend: Backend,
) -> None:
    """Concealment recorded and eager, over conceal.replay."""
    wanted = SHAPES[shape]
    if shape == "imagenet" and backend.name != "gpu":
        raise BackendUnavailable("the shape of ImageNet is for a GPU; leave out --cpu")
    wanted = Shape(rows or wanted.rows, wanted.dims, wanted.classes)
    lines = sweep(backend, wanted, replays, epochs=epochs, repeats=repeats)
    results_file.publish(bench.report(f"conceal-{shape}", backend, lines))
    apart = max(line["weights_differ_by"] for line in lines)
    if not apart <= TOLERANCE:  # so that NaN is refused too
        click.echo(f"recorded weights differ from eager ones by {apart:.2g}, over {TOLERANCE:g}")
        sys.exit(1)


if __name__ == "__main__":
    main()
