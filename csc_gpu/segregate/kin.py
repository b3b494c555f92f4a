"""From some rows of poison to their kin: a linear probe that is asked about rows it did not see.

A label's core is some of its poison, the rest of the label is unlabelled: learning from positive
and unlabelled rows (Elkan and Noto, KDD 2008). A logistic probe parts the core from all else; a row
counts as poison if its probability, divided by what certain poison gets, is above a half. Every
probability comes from a probe that was fitted without that row, so that a wrong row in the core
does not vouch for itself. Repeated until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.segregate.clusters import own_order
from csc_gpu.types import Array, Mask

FOLDS = 5
OTHERS = 2000
"""Rows of other labels that the probe sees, at most."""
ROUNDS = 30
"""In each the core may grow by the rows that the last one has made likely."""
COST = 1.0
"""Weight of the loss against half the squared weights (C of scikit-learn's LogisticRegression)."""
NEWTON_STEPS = 25
HALVINGS = 12
REACHED = 0.9
"""Quantile of the chances in a mixed group that speaks for the poison in it."""
KNOWN = 0.3
"""Rows that get less than this from the probe are not known again,"""
LIFT = 3.0
"""unless they are few, and it is so many times their share of the label."""
SMALL = 1e-6
"""A Newton step that moves no weight further than this is the last."""


@dataclass(frozen=True)
class Kin:
    """The rows that the probe calls poison, and how likely it finds each row of the label."""

    rows: Mask  # (N,)
    belief: NDArray[np.float32]  # (N,) 0..1, the probe's chance; 0 for rows of other labels


def kin(
    points: Array, labels: NDArray[np.int64], label: int, core: Mask, most: float, backend: Backend
) -> Mask:
    """The core (N,) of a label and the rows of the label like it, by their features (N, D). (N,)

    A core that the probe does not know again has no kin, nor one that would take more than `most`
    of its label: then it is like all of it.
    """
    ours = labels == label
    probe = Probe(points, labels, ours, backend)
    found = core
    for _ in range(ROUNDS):
        few = LIFT * float(found.sum() / ours.sum())
        named = core | (ours & probe.like(found, min(KNOWN, few)))
        if (named == found).all():
            break
        found = named
    return found if found.sum() <= most * ours.sum() else core


def coherent(
    points: Array, labels: NDArray[np.int64], label: int, group: Mask, backend: Backend
) -> Kin:
    """The rows of a mixed group (N,) of a label that the probe knows again as its own.

    What it parts from the rest of the label is what most of the group has in common; nothing is
    added.
    """
    probe = Probe(points, labels, labels == label, backend)
    found = group
    for _ in range(ROUNDS):
        named = group & probe.like(found, KNOWN, REACHED)
        if (named == found).all():
            break
        found = named
    return Kin(found, probe.chance(found))


class Probe:
    """Asked which rows are like some, it answers for each from a fit that did not see the row.

    It sees all rows of the label and an even share of the others, in an order of their own.
    """

    def __init__(
        self, points: Array, labels: NDArray[np.int64], ours: Mask, backend: Backend
    ) -> None:
        self._asked = _asked(points, labels, ours, backend)  # rows of the corpus
        self._n, self._ours = len(labels), ours
        z = backend.tensor(points[backend.xp.asarray(self._asked)]).double()
        z = z / z.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self._z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)

    def chance(self, positive: Mask) -> NDArray[np.float32]:
        """How likely each row of the label is one of these (N,); 0 for other rows. (N,) 0..1"""
        found = np.zeros(self._n, np.float32)
        if positive.sum() >= FOLDS:
            found[self._asked] = unseen(self._z, positive[self._asked])
        return np.where(self._ours, found, np.float32(0))

    def like(self, positive: Mask, least: float, quantile: float | None = None) -> Mask:
        """Rows with at least half the chance that the positive ones have, on average. (N,)

        Or at a quantile, where a good part of them may be wrong. They alone, if theirs is below
        `least`.
        """
        chance = self.chance(positive)
        known = chance[positive] if positive.any() else np.zeros(1, np.float32)
        usual = float(known.mean() if quantile is None else np.quantile(known, quantile))
        return chance > 0.5 * usual if usual >= least else positive


