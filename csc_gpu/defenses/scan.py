"""SCAn, Statistical Contamination Analyzer (Tang, Wang, Tang, Zhang; USENIX Security 2021).

A feature is its class's mean plus a variation that all classes share; means and variation have
covariances S_u and S_e, estimated by EM on clean rows. Of each label two groups with means of their
own, and one group, are fitted under S_e (a 2-means in the metric of S_e); J is how much better two
fit. A label whose J lies far above the median of all labels, in units of their median absolute
deviation, is contaminated; its smaller group is removed, and a net trained on the rest.

Ours: features are first reduced, for few clean rows do not determine S_e of 512 dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import csc
from csc_gpu.backend import Backend
from csc_gpu.components import axes
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.defenses.outlying import deviations
from csc_gpu.segregate.clusters import own_order
from csc_gpu.types import Array, DefenderView, Outcome, Segregation

Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """How contamination is told."""

    index: float = 7.389
    """Anomaly index from which a label counts as contaminated: e squared."""
    dims: int = 32
    """Principal components that are analysed."""
    rounds: int = 50
    """Rounds of EM for the two covariances."""
    ridge: float = 1e-3
    """Added to S_e, in units of its mean variance."""
    tries: int = 10
    """Beginnings of the 2-means, of which the best counts."""
    least: int = 10
    """A label with fewer rows is not looked at."""

    def __post_init__(self) -> None:
        require(self, "scan", "above 0", lambda value: 0 < value < 1e6, "index", "ridge")
        counts = ("dims", "rounds", "tries")
        require(self, "scan", "1 or more", lambda count: count >= 1, *counts)
        require(self, "scan", "4 or more", lambda count: count >= 4, "least")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and SCAn's."""

    scan: Analysis = field(default_factory=Analysis)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, remove what contaminates a label, train again."""
    course = Course(view, settings, backend, **how)
    clean = course.reserve
    model = course.trained()
    points, known = course.features(model), course.features(model, clean)
    with course.clock("judge"):
        labels = view.train.labels
        found = analysed(points, labels, known, clean.labels, settings, backend, course.seed)
    return course.filtered(model, found)


def analysed(
    points: Array,
    labels: Labels,
    clean: Array,
    clean_labels: Labels,
    settings: Settings,
    backend: Backend,
    seed: int,
) -> Segregation:
    """Suspects among rows (N, D), by covariances of clean rows (R, D)."""
    chosen, xp = settings.scan, backend.xp
    centre, turn = axes(points, chosen.dims, xp)
    points, clean = (points.astype(xp.float64) - centre) @ turn, (clean - centre) @ turn
    of_means, within = covariances(clean, clean_labels, chosen, backend)
    k = len(within)
    within = within + chosen.ridge * float(within.trace()) / k * xp.eye(k)
    values, turned = xp.linalg.eigh(within)
    white = turned / values**0.5  # x @ white has the identity for S_e
    present = [y for y in np.unique(labels) if (labels == y).sum() >= chosen.least]
    groups = {}
    for label in present:
        rows = np.flatnonzero(labels == label)
        ours = points[xp.asarray(rows)]
        order = own_order(
            xp.ascontiguousarray(ours.astype(xp.float32)), xp.zeros(len(rows), xp.int64), xp
        )
        rows, ours = rows[backend.to_numpy(order)], ours[order]
        groups[label] = rows, *_two_groups(ours, of_means, within, white, chosen, backend, seed)
    gains = np.array([groups[label][2] for label in present])
    index = deviations(gains)  # J far above the others'
    suspect, belief = np.zeros(len(labels), bool), np.zeros(len(labels))
    for label, anomaly in zip(present, index, strict=True):
        rows, in_smaller, _, side = groups[label]
        suspect[rows[in_smaller]] = anomaly > chosen.index
        belief[rows] = max(0.0, float(anomaly)) * side
    told = {int(label): round(float(i), 3) for label, i in zip(present, index, strict=True)}
    return verdict(suspect, belief, "scan", {"anomaly_index": told})


def covariances(
    points: Array, labels: Labels, chosen: Analysis, backend: Backend
) -> tuple[Array, Array]:
    """S_u of the class means and S_e within classes, by EM on clean rows. (k, k) each"""
    xp = backend.xp
    classes = np.unique(labels)
    rows = [xp.asarray(np.flatnonzero(labels == label)) for label in classes]
    means = xp.stack([points[mine].mean(axis=0) for mine in rows])  # (C, k)
    counts = [len(mine) for mine in rows]
    guess = means
    for _ in range(chosen.rounds):
        of_means, within = _spread(guess, xp), _within(points, rows, guess, xp)
        new = xp.stack(
            [shrunk(m, n, of_means, within, xp) for m, n in zip(means, counts, strict=True)]
        )
        moved = float(abs(new - guess).max())
        guess = new
        if moved < np.finfo(np.float32).eps * float(abs(means).max()):
            break
    return _spread(guess, xp), _within(points, rows, guess, xp)


def shrunk(mean: Array, n: int, of_means: Array, within: Array, xp: ModuleType) -> Array:
    """Where the class's true mean is expected, given that of n of its rows. (k,)"""
    return of_means @ xp.linalg.pinv(of_means + within / n) @ mean


def _spread(means: Array, xp: ModuleType) -> Array:
    del xp
    return means.T @ means / len(means)


def _within(points: Array, rows: list[Array], means: Array, xp: ModuleType) -> Array:
    total = xp.zeros((points.shape[1], points.shape[1]))
    for mine, mean in zip(rows, means, strict=True):
        off = points[mine] - mean
        total += off.T @ off
    return total / sum(len(mine) for mine in rows)


def _two_groups(
    points: Array,
    of_means: Array,
    within: Array,
    white: Array,
    chosen: Analysis,
    backend: Backend,
    seed: int,
) -> tuple[NDArray[np.bool_], float, NDArray[np.float64]]:
    """Which rows (n, k) are in the smaller group, J, and how near each is to it, 0..1."""
    xp = backend.xp
    ours = points @ white
    parts = xp.ascontiguousarray(ours.astype(xp.float32))
    second = backend.kmeans(parts, 2, seed=seed, tries=chosen.tries) == 1
    count = int(second.sum())
    if not 0 < count < len(ours):
        return np.zeros(len(ours), bool), 0.0, np.zeros(len(ours))
    if 2 * count > len(ours):
        second = ~second
    one = shrunk(points.mean(axis=0), len(points), of_means, within, xp) @ white
    means = [ours[mine].mean(axis=0) for mine in (~second, second)]
    off = [((ours - mean) ** 2).sum(axis=1) for mean in (one, *means)]
    gain = float((off[0] - xp.where(second, off[2], off[1])).mean())
    near = off[1] ** 0.5 / (off[1] ** 0.5 + off[2] ** 0.5)
    return (
        np.asarray(backend.to_numpy(second), bool),
        gain,
        np.asarray(backend.to_numpy(near), float),
    )
