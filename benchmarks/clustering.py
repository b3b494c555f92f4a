"""DBSCAN over a grid of sizes: equal answers first, then the time, then its distance to the floor.

    python -m benchmarks.clustering                       the grid, as far as --budget reaches
    python -m benchmarks.clustering --cpu --rows 2000 --dims 16 --dims 64

Rows lie on an integer lattice with the squared radius half way between two distances (bench.drawn),
so that every correct DBSCAN gives one answer, up to the cluster of a border row. The cells run in
the order of their work, N^2 D, each after a run that is not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import results_file
from benchmarks.command import Command
from csc_gpu import bench
from csc_gpu.backend import Backend, open_backend
from csc_gpu.backend.workspace import workspace
from csc_gpu.cli import machine
from csc_gpu.errors import CscError
from csc_gpu.memory import free_memory
from csc_gpu.segregate import Settings
from csc_gpu.segregate.clusters import least_neighbours
from csc_gpu.types import Array, Mask

ROWS = (10_000, 50_000, 100_000, 200_000, 1_281_167)
DIMS = (16, 64, 512, 2048)
MOST_WITH_REFERENCE = 20_000
"""Rows up to which scikit-learn's answer is asked for unless told otherwise."""
BLOCK = 512
"""Rows whose distances to all others are held at a time by the check."""
BYTES_TO_DRAW = 20
"""Main memory for each number of a drawn matrix: two float64 on the way and one float32."""
FP32_INSTRUCTIONS = 67e12 / 2
"""A second, of one H200: its assumed FP32 rate counts an FMA as two."""
TF32, BF16 = 400e12, 790e12
"""FLOP a second of one H200: the first assumed, the second a measured GEMM rate."""


# --- floors -------------------------------------------------------------------------------------


def cuml_floor(rows: int, dims: int, passes: float) -> float:
    """Least seconds of cuML's kernel on one H200: 2 instructions a pair and dimension, all pairs.

    Of `performance.md`, section 2; passes are 1 to 2, as the batches go.
    """
    return passes * 2 * rows**2 * dims / FP32_INSTRUCTIONS


def half_square_floor(rows: int, dims: int, rate: float) -> float:
    """Least seconds to multiply each pair of rows once, at so many FLOP a second."""
    return rows**2 * dims / rate


def floors(rows: int, dims: int, backend: Backend) -> bench.Line:
    """The floors on an H200 and the passes of the workspace this GPU has room for now."""
    space = workspace(rows, dims, backend.free_bytes() or 0)
    return {
        "passes": space.passes,
        "cuml_1_pass_floor_s": cuml_floor(rows, dims, 1),
        "cuml_floor_s": cuml_floor(rows, dims, space.passes),
        "tf32_floor_s": half_square_floor(rows, dims, TF32),
        "bf16_floor_s": half_square_floor(rows, dims, BF16),
    }


# --- equal answers ------------------------------------------------------------------------------


def same_clustering(
    points: NDArray[np.float32],
    eps: float,
    min_samples: int,
    one: NDArray[np.integer[Any]],
    other: NDArray[np.integer[Any]],
) -> None:
    """Raises AssertionError unless both (N,) are answers of DBSCAN on points (N, D), and the same.

    The rows that are noise agree and touch no core row; the clusters of the core rows correspond
    one to one; a border row is in a cluster of which it touches a core row, which need not be the
    same in both. Distances are float64, exact on a lattice.
    """
    labellings = [np.asarray(labels).astype(np.int64) for labels in (one, other)]
    one, other = labellings
    _refuse((one < 0) != (other < 0), "is noise in one and not in the other")
    core = core_rows(points, eps, min_samples)
    _refuse(core & (one < 0), "is a core row but noise in both")
    pairs = np.unique(np.stack([one[core], other[core]]), axis=1)  # (2, P)
    for which, clusters in zip(("one", "other"), pairs, strict=True):
        twice = clusters[np.flatnonzero(np.bincount(clusters, minlength=1)[clusters] > 1)]
        if len(twice):
            raise AssertionError(
                f"core rows: cluster {twice[0]} of the {which} is several clusters of its peer"
            )
    middle = np.flatnonzero(core)
    for rows, near in within(points, np.flatnonzero(~core), middle, eps):
        is_noise = one[rows] < 0
        alone = ~near.any(axis=1)
        _refuse(~alone & is_noise, "touches a core row but is noise in both", rows)
        for which, labels in zip(("one", "other"), labellings, strict=True):
            home = (near & (labels[middle] == labels[rows][:, None])).any(axis=1)
            _refuse(~is_noise & ~home, f"touches no core row of its cluster in the {which}", rows)


