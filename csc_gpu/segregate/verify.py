"""Stage 2: is a suspected label attacked, which of its groups is the poison, who belongs to it?

Three witnesses are heard, each for what it can tell:

- **the trigger**: the mean of a group's pixels less another's, added to images of other labels. If
  that sends them to the label, a pattern commands the label: it is attacked, whatever the labels of
  the rows. Two groups of one label may be poison and benign either way round; the pattern of poison
  works against the mean of all other labels, too. It tells labels and groups, no single rows, and
  knows only triggers that lie at one place (a patch, a blend, a wave);
- **the probe** (kin.py): rows whose features are like the core's;
- **the check**: a model trained without the candidates (exclusionary re-classification, from
  Activation Clustering, arXiv 1811.03728) predicts poison with a false label otherwise. How far it
  is to be trusted is read off controls, rows that nobody suspects and it did not see either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.segregate.clusters import home_of
from csc_gpu.segregate.kin import Kin, kin
from csc_gpu.segregate.settings import Settings
from csc_gpu.types import Array, Mask, Reclassified, Sighting, Transfer, Witness

OUTSIDE = 0.8
"""Share of a core that must lie outside its label's home at a scale for the home to be believed."""
MOST_LEFT_OUT = 0.5
"""Candidates beyond the core are left out only if this share of all rows stays to train on."""
TRUSTED = 0.9
"""Share of poison among rows from which they are kept."""
UNSURE = 0.2
"""A model wrong on more than this share of the controls says nothing about single rows."""
COMMANDS = 0.8
"""A pattern that sends this share of other labels' images to a label is a trigger."""


@dataclass(frozen=True)
class Verdict:
    """What verification ends with."""

    suspect: Mask  # (N,)
    belief: NDArray[np.float32]  # (N,) 0..1
    notes: dict[str, Any]
    checks: tuple[Reclassified, ...] = ()
    transfers: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Case:
    """A suspected label, before the check."""

    label: int
    poison: Mask  # (N,) rows held to be its poison
    candidates: Mask  # (N,) rows that the check should not learn from; the poison among them
    commanded: float  # largest share of other labels' images that a pattern of its groups commands
    told: dict[str, Any]

    @property
    def is_commanded(self) -> bool:
        """Whether a trigger was found."""
        return self.commanded >= COMMANDS

    @property
    def firm(self) -> Mask:
        """Rows that only a trigger explains: no check frees them. (N,)"""
        return self.poison & self.is_commanded


def verify(
    core: Mask,
    share: NDArray[np.float32],
    last: Sighting,
    labels: NDArray[np.int64],
    settings: Settings,
    backend: Backend,
    witness: Witness | None,
) -> Verdict:
    """Hear the witnesses about every suspected label; without any, the core is the verdict.

    share (N,) is how far stage 1 believes in each row.
    """
    live = suspected_labels(labels, core, settings)
    core = core & np.isin(labels, live)
    notes: dict[str, Any] = {"suspected_labels": live, "verified": witness is not None}
    if witness is None or not live:
        return Verdict(core, share, notes | {"cleared_labels": [], "labels": []})
    court = Court(labels, witness.points(), witness, backend)
    cases = [opened(court, y, core, last, settings) for y in live]
    left_out = np.logical_or.reduce([case.candidates for case in cases])
    if left_out.mean() > MOST_LEFT_OUT:
        left_out = np.logical_or.reduce([case.poison for case in cases])
    check = witness.reclassify(left_out)
    suspect, belief, cleared = np.zeros(len(labels), bool), share, []
    for case in cases:
        held = judge(case, labels, check, settings)
        if held is None:
            cleared.append(case.label)
            continue
        rows = court.kin(case.label, held, case.firm)
        case.told["flagged"] = int(rows.rows.sum())
        suspect, belief = suspect | rows.rows, np.maximum(belief, rows.belief)
    notes |= {"cleared_labels": cleared, "labels": [case.told for case in cases]}
    return Verdict(suspect, belief, notes, (check,), tuple(court.answers))


class Court:
    """The labels and the witnesses; what the images were asked is written down."""

    def __init__(
        self, labels: NDArray[np.int64], points: Array, witness: Witness, backend: Backend
    ) -> None:
        self.labels = labels  # (N,)
        self.answers: list[Transfer] = []
        self.backend = backend
        self._points, self._witness = points, witness

    def commands(self, label: int, group: Mask, rest: Mask) -> float:
        """Share of other labels' images that get the label with the pattern of a group."""
        if not (group.any() and rest.any()):
            return 0.0
        share = self._witness.transfers(group, rest, label)
        self.answers.append(Transfer(label, group, rest, share))
        return share

    def kin(self, label: int, core: Mask, firm: Mask) -> Kin:
        """The rows of the label that belong to this core; firm rows stay."""
        return kin(self._points, self.labels, label, core, firm, self.backend)


