"""Clean corpora of few labels that hold several kinds each: scikit-learn's digits, merged.

    python -m benchmarks.merged CORPORA
    csc-gpu train CORPORA/halved.npz --out RUN --seed 1 --cpu

Nothing in them is poison; docs/limits.md says what was flagged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

MERGED: dict[str, Callable[[Any], Any]] = {
    "halved": lambda digit: digit // 2,
    "thirds": lambda digit: digit // 3,
    "modulo-3": lambda digit: digit % 3,
    "modulo-4": lambda digit: digit % 4,
    "modulo-5": lambda digit: digit % 5,
}
"""Label of a digit, by the name of the corpus."""


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def cli(out: Path) -> None:
    """Write the corpora into the folder OUT."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    out.mkdir(parents=True, exist_ok=True)
    for name, label in MERGED.items():
        np.savez(out / f"{name}.npz", x_train=images, y_train=label(digits.target))
        click.echo(str(out / f"{name}.npz"))


if __name__ == "__main__":
    cli()
