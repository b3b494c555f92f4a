"""SPECTRE (Hayase, Kong, Somani, Oh; ICML 2021, arXiv 2104.11315).

Of each label the features are projected on their top k directions and whitened by a robust mean and
covariance, which poison cannot move, so that it shows as excess variance. The QUE score weighs all
directions by their excess, exp(4 (S - 1) / (|S| - 1)); k is the one with the largest mean score,
and so is the label that counts as poisoned: of it the 1.5 eps highest rows are removed, and a net
is trained on the rest. That eps is told, not found.

Ours: the robust estimate is by concentration steps (the rows that lie far out are left out, again
and again, as in FAST-MCD), where the paper filters by its own algorithm.
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

CLASSES = ("highest", "all")


@dataclass(frozen=True, kw_only=True)
class Estimation:
    """How many rows are removed, and how they are scored."""

    rate: float = 0.05
    """Poison that is expected, as a share of all N rows; one label holds it."""
    multiplier: float = 1.5
    """Rows removed for each one expected."""
    most: float = 0.5
    """No label loses more than this share of its rows."""
    classes: str = "highest"
    """highest: only the label that scores highest loses rows; all: every label does."""
    alpha: float = 4.0
    """How sharply the QUE score weighs directions of excess variance."""
    dims: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Numbers of directions, of which the best is taken for each label."""
    steps: int = 10
    """Concentration steps of the robust estimate."""
    least: int = 10
    """A label needs so many rows for each direction."""

    def __post_init__(self) -> None:
        require(self, "spectre", f"one of {', '.join(CLASSES)}", CLASSES.__contains__, "classes")
        require(self, "spectre", "in (0, 1]", lambda share: 0 < share <= 1, "rate", "most")
        require(self, "spectre", "above 0", lambda value: 0 < value < 1e6, "multiplier", "alpha")
        require(self, "spectre", "1 or more", lambda count: count >= 1, "steps", "least")
        some = "numbers from 1"
        require(self, "spectre", some, lambda ks: min(ks, default=0) >= 1, "dims")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and SPECTRE's."""

    spectre: Estimation = field(default_factory=Estimation)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, remove the rows of excess variance, train again."""
    course, labels = Course(view, settings, backend, **how), view.train.labels
    return course.by_features(lambda points: judge(points, labels, settings, backend))


def judge(
    points: Array, labels: NDArray[np.int64], settings: Settings, backend: Backend, *, seed: int = 0
) -> Segregation:
    """The suspects among features (N, D) with given labels (N,)."""
    del seed  # nothing is drawn
    chosen, xp, n = settings.spectre, backend.xp, len(labels)
    scores, means, dims = dict[int, NDArray[np.float64]](), dict[int, float](), dict[int, int]()
    expected = chosen.rate * n
    for label in np.unique(labels).tolist():
        ours = points[xp.asarray(np.flatnonzero(labels == label))]
        share = min(0.5, chosen.multiplier * expected / len(ours))
        best: Array = xp.zeros(len(ours))
        means[label], dims[label] = 0.0, 0
        for k in chosen.dims:
            if k > ours.shape[1] or len(ours) < chosen.least * k:
                continue
            projected, _ = principal(ours, k, xp)
            score = que(whitened(projected, share, chosen.steps, xp), chosen.alpha, xp)
            if float(score.mean()) > means[label]:
                means[label], dims[label], best = float(score.mean()), k, score
        scores[label] = np.asarray(backend.to_numpy(best), float)
    poisoned = max(means, key=lambda label: means[label])
    suspect, belief = np.zeros(n, bool), np.zeros(n)
    for label, score in scores.items():
        rows = np.flatnonzero(labels == label)
        belief[rows] = score
        if label != poisoned and chosen.classes == "highest":
            continue
        count = int(min(chosen.multiplier * expected, chosen.most * len(rows)))
        suspect[rows[np.argsort(-score, kind="stable")[:count]]] = True
    told = {"expected_rate": chosen.rate, "mean_score": means, "dims": dims}
    return verdict(suspect, belief, "spectre", told)


def whitened(points: Array, share: float, steps: int, xp: ModuleType) -> Array:
    """Rows (n, k) by robust mean and covariance, which leave out the `share` that lies far out."""
    k = points.shape[1]
    inner = max(k + 1, round((1 - share) * len(points)))
    kept: Array = slice(None)
    for _ in range(steps):
        mean = points[kept].mean(axis=0)
        off = points[kept] - mean
        values, axes = xp.linalg.eigh(off.T @ off / len(off))
        white = (points - mean) @ axes / xp.clip(values, values.max() * 1e-10, None) ** 0.5
        square = (white * white).sum(axis=1)
        kept = xp.argsort(square)[:inner]
    # the inner rows vary less than all would: their median is put where a normal's is
    usual = k * (1 - 2 / (9 * k)) ** 3  # the median of chi squared, Wilson and Hilferty
    middle = float(xp.sort(square)[len(square) // 2])
    return white * (usual / max(middle, np.finfo(float).tiny)) ** 0.5


def que(white: Array, alpha: float, xp: ModuleType) -> Array:
    """Quantum entropy scores of whitened rows (n, k): h' Q h / tr Q. (n,)"""
    k = white.shape[1]
    values, axes = xp.linalg.eigh(white.T @ white / len(white))
    excess = max(float(values.max()) - 1, np.finfo(np.float32).eps)
    weight = xp.exp(xp.clip(alpha * (values - 1) / excess, -50 * k, 50))
    return ((white @ axes) ** 2 @ weight) / weight.sum()
