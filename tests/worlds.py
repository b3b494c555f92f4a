"""Small feature worlds whose poison is known, shared by the tests of segregation."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.segregate.settings import Settings
from csc_gpu.segregate.testimony import Testimony
from csc_gpu.types import Mask, Reclassified, Transfer


@dataclass(frozen=True)
class World:
    """Blobs, one a class, and perhaps an island of poison that carries the label 0."""

    points: NDArray[np.float32]  # (N, 20)
    labels: NDArray[np.int64]  # (N,)
    poison: Mask  # (N,)
    truth: NDArray[np.int64]  # (N,) what a perfect model would predict

    def take(self, rows: NDArray[Any]) -> World:
        """The world of these rows, in this order."""
        return World(self.points[rows], self.labels[rows], self.poison[rows], self.truth[rows])


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


@dataclass
class Oracle:
    """A witness (types.Witness) that knows the truth of a world."""

    there: World
    wrong: float  # share of the rows it did not see on which the re-classifier errs
    commands: float  # share of images that the pattern of poison less benign rows sends to a label
    xp: ModuleType
    seed: int
    asked: list[tuple[Mask, Mask, int]] = field(default_factory=list)  # of transfers
    left_out: list[Mask] = field(default_factory=list)  # of reclassify

    def points(self) -> Any:
        """Features of all rows, on the device of xp."""
        return self.xp.asarray(self.there.points)

    def transfers(self, group: Mask, rest: Mask, label: int) -> Transfer:
        """The share, and of no label in particular."""
        self.asked.append((group, rest, label))
        groups = Transfer.fingerprint(group, rest)
        return Transfer(label, groups, self.share(group, rest, label))

    def share(self, group: Mask, rest: Mask, label: int) -> float:
        """`commands` if the group is mostly poison and the rest mostly not; else 0."""
        poison = self.there.poison
        return self.commands if poison[group].mean() > 0.5 > poison[rest].mean() else 0.0

    def reclassify(self, candidates: Mask) -> Reclassified:
        """The label of rows that were seen, else the truth, but for the share that is wrong."""
        self.left_out.append(candidates)
        labels, rng = self.there.labels, np.random.default_rng(self.seed)
        controls = ~candidates & (rng.random(len(candidates)) < 0.2)
        predicted = self.there.truth.copy()
        seen = ~candidates & ~controls
        predicted[seen] = labels[seen]
        lost = ~seen & (rng.random(len(candidates)) < self.wrong)
        predicted[lost] = (labels[lost] + 1) % (labels.max() + 1)
        return Reclassified(candidates, controls, predicted)


def oracle(
    there: World,
    *,
    wrong: float = 0.0,
    commands: float = 1.0,
    xp: ModuleType = np,
    seed: int = 0,
) -> Oracle:
    """A witness of this world; see Oracle."""
    return Oracle(there, wrong, commands, xp, seed)


def heard_of(case, labels, check, **changes):
    """What the check says of the case, with the usual settings but for these."""
    settings = Settings(**changes)
    return Testimony(case, check, labels, settings.min_rows, settings.max_label_share)
