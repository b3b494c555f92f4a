"""A corpus with unequal classes, cut from an .npz whose classes are about equal.

    python -m benchmarks.long_tail fashion-mnist.npz tail.npz --ratio 10

Class c of C keeps a share of ratio^(-c / (C - 1)) of its training rows, drawn by the seed: the
first keeps all, the last one in `ratio`. The test part stays as it is.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from benchmarks.command import Command

PARTS = ("x_train", "y_train", "x_test", "y_test")


@click.command(cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--ratio",
    type=click.FloatRange(min=1),
    default=10.0,
    show_default=True,
    help="Largest class over smallest.",
)
@click.option("--seed", default=0, show_default=True)
def thin(source: Path, out: Path, ratio: float, seed: int) -> None:
    """Write OUT, a long-tailed part of SOURCE."""
    from csc_gpu.data.arrays import load_arrays

    arrays = load_arrays(source, PARTS)
    labels, draw = arrays["y_train"], np.random.default_rng(seed)
    n_classes, kept = int(labels.max()) + 1, []
    for label in range(n_classes):
        rows = draw.permutation(np.flatnonzero(labels == label))
        kept.append(rows[: round(len(rows) * ratio ** (-label / max(1, n_classes - 1)))])
    rows = np.sort(np.concatenate(kept))
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out, **arrays | {"x_train": arrays["x_train"][rows], "y_train": labels[rows]}
    )
    click.echo(f"{len(rows)} of {len(labels)} rows; by class {[len(part) for part in kept]}")


if __name__ == "__main__":
    thin()
