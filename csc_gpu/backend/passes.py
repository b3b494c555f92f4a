"""One pass over a corpus: which rows make a batch, and how each image is changed.

All of it is drawn on the host before the pass begins, so a device is never waited for in between,
and the same seed gives the same images wherever they are read from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Augment


def batches_in(n_rows: int, size: int) -> int:
    """Batches of at most `size` in one pass over so many rows."""
    return max(1, math.ceil(n_rows / size))


def even_parts(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """The rows in batches of at most `size`, none more than one row shorter than another.

    Even, because a last batch of one row would leave BatchNorm nothing to normalise over.
    """
    return np.array_split(order, batches_in(len(order), size))


@dataclass(frozen=True)
class Portion:
    """What of a pass is given: some of its batches, and some rows of each. All is drawn alike."""

    batches: slice = field(default_factory=lambda: slice(None))
    rows: slice = field(default_factory=lambda: slice(None))

    def of(self, parts: Sequence[NDArray[np.int64]]) -> list[slice]:
        """Where in the pass the rows of each batch that is given are."""
        ends = itertools.accumulate(map(len, parts), initial=0)
        whole = [range(*pair) for pair in itertools.pairwise(ends)]
        given = [part[self.rows] for part in whole[self.batches]]
        return [slice(part.start, part.stop, part.step) for part in given]


WHOLE = Portion()


@dataclass(frozen=True)
class Changes:
    """What augmentation does to each image of a pass, in its order."""

    mirrored: NDArray[np.bool_]  # (n,)
    by: NDArray[np.int64]  # (2, n) pixels down and to the right that are read from


def draw(
    augment: Augment | None, rng: np.random.Generator | None, parts: Sequence[NDArray[np.int64]]
) -> Changes | None:
    """Draw the changes for every batch of a pass; None if nothing is to change."""
    if augment is None or not (augment.flip or augment.shift):
        return None
    assert rng is not None, "augmentation draws from rng"
    mirrored, by, reach = [], [], augment.shift
    for part in parts:
        n = len(part)
        mirrored.append(rng.random(n) < 0.5 if augment.flip else np.zeros(n, bool))
        moved = (
            rng.integers(-reach, reach + 1, size=(2, n)) if reach else np.zeros((2, n), np.int64)
        )
        by.append(moved)
    return Changes(np.concatenate(mirrored), np.concatenate(by, axis=1))
