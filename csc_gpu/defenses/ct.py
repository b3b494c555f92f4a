"""Confusion Training (Qi, Xie, Wang, Mittal, Wu, Mahloujifar, USENIX Security 2023, 2205.13616).

A net is trained on clean images with wrong labels and, less often, on suspect rows with the labels
they came with. Wrong is any label but that which the undefended net gives, trained as every defense
begins, in all rounds the same. It unlearns what clean images look like; a trigger, which no wrong
label ever contradicts, stays. So the rows that the confused net still fits are distilled, ever
fewer, round after round. In the end a class is told poisoned if two Gaussians, one of the rows that
are fitted and one of the others, say its features better than one alone; its fitted rows are
removed.

The numbers are those of the authors' code for CIFAR-10. Of other make here: the exact principal
axes of a class for a random sketch; the ridge on the diagonal of a covariance alone; the first and
the last training are those of every defense, and without suspects there is no last; and what
confusion.py says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import csc
from csc_gpu.backend import Backend
from csc_gpu.components import principal
from csc_gpu.defenses.confusion import Confusion, confuse, fit
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.types import Array, DefenderView, Mask, Outcome, Segregation

AXES = 2
"""Dimensions in which a class is looked at."""
FEWEST = 2
"""Rows that a Gaussian needs."""


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and those of the rounds."""

    ct: Confusion = field(default_factory=Confusion)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Distil the poison by confusion, test every class, train on what is left."""
    course, chosen = Course(view, settings, backend, **how), settings.ct
    _ = course.reserve  # before an hour is spent
    model = course.trained()
    rows, base = np.arange(len(view.train)), course.fresh()
    for number in range(len(chosen.kept) + 1):
        fit(base, rows, course, chosen, number)
        confused = confuse(base, model, rows, course, chosen, number)
        points = course.features(confused)
        told, losses = course.judged(confused, points)
        if number < len(chosen.kept):
            share, least = chosen.kept[number], chosen.least[number]
            rows = distilled(losses, view.train.labels, share, least)
    with course.clock("judge"):
        found = judge(points, view.train.labels, told, losses, settings, backend)
    return course.filtered(model, found)


def distilled(
    losses: NDArray[np.float32], labels: NDArray[np.int64], share: float, least: float
) -> NDArray[np.int64]:
    """The rows of the lowest losses (N,), and of every class at least its own lowest. (n,)"""
    order = np.argsort(losses, kind="stable")
    keep = np.zeros(len(losses), bool)
    keep[order[: int(share * len(losses))]] = True
    for label in np.unique(labels):
        ours = order[labels[order] == label]
        keep[ours[: int(least * len(ours))]] = True
    return np.flatnonzero(keep)


def judge(
    points: Array,
    labels: NDArray[np.int64],
    told: NDArray[np.int64],
    losses: NDArray[np.float32],
    settings: Settings,
    backend: Backend,
) -> Segregation:
    """The suspects, by the confused net's features (N, D), predictions (N,) and losses (N,)."""
    chosen, xp = settings.ct, backend.xp
    isolated, ratio = told == labels, np.zeros(int(labels.max()) + 1)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        plane, _ = principal(points[xp.asarray(rows)], AXES, xp)
        flat = np.asarray(backend.to_numpy(plane), np.float64)
        ratio[label] = log_ratio(flat, isolated[rows], chosen.ridge)
    poisoned = ratio > np.log(chosen.surely)
    poisoned |= (ratio == ratio.max()) & (ratio > np.log(chosen.likely))
    belief = isolated * ratio[labels] + np.exp(-losses)  # the second is in 0..1, and orders equals
    notes = {"log_likelihood_ratios": {str(label): round(r, 4) for label, r in enumerate(ratio)}}
    return verdict(isolated & poisoned[labels], belief, "ct", notes)


def log_ratio(points: NDArray[np.float64], isolated: Mask, ridge: float) -> float:
    """How much likelier a row (n, k) is, on average, if the isolated have a Gaussian of their own.

    The natural logarithm of it; 0 if on either side there are too few rows for a Gaussian.
    """
    if min(isolated.sum(), (~isolated).sum()) < FEWEST:
        return 0.0
    alone = log_likelihood(points, points[~isolated], ridge)
    apart = np.where(isolated, log_likelihood(points, points[isolated], ridge), alone)
    return float((apart - alone).mean())


def log_likelihood(
    points: NDArray[np.float64], of: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """The log density at points (n, k) of the Gaussian that fits others (m, k). (n,)"""
    k = points.shape[1]
    covariance = np.cov(of.T).reshape(k, k) + ridge * np.eye(k)
    away = points - of.mean(axis=0)
    distance = (away * np.linalg.solve(covariance, away.T).T).sum(axis=1)
    volume = np.linalg.slogdet(covariance).logabsdet
    density: NDArray[np.float64] = -0.5 * (distance + volume + k * np.log(2 * np.pi))
    return density
