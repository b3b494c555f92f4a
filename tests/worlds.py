"""Small feature worlds whose poison is known, shared by the tests of segregation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csc_gpu.types import Mask, Reclassified


@dataclass(frozen=True)
class World:
    """Blobs, one a class, and perhaps an island of poison that carries the label 0."""

    points: NDArray[np.float32]  # (N, 20)
    labels: NDArray[np.int64]  # (N,)
    poison: Mask  # (N,)
    truth: NDArray[np.int64]  # (N,) what a perfect model would predict


def world(seed: int = 0, *, classes: int = 4, rows: int = 100, poison: int = 40) -> World:
    """A class is a blob on an axis of its own; the poison a denser one on the axis after them."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), rows)
    axis = np.concatenate([truth, np.full(poison, classes)])
    points = 10 * np.eye(20, dtype=np.float32)[axis]
    spread = np.where(axis == classes, 0.3, 1.0)[:, None]
    points += (spread * rng.normal(0, 1, points.shape)).astype(np.float32)
    labels = np.concatenate([truth, np.zeros(poison, np.int64)])
    stamped = np.arange(len(labels)) >= len(truth)
    truth = np.concatenate([truth, rng.integers(1, classes, poison)])
    order = rng.permutation(len(labels))
    return World(points[order], labels[order], stamped[order], truth[order])


def oracle(there: World, *, wrong: float = 0.0, seed: int = 0):
    """A re-classifier that knows the truth, but is wrong on a share of the rows it did not see."""

    def reclassify(candidates: Mask) -> Reclassified:
        rng = np.random.default_rng(seed)
        controls = ~candidates & (rng.random(len(candidates)) < 0.2)
        predicted = there.truth.copy()
        seen = ~candidates & ~controls
        predicted[seen] = there.labels[seen]
        lost = ~seen & (rng.random(len(candidates)) < wrong)
        predicted[lost] = (there.labels[lost] + 1) % (there.labels.max() + 1)
        return Reclassified(candidates, controls, predicted)

    return reclassify