def _refuse(wrong: Mask, what: str, rows: NDArray[np.int64] | None = None) -> None:
    """Raises AssertionError if any is wrong; `rows` are the numbers of the rows looked at."""
    found = np.flatnonzero(wrong) if rows is None else rows[wrong]
    if len(found):
        raise AssertionError(f"row {found[0]} (and {len(found) - 1} more) {what}")


def core_rows(points: NDArray[np.float32], eps: float, min_samples: int) -> Mask:
    """The rows with min_samples rows within eps, themselves counted. (N,)"""
    everyone, core = np.arange(len(points)), np.zeros(len(points), bool)
    for rows, near in within(points, everyone, everyone, eps):
        core[rows] = near.sum(axis=1) >= min_samples
    return core


def within(
    points: NDArray[np.float32], rows: NDArray[np.int64], others: NDArray[np.int64], eps: float
) -> Iterator[tuple[NDArray[np.int64], Mask]]:
    """Block by block, some of the rows (B,) and which of the others lie within eps, (B, others)."""
    right = points[others].astype(np.float64)
    right_length = (right**2).sum(axis=1)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        left = points[block].astype(np.float64)
        squared = left @ right.T  # |x - y|^2 = |x|^2 + |y|^2 - 2xy, in place
        squared *= -2
        squared += right_length
        squared += (left**2).sum(axis=1)[:, None]
        yield block, squared <= eps * eps


# --- one cell -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One size of the grid."""

    rows: int
    dims: int
    has_reference: bool

    @property
    def work(self) -> int:
        """N^2 D"""
        return self.rows**2 * self.dims


def grid(rows: Sequence[int], dims: Sequence[int], reference: bool | None) -> list[Cell]:
    """The cells, least work first; reference None asks scikit-learn only about small ones."""

    def asked(n: int) -> bool:
        return n <= MOST_WITH_REFERENCE if reference is None else reference

    return sorted((Cell(n, d, asked(n)) for n in rows for d in dims), key=lambda cell: cell.work)


def measure(cell: Cell, backend: Backend, repeats: int) -> bench.Line:
    """The time of a cell, its floors on a GPU, and whether scikit-learn agrees."""
    start = time.perf_counter()
    points = bench.drawn(cell.rows, cell.dims, seed=0)
    min_samples = least_neighbours(cell.rows, Settings().suited(1))
    placed = backend.xp.asarray(points)
    eps = bench.lattice_eps(placed, min_samples, backend, exact=True)
    line: bench.Line = {"rows": cell.rows, "dims": cell.dims, "min_samples": min_samples}
    line |= floors(cell.rows, cell.dims, backend) if backend.name == "gpu" else {}
    found: list[Array] = []

    def cluster() -> None:
        found[:] = [backend.dbscan(placed, eps=eps, min_samples=min_samples)]

    line["setup_s"] = time.perf_counter() - start
    line |= bench.timed(cluster, backend, repeats).line()
    for floor in [name for name in line if name.endswith("_floor_s")]:
        line[f"times_{floor.removesuffix('_s')}"] = line["median_s"] / line[floor]
    of_row = backend.to_numpy(found[0]).astype(np.int64)
    line |= {"clusters": int(of_row.max()) + 1, "noise": int((of_row < 0).sum())}
    if cell.has_reference:
        start = time.perf_counter()
        wanted = open_backend("cpu").dbscan(points, eps=eps, min_samples=min_samples)
        line["agrees"] = agreement(points, eps, min_samples, of_row, wanted)
        line["reference_s"] = time.perf_counter() - start
    return line


