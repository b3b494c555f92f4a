"""Spectral Signatures (Tran, Li, Madry, NeurIPS 2018, arXiv 1811.00636, algorithm 1).

Poison moves the mean of its class's features, and so shows in their top singular direction. Of each
given label the 1.5 eps rows with the largest squared projection on it are removed, where eps is the
most poison that a class may hold, and a net is trained on the rest. That eps is told, not found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import csc
from csc_gpu.backend import Backend
from csc_gpu.components import principal
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.types import Array, DefenderView, Outcome, Segregation

UNITS = ("corpus", "class")


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """How many rows of a class are removed."""

    rate: float = 0.05
    """Poison that is expected, as a share of what `unit` says."""
    unit: str = "corpus"
    """corpus: rate times all N rows may be in any one class, as in the paper, where one class holds
    all poison. class: rate times the rows of that class, as ART has it."""
    multiplier: float = 1.5
    """Rows removed for each one expected."""
    most: float = 0.5
    """No class loses more than this share of its rows."""
    centred: bool = True
    """Project centred features, as the paper; ART and BackdoorBench project them as they are."""

    def __post_init__(self) -> None:
        require(self, "spectral", f"one of {', '.join(UNITS)}", UNITS.__contains__, "unit")
        require(self, "spectral", "in (0, 1]", lambda share: 0 < share <= 1, "rate", "most")
        require(self, "spectral", "above 0", lambda value: 0 < value < 1e6, "multiplier")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and how many rows of a class are removed."""

    spectral: Signatures = field(default_factory=Signatures)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, remove the rows that stand out in their class, train again."""
    course, labels = Course(view, settings, backend, **how), view.train.labels
    return course.by_features(lambda points: judge(points, labels, settings, backend))


def judge(
    points: Array, labels: NDArray[np.int64], settings: Settings, backend: Backend, *, seed: int = 0
) -> Segregation:
    """The suspects among features (N, D) with given labels (N,)."""
    del seed  # nothing is drawn
    chosen, xp = settings.spectral, backend.xp
    suspect, belief = np.zeros(len(labels), bool), np.zeros(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ours = points[xp.asarray(rows)].astype(xp.float64)
        score = np.asarray(backend.to_numpy(outlyingness(ours, xp, centred=chosen.centred)), float)
        belief[rows] = score / max(float(score.mean()), np.finfo(float).tiny)
        expected = chosen.rate * (len(labels) if chosen.unit == "corpus" else len(rows))
        count = int(min(chosen.multiplier * expected, chosen.most * len(rows)))
        suspect[rows[np.argsort(-score, kind="stable")[:count]]] = True
    return verdict(suspect, belief, "spectral", {"expected_rate": chosen.rate, "unit": chosen.unit})


def outlyingness(points: Array, xp: ModuleType, *, centred: bool = True) -> Array:
    """Squared projection of each row (n, D) on the top singular vector of the centred rows. (n,)"""
    projected, _ = principal(points, 1, xp)
    if centred:
        return projected[:, 0] ** 2
    axis = (points - points.mean(axis=0)).T @ projected[:, 0]
    return (points @ (axis / xp.linalg.norm(axis))) ** 2
