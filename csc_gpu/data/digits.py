"""The embedded set: scikit-learn's 1797 handwritten digits of 8x8 pixels. Nothing is downloaded."""

from __future__ import annotations

import numpy as np

from csc_gpu.data.arrays import rgb
from csc_gpu.types import Corpus

WHITE = 16
"""The brightest value in scikit-learn's images."""


def open_digits() -> Corpus:
    """All digits, 8x8, as grey RGB of 0..255."""
    from sklearn.datasets import load_digits  # takes a second, which other sources need not spend

    digits = load_digits()
    grey = np.rint(digits.images * (255 / WHITE)).astype(np.uint8)
    rows = np.arange(len(grey))
    return Corpus(
        labels=digits.target.astype(np.int64),
        classes=tuple(str(name) for name in digits.target_names),
        ids=rows,
        paths=tuple(f"digits/{row:04d}" for row in rows),
        pixels=rgb(grey),
    )