def opened(court: Court, label: int, core: Mask, last: Sighting, settings: Settings) -> Case:
    """Which of a label's groups is its poison, whether it commands the label, and its kin."""
    ours, others = court.labels == label, court.labels != label
    island = core & ours
    outside = candidates(last, court.labels, core, label, court.backend)
    home = ours & ~outside
    if home.sum() < settings.min_rows:
        home = ours & ~island
    forth, back = court.commands(label, island, home), court.commands(label, home, island)
    alone = court.commands(label, island, others), court.commands(label, home, others)
    commanded, poison, away = max(forth, back), island, outside
    swapped = commanded >= COMMANDS and alone[1] > alone[0]
    if swapped:
        poison, away = home, ours & ~island
    if commanded >= COMMANDS:
        poison = court.kin(label, poison, poison).rows
    told = {
        "label": label,
        "core": int(island.sum()),
        "home": int(home.sum()),
        "commands": [round(share, 3) for share in (forth, back, *alone)],
        "home_is_poison": swapped,
        "grown": int(poison.sum()),
    }
    return Case(label, poison, poison | away, commanded, told)


def judge(
    case: Case, labels: NDArray[np.int64], check: Reclassified, settings: Settings
) -> Mask | None:
    """The rows of a label held to be poison after the check; None if the label is cleared.

    If a share `differs` of a group is predicted otherwise, and a share `wrong` of unseen benign
    rows is, the group's share of poison is (differs - wrong) / (1 - wrong), were all poison to
    differ. Of the differing rows, poison / differs are then poison: enough, and they are kept.
    Where the check is unsure, or confirms the label of rows on which a trigger was found (poison
    with a true label), the rows stand as they are.
    """
    ours = labels == case.label
    differs = check.predicted != labels
    wrong = wrong_on(check.controls, differs)
    own = check.controls & ours
    if own.sum() >= settings.min_rows:
        wrong = max(wrong, wrong_on(own, differs))

    def poison_share(group: Mask) -> float:
        share = float(differs[group].mean()) if group.any() else 0.0
        return max(0.0, (share - wrong) / (1 - wrong))

    groups = (
        case.poison,
        check.candidates & ours & ~case.poison,
        ours & ~check.candidates & ~check.controls,
    )
    false_label = poison_share(case.poison) >= 0.5
    case.told["wrong_on_controls"] = round(wrong, 4)
    case.told["rows"] = [int(group.sum()) for group in groups]
    case.told["poison_share"] = [round(poison_share(group), 4) for group in groups]
    if not false_label and not case.is_commanded:
        return None
    if wrong > UNSURE or not false_label:
        return case.poison
    poison = case.firm
    for group in groups:
        share = poison_share(group)
        if share > 0 and share >= TRUSTED * float(differs[group].mean()):
            poison = poison | (group & differs)
    return poison


def suspected_labels(labels: NDArray[np.int64], core: Mask, settings: Settings) -> list[int]:
    """Labels that hold a tenth of the core and enough rows of it to be no accident."""
    held = np.bincount(labels[core])
    enough = max(settings.min_rows, settings.label_share * core.sum())
    return [int(label) for label in np.flatnonzero(held >= enough)]


def candidates(
    last: Sighting, labels: NDArray[np.int64], core: Mask, label: int, backend: Backend
) -> Mask:
    """The core of a label and all its rows that are not at home, noise included. (N,) bool

    Home is looked up at the coarsest scale at which the core still lies outside it.
    """
    xp, ours = backend.xp, labels == label
    mine: Mask = core & ours
    for clusters in reversed(last.clusterings):
        home = int(home_of(clusters, xp)[label])
        if home < 0:
            continue
        away = _unpacked(xp.packbits(clusters.of_row != home), len(labels), backend)
        if away[mine].mean() >= OUTSIDE:
            outside: Mask = mine | (ours & away)
            return outside
    return mine


def _unpacked(bits: Array, n: int, backend: Backend) -> Mask:
    """n bits, eight to a byte on the device, as a mask on the host. (n,)"""
    return np.unpackbits(backend.to_numpy(bits).astype(np.uint8), count=n).astype(bool)


def wrong_on(rows: Mask, differs: Mask) -> float:
    """Share of these rows that differ, as if one more had and one had not (Laplace). 0..1"""
    return (int((differs & rows).sum()) + 1) / (int(rows.sum()) + 2)