def agreement(
    points: NDArray[np.float32],
    eps: float,
    min_samples: int,
    one: NDArray[np.int64],
    other: NDArray[np.integer[Any]],
) -> str:
    """yes, or how two clusterings differ."""
    try:
        same_clustering(points, eps, min_samples, one, other)
    except AssertionError as fault:
        return f"no: {fault}"
    return "yes"


def expected(cell: Cell, measured: Sequence[bench.Line], repeats: int, *, floor: bool) -> float:
    """Seconds a cell will take: the least that a measured one lets expect, no less than the floor.

    Runs and reference grow with N^2 D, what precedes them with N D.
    """
    least = (repeats + 1) * cuml_floor(cell.rows, cell.dims, 1) if floor else 0.0

    def by(line: bench.Line) -> float:
        more = cell.work / (line["rows"] ** 2 * line["dims"])
        runs = (repeats + 1) * line["median_s"]
        checks = line.get("reference_s", 0.0) if cell.has_reference else 0.0
        setup = line["setup_s"] * cell.rows * cell.dims / (line["rows"] * line["dims"])
        return float((runs + checks) * more + setup)

    return max(least, min(map(by, measured), default=0.0))


def why_not(
    cell: Cell, measured: Sequence[bench.Line], repeats: int, left: float, *, on_gpu: bool
) -> str:
    """Why a cell is skipped with so many seconds left; empty if it is not."""
    takes = expected(cell, measured, repeats, floor=on_gpu)
    if takes > left:
        return f"{max(left, 0.0):.0f} s left of the budget, {takes:.0f} s needed"
    memory, needed = free_memory(), BYTES_TO_DRAW * cell.rows * cell.dims
    if memory is not None and needed > memory:
        return f"{memory / 1e9:.1f} GB of main memory free, {needed / 1e9:.1f} GB needed to draw"
    return ""


def measure_all(
    cells: Sequence[Cell], backend: Backend, repeats: int, budget: float
) -> list[bench.Line]:
    """A line for every cell: measured within `budget` seconds, or skipped and why."""
    end = time.perf_counter() + budget
    measured: list[bench.Line] = []
    skipped: list[bench.Line] = []
    for cell in cells:
        left = end - time.perf_counter()
        why = why_not(cell, measured, repeats, left, on_gpu=backend.name == "gpu")
        if not why:
            try:
                measured.append(measure(cell, backend, repeats))
            except CscError as fault:
                why = str(fault)
        if why:
            skipped.append({"rows": cell.rows, "dims": cell.dims, "skipped": why})
    return measured + skipped


@click.command(cls=Command)
@click.option("--rows", multiple=True, type=click.IntRange(8), default=ROWS, show_default=True)
@click.option("--dims", multiple=True, type=click.IntRange(1), default=DIMS, show_default=True)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--reference/--no-reference",
    default=None,
    help=f"Compare with scikit-learn; default: up to {MOST_WITH_REFERENCE} rows.",
)
@click.option("--budget", default=300.0, show_default=True, help="Seconds for the whole grid.")
@machine
def main(
    rows: tuple[int, ...],
    dims: tuple[int, ...],
    repeats: int,
    reference: bool | None,
    budget: float,
    backend: Backend,
) -> None:
    """DBSCAN over a grid of rows and dimensions, with floors and scikit-learn's answer."""
    lines = measure_all(grid(rows, dims, reference), backend, repeats, budget)
    results_file.publish(bench.report("clustering", backend, lines))
    wrong = [line for line in lines if line.get("agrees", "yes") != "yes"]
    if wrong or all("skipped" in line for line in lines):
        click.echo(f"{len(wrong)} of {len(lines)} cells give another answer than scikit-learn")
        sys.exit(1)


if __name__ == "__main__":
    main()