def halves(points: Array, ours: Mask, backend: Backend) -> tuple[Mask, Mask]:
    """A label's rows parted in two by their features: the smaller part and the larger, (N,) each.

    2-means, begun with the two sides of the first principal axis, so that no chance is in it.
    """
    z = _unit(points, ours, backend)
    z = z - z.mean(dim=0)
    axis = torch.linalg.eigh(z.T @ z)[1][:, -1]
    side = z @ axis > 0
    for _ in range(ROUNDS):
        if not 0 < int(side.sum()) < len(side):
            break
        one, other = z[side].mean(dim=0), z[~side].mean(dim=0)
        now = ((z - one) ** 2).sum(dim=1) < ((z - other) ** 2).sum(dim=1)
        if bool((now == side).all()):
            break
        side = now
    part = np.zeros(len(ours), bool)
    part[ours] = side.cpu().numpy()
    return (part, ours & ~part) if 2 * part.sum() <= ours.sum() else (ours & ~part, part)


def apart(points: Array, one: Mask, other: Mask, backend: Backend) -> float:
    """How far two groups (N,) lie apart by their features (N, D): the distance of their means over
    the deviation of their rows along the line through them."""
    z, w = (_unit(points, group, backend) for group in (one, other))
    line = z.mean(dim=0) - w.mean(dim=0)
    distance = line.norm().clamp_min(1e-12)
    variance = (z @ line / distance).var(correction=0) + (w @ line / distance).var(correction=0)
    return float(distance / (variance / 2).sqrt().clamp_min(1e-12))


def _unit(points: Array, rows: Mask, backend: Backend) -> torch.Tensor:
    """These rows (N,) of features (N, D), scaled to length 1. (n, D) float64"""
    z = backend.tensor(points[backend.xp.asarray(np.flatnonzero(rows))]).double()
    return torch.nn.functional.normalize(z, dim=1)


def _asked(
    points: Array, labels: NDArray[np.int64], ours: Mask, backend: Backend
) -> NDArray[np.int64]:
    """All rows of the label and an even share of the others; the order is the rows' own."""
    xp = backend.xp
    order = backend.to_numpy(own_order(points, xp.asarray(labels), xp)).astype(np.int64)
    others = order[~ours[order]]
    kept = np.zeros(len(ours), bool)
    kept[others[np.linspace(0, len(others) - 1, min(len(others), OTHERS)).astype(int)]] = True
    return order[ours[order] | kept[order]]


def unseen(z: torch.Tensor, positive: Mask) -> NDArray[np.float64]:
    """For each row of z (N, D) the chance that it is positive, by a probe fitted without it. (N,)

    The rows of each kind are dealt out in turn, so that every fold has its share of both.
    """
    fold = np.empty(len(positive), np.int64)
    for kind in (positive, ~positive):
        fold[kind] = np.arange(kind.sum()) % FOLDS
    wanted = torch.from_numpy(positive).to(z)
    chance = torch.zeros_like(wanted)
    for number in range(FOLDS):
        out = torch.from_numpy(fold == number).to(z.device)
        chance[out] = torch.sigmoid(z[out] @ logistic(z[~out], wanted[~out]))
    result: NDArray[np.float64] = chance.cpu().numpy()
    return result


def logistic(z: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Weights (D,) of a logistic regression of `wanted` (N,) 0 or 1 on z (N, D), by Newton.

    The last column is the constant; it is not held small. A step that does not help is halved, and
    if no part of it helps the weights stay.
    """
    held = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
    held[-1] = SMALL

    def loss(weights: torch.Tensor) -> torch.Tensor:
        score = z @ weights
        fit = torch.nn.functional.binary_cross_entropy_with_logits(score, wanted, reduction="sum")
        return COST * fit + 0.5 * (held * weights**2).sum()

    weights = torch.zeros(z.shape[1], dtype=z.dtype, device=z.device)
    best = loss(weights)
    for _ in range(NEWTON_STEPS):
        chance = torch.sigmoid(z @ weights)
        slope = COST * (z.T @ (chance - wanted)) + held * weights
        bend = COST * (z.T @ (z * (chance * (1 - chance))[:, None])) + torch.diag(held)
        step = torch.linalg.solve(bend, slope)
        for _ in range(HALVINGS):
            now = loss(weights - step)
            if now <= best:
                break
            step = step / 2
        else:
            break
        weights, best = weights - step, now
        if step.abs().max() < SMALL:
            break
    return weights
