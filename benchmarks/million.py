"""1.28 million x 512 drawn features with planted islands: the sampled mode, end to end.

    python -m benchmarks.million --cpu --spill FOLDER

A thousand classes of unit vectors, each around a direction of its own; one row in a hundred lies in
an island, near a direction that no class has, and bears one label. The memory plan is printed
first. Then stage 1 runs as in a run, one snapshot: segregate.observe, and the persistence rule.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import results_file
from benchmarks.command import Command
from csc_gpu import bench, csc, features, plan, segregate
from csc_gpu.backend import Backend
from csc_gpu.cli import machine
from csc_gpu.config import override
from csc_gpu.types import Array, Mask

DRAWN = 16_384
"""Rows drawn at a time."""
INNER = 96
"""Dimensions in which classes lie; the rest is noise."""
OUTSIDE = 0.15
"""Length of the noise in all dimensions."""
TIGHT = 0.5
"""Deviation in an island against that in a class."""
ISLANDS = (
    *(1000, 1000, 900, 900, 800, 800, 800, 700, 700, 700),
    *(600, 600, 600, 500, 500, 500, 400, 400, 300, 100),
)
"""Rows of the islands, together 1 % of 1.28 million; of fewer rows those that make 1 % of them.

A class has about 1,280. At a fine scale the island of a label is its only cluster and passes for
its home, until the looser class shows up as well: so all scales count here unless --coarsest says
otherwise.
Islands below segregate.min_share (256 rows) are too small for the sample to hold.
"""
PLANTED = 0.01
SETTINGS = {"segregate.rule": "persistence"}


@dataclasses.dataclass(frozen=True)
class World:
    """Features of labelled rows, and who was planted."""

    points: Array  # (N, D) float32, or features.Spilled
    labels: NDArray[np.int64]  # (N,)
    island: NDArray[np.int64]  # (N,) -1: benign

    @property
    def planted(self) -> Mask:
        """The rows of all islands. (N,)"""
        return self.island >= 0


def drawn(
    n: int,
    d: int,
    classes: int,
    within: float,
    keep: features.Settings,
    backend: Backend,
    seed: int = 0,
) -> World:
    """Rows in an order drawn at random, block by block. (n, d)

    `within` is the length of a row's deviation from its class, whose direction has length 1.
    """
    rng = np.random.default_rng(seed)
    sizes = list[int]()
    for size in ISLANDS:
        if sum(sizes) + size <= PLANTED * n:
            sizes.append(size)
    island = np.full(n, -1)
    island[: sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    rng.shuffle(island)
    labels = rng.integers(0, classes, n)
    target = rng.choice(classes, len(sizes), replace=False)
    labels[island >= 0] = target[island[island >= 0]]
    spectrum = np.arange(1, INNER + 1) ** -0.25
    centre = _unit(rng.standard_normal((classes + len(sizes), INNER)) * spectrum)
    turned = np.linalg.qr(rng.standard_normal((d, INNER)))[0].T.astype(np.float32)  # (INNER, d)
    spread = within * np.exp(rng.normal(0, 0.1, classes + len(sizes)))
    spread[classes:] *= TIGHT
    blob = np.where(island >= 0, classes + island, labels)
    xp = backend.xp
    points = features.Spilled((n, d), keep, backend) if keep.spill else xp.empty((n, d), xp.float32)
    for start in range(0, n, DRAWN):
        some = blob[start : start + DRAWN]
        inner = rng.standard_normal((len(some), INNER), np.float32) * (spectrum / _norm(spectrum))
        flat = centre[some] + spread[some, None] * inner
        noise = rng.standard_normal((len(some), d), np.float32)
        rows = flat.astype(np.float32) @ turned + np.float32(OUTSIDE / d**0.5) * noise
        at = xp.arange(start, start + len(some))
        points[at] = xp.asarray(_unit(rows).astype(np.float32))
    return World(points, labels, island)


def _norm(spectrum: NDArray[Any]) -> float:
    return float(np.linalg.norm(spectrum))


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    unit: NDArray[Any] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@contextmanager
def clocked(line: bench.Line, part: str, backend: Backend) -> Iterator[None]:
    """Wall and processor seconds of a part, into a line."""
    wall, cpu = time.perf_counter(), time.process_time()
    with backend.stage(part):
        yield
    line[f"{part}_s"] = time.perf_counter() - wall
    line[f"{part}_cpu_s"] = time.process_time() - cpu


def planned(n: int, d: int, classes: int, settings: csc.Settings, backend: Backend) -> bench.Line:
    """What features and stage 1 take of memory, and the largest part of it."""
    parts = plan.clustering_parts(n, d, classes, settings, backend.name)
    parts["features"] = 0 if settings.features.spill else 4 * n * d
    kept = len(segregate.looked_at([0], settings.segregate)[0])
    parts["clusters of every scale"] = 4 * kept * (n + classes**2)
    parts["libraries"] = backend.peak_bytes() or 0
    return {
        "planned_bytes": sum(parts.values()),
        "largest_part": max(parts, key=lambda name: parts[name]),
        "largest_bytes": max(parts.values()),
    }


def measure(
    n: int,
    d: int,
    classes: int,
    within: float,
    settings: csc.Settings,
    backend: Backend,
    seed: int = 0,
) -> bench.Line:
    """Seconds by part, the plan and the peak, and what was found of the islands."""
    line: bench.Line = {"rows": n, "dims": d, "classes": classes, "within": within, "seed": seed}
    line |= planned(n, d, classes, settings, backend)
    click.echo(
        f"memory: {line['planned_bytes'] / 1e9:.3f} GB planned, most of it for "
        f"{line['largest_part']} ({line['largest_bytes'] / 1e9:.3f} GB)"
    )
    with clocked(line, "draw", backend):
        there = drawn(n, d, classes, within, settings.features, backend, seed)
    chosen = settings.segregate
    scales = segregate.looked_at([0], chosen)[0]
    with clocked(line, "observe", backend):
        seen = segregate.observe(there.points, there.labels, 1.0, chosen, backend, scales=scales)
    with clocked(line, "rule", backend):
        told = segregate.segregate([seen], there.labels, chosen, backend)
    line["peak_bytes"] = backend.peak_bytes()
    return (
        line
        | found(there, told.suspect)
        | {
            "strays": float(seen.stray.mean()),
            "sampled": seen.sampled,
            "min_samples": seen.min_samples,
            "clusters": [len(clusters.size) for clusters in seen.clusterings],
        }
    )


def found(there: World, suspect: Mask) -> bench.Line:
    """Recall of the planted rows, false alarms among the others, and recall by island."""
    planted = there.planted
    by_island = [float(suspect[there.island == i].mean()) for i in range(there.island.max() + 1)]
    return {
        "planted": int(planted.sum()),
        "recall": float(suspect[planted].mean()),
        "false_alarms": float(suspect[~planted].mean()),
        "suspects": int(suspect.sum()),
        "islands_found": sum(share >= 0.5 for share in by_island),
        "recall_by_island": [round(share, 4) for share in by_island],
        "island_rows": np.bincount(there.island[planted]).tolist(),
    }


@click.command(cls=Command)
@click.option("--rows", default=1_280_000, show_default=True, type=click.IntRange(50_000))
@click.option("--dims", default=512, show_default=True, type=click.IntRange(INNER))
@click.option("--classes", default=1000, show_default=True, type=click.IntRange(2))
@click.option("--within", default=0.45, show_default=True, help="A row's deviation from its class.")
@click.option("--sample", default=50_000, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, help="Draws the world.")
@click.option("--coarsest", default=0.9, show_default=True, help="segregate.coarsest; usual: .6")
@click.option("--spill", default="", help="A folder for the features; else they are resident.")
@machine
def main(
    rows: int,
    dims: int,
    classes: int,
    within: float,
    sample: int,
    seed: int,
    coarsest: float,
    spill: str,
    backend: Backend,
) -> None:
    """Find planted islands among drawn features, in the sampled mode."""
    chosen = SETTINGS | {"segregate.coarsest": coarsest}
    changes = chosen | {
        "segregate.mode": "sample",
        "segregate.sample": sample,
        "features.spill": spill,
    }
    settings = override(csc.Settings(), changes)
    line = measure(rows, dims, classes, within, settings, backend, seed)
    line |= {"spilled": bool(spill), "settings": chosen}
    results_file.publish(bench.report("million", backend, [line]))


if __name__ == "__main__":
    main()
