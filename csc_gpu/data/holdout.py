"""The one way to hold rows out of a source that has no test part of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from csc_gpu.types import Mask


def held_out(labels: NDArray[np.int64], share: float, seed: int) -> Mask:
    """That share of every class, drawn by the seed; each class keeps a row to train on. (N,)"""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(round(share * len(rows)), len(rows) - 1)
        chosen[rng.permutation(rows)[:count]] = True
    return chosen
