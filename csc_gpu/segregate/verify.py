"""Stage 2: is a suspected label attacked, which of its groups is the poison, who belongs to it?

Three witnesses are heard, each for what it can tell:

- **the trigger**: the mean of a group's pixels less another's, added to images of other labels. If
  that sends them to the label, a pattern commands the label: it is attacked, whatever the labels of
  the rows. Two groups of one label may be poison and benign either way round; the pattern of poison
  works against the mean of all other labels, too. It tells labels and groups, no single rows, and
  knows only triggers that lie at one place (a patch, a blend, a wave). A trigger for the images of
  one label alone (TaCT) commands that label's images, and the check gives some of its rows that
  label;
- **the probe** (kin.py): rows whose features are like the core's;
- **the check**: a model trained without the candidates (exclusionary re-classification, from
  Activation Clustering, arXiv 1811.03728) predicts poison with a false label otherwise. How far it
  is to be trusted is read off controls, rows that nobody suspects and it did not see either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.segregate.court import (
    CORE,
    FEW,
    Case,
    Court,
    Group,
    narrow_trigger,
    opened,
    searched,
    turned_back,
)
from csc_gpu.segregate.settings import Settings
from csc_gpu.types import Mask, Reclassified, Sighting, Transfer, Witness

MOST_LEFT_OUT = 0.5
"""Candidates beyond the core are left out only if this share of all rows stays to train on."""
TRUSTED = 0.9
"""Share of poison among rows from which they are kept."""
UNEXPLAINED = 0.8
"""Share of poison, by a sure check, from which a core is poison that no trigger explains: a kind of
benign rows that was left out as a whole comes out otherwise as well, but seldom so many of it."""
UNSURE = 0.2
"""A model wrong on more than this share of the controls says nothing about single rows."""
LARGE = 1 / 3
"""Share of a label from which left-out rows may be benign ones that the check has no idea of."""
BEYOND_CHANCE = 2.0
"""A label is no source that gets less than so many times what an even choice would give it."""
CONTRADICTED = 0.5
"""Poison with a false label: the check contradicts so many of its candidates, at least."""
SCATTERED = 0.5
"""Poison with a false label comes from many: its true labels are as many, in perplexity, as this
share of all others at least. Benign rows that a check never saw are taken for a few like them."""


@dataclass(frozen=True)
class Verdict:
    """What verification ends with."""

    suspect: Mask  # (N,)
    belief: NDArray[np.float32]  # (N,) 0..1
    notes: dict[str, Any]
    checks: tuple[Reclassified, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    proved: tuple[
        int, ...
    ] = ()  # labels that a trigger commands and whose rows the check contradicts


def verify(
    core: Mask,
    share: NDArray[np.float32],
    sightings: Sequence[Sighting],
    labels: NDArray[np.int64],
    settings: Settings,
    backend: Backend,
    witness: Witness | None,
) -> Verdict:
    """Hear the witnesses about every suspected label; without any, the core is the verdict.

    Labels are suspected for their core, or because a pattern of their strays or halves commands
    them. share (N,) is how far stage 1 believes in each row.
    """
    live = suspected_labels(labels, core, settings)
    core = core & np.isin(labels, live)
    notes: dict[str, Any] = {"suspected_labels": live, "verified": witness is not None}
    if witness is None:
        return Verdict(core, share, notes | {"cleared_labels": [], "labels": []})
    court = Court(labels, sightings, witness.points(), witness, settings, backend)
    groups, limits = searched(court)
    best = {y: max((g.commands for g in tried), default=0.0) for y, tried in groups.items()}
    notes["commands"] = [round(share, 3) for share in best.values()]  # of every label
    for label in live:
        groups[label].insert(0, court.core(label, core))
    cases = []
    for label, tried in groups.items():
        triggers = [court.trigger(label, group, limits[label]) for group in tried]
        narrow = narrow_trigger(court.narrow, label, court.apart)
        if label in live or any(triggers) or narrow:
            cases.append(opened(court, label, tried, triggers, limits[label], narrow))
    notes["suspected_labels"] = [case.label for case in cases]
    if not cases:
        notes |= {"cleared_labels": [], "labels": []}
        return Verdict(core, share, notes, (), tuple(court.answers))
    hearings, checks = heard(court, cases, witness)
    suspect, belief, cleared, proved = np.zeros(len(labels), bool), share, [], []
    for case, check in hearings:
        case.told["scattered"] = round(scattered(case, check, labels), 3)
        word = judge(case, labels, check, settings)
        if word is None:
            cleared.append(case.label)
            continue
        known = court.coherent(case.label, word.poison)
        rows = known.rows | (firm_rows(court, case, word) & ~word.confirmed)
        case.told["flagged"] = int(rows.sum())
        proved += [case.label] if case.is_commanded and word.confirmed.any() else []
        suspect = suspect | rows
        belief = np.where(labels == case.label, known.belief, belief).astype(np.float32)
    notes |= {"cleared_labels": cleared, "labels": [case.told for case, _ in hearings]}
    return Verdict(suspect, belief, notes, checks, tuple(court.answers), tuple(proved))


def heard(
    court: Court, cases: list[Case], witness: Witness
) -> tuple[list[tuple[Case, Reclassified]], tuple[Reclassified, ...]]:
    """Each case with the check that speaks about it, and all checks.

    Where a group was turned round, the candidates that the check contradicts may be benign rows
    that it never saw. Then a second check learns from these and not from the others; the way round
    counts whose candidates get more labels, if they are contradicted as well.
    """
    check = witness.reclassify(left_out(cases))
    others = {
        case.label: turned_back(court, case, case.turned)
        for case in cases
        if case.turned and is_doubtful(case, case.turned, check, court.labels)
    }
    if not others:
        return [(case, check) for case in cases], (check,)
    second = witness.reclassify(left_out([others.get(case.label, case) for case in cases]))
    found = []
    for case in cases:
        ways = [(case, check)]
        if case.label in others:
            back = others[case.label]
            told = [
                [round(said(*way, court.labels), 3) for said in (contradicted, scattered)]
                for way in ((case, check), (back, second))
            ]
            case.told["ways"] = back.told["ways"] = told
            if contradicted(back, second, court.labels) >= CONTRADICTED:
                ways.append((back, second))
        found.append(max(ways, key=lambda way: scattered(way[0], way[1], court.labels)))
    return found, (check, second)


def left_out(cases: list[Case]) -> Mask:
    """What a check does not learn from: all candidates, or the poison alone if they are most."""
    candidates: Mask = np.logical_or.reduce([case.candidates for case in cases])
    if candidates.mean() > MOST_LEFT_OUT:
        poison: Mask = np.logical_or.reduce([case.poison for case in cases])
        return poison
    return candidates


def scattered(case: Case, check: Reclassified, labels: NDArray[np.int64]) -> float:
    """How many labels a check gives the candidates that it contradicts, of all others. 0..1

    As perplexity: evenly many labels, not those that a few rows get.
    """
    told = check.predicted[case.candidates & (check.predicted != labels)]
    others = len(np.unique(labels)) - 1
    if not (len(told) and others):
        return 0.0
    share = np.bincount(told) / len(told)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) / others


def is_doubtful(case: Case, turned: Group, check: Reclassified, labels: NDArray[np.int64]) -> bool:
    """Whether a group that was turned round may have been right as it was.

    A core is an island, and turned round it is the label's home that is called poison. Nothing
    speaks for strays or halves unless they command alone as well; else they may be rows with a
    false label. And they may not if many labels are told.
    """
    if contradicted(case, check, labels) < CONTRADICTED:
        return False
    if turned.kind == CORE:
        return True
    return turned.alone[1] >= case.limits.known and scattered(case, check, labels) < SCATTERED


def contradicted(case: Case, check: Reclassified, labels: NDArray[np.int64]) -> float:
    """Share of the candidates that a check gives another label. 0..1"""
    return float((check.predicted != labels)[case.candidates].mean())


def firm_rows(court: Court, case: Case, word: Word) -> Mask:
    """The rows that need not be known again by a probe: a trigger explains them. (N,)

    Those that the check has added must command the label by a pattern of their own: a false label
    alone, as label noise has it, is no poison.
    """
    added = word.poison & ~case.poison
    if not (case.is_commanded and added.any()):
        return case.firm
    rest = (court.labels == case.label) & ~word.poison
    commands = court.commands(case.label, added, rest)
    case.told["added"] = [int(added.sum()), round(commands, 3)]
    return case.firm | (added & (commands >= case.limits.known))


@dataclass(frozen=True)
class Word:
    """What the check says of a suspected label."""

    poison: Mask  # (N,) rows held to be its poison
    confirmed: Mask  # (N,) rows rightly labelled, as far as a check that is to be trusted can tell


def judge(
    case: Case, labels: NDArray[np.int64], check: Reclassified, settings: Settings
) -> Word | None:
    """What the check says of a label; None if it is cleared.

    If a share `differs` of a group is predicted otherwise, and a share `wrong` of unseen benign
    rows is, the group's share of poison is (differs - wrong) / (1 - wrong), were all poison to
    differ. Of the differing rows, poison / differs are then poison: enough, and they are kept.
    Rows that command the label must do so surely, and stand as they are, where the check is unsure,
    where it contradicts even most rows of the label that it learnt from, where it confirms their
    label (poison with a true one), or where they were turned round and neither way they are taken
    for many labels. Strays, a mixture, do not stand against a check that is sure. Rows that do not
    command need a check that knows the label, and more of poison if it is sure. With so few labels
    that nobody knows what is usual, a trigger that is not sure speaks for a label of two kinds.
    """
    ours = labels == case.label
    differs = check.predicted != labels
    usual = wrong_on(check.controls, differs)
    wrong = max(usual, wrong_on(check.controls & ours, differs, usual, settings.min_rows))

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
    case.told["checked"] = [int(group.sum()) for group in groups]
    case.told["poison_share"] = [round(poison_share(group), 4) for group in groups]
    is_sure = wrong <= UNSURE
    knows_label = groups[-1].any() and differs[groups[-1]].mean() < 0.5
    is_sure_trigger = case.is_commanded and case.commands >= case.limits.sure
    if len(np.unique(labels)) <= FEW and case.is_commanded and not is_sure_trigger:
        return None
    is_odd = case.is_disputed and scattered(case, check, labels) < SCATTERED
    as_it_is = Word(case.poison, np.zeros_like(ours))
    can_tell = is_sure and knows_label and (false_label or case.is_mixture)
    if case.is_commanded and (is_odd or not can_tell):
        return as_it_is if is_sure_trigger else None
    if case.source is not None and is_from_elsewhere(case, check, labels):
        return None
    if not case.is_commanded and may_be_unseen(case, check, labels):
        return None
    if not case.is_commanded:
        least = UNEXPLAINED if is_sure else 0.5
        if not knows_label or poison_share(case.poison) < least:
            return None
        if not is_sure:
            return as_it_is
    poison = case.firm & differs if case.is_mixture else case.firm
    for group in groups:
        share = poison_share(group)
        if share > 0 and share >= TRUSTED * float(differs[group].mean()):
            poison = poison | (group & differs)
    return Word(poison, ours & ~differs) if poison.any() else as_it_is


def is_from_elsewhere(case: Case, check: Reclassified, labels: NDArray[np.int64]) -> bool:
    """Whether too few of the rows that the check contradicts are of the one label they command.

    Not each must be: covers teach the check to give the trigger their labels. A benign kind that
    it never saw is taken for several labels, and no more for that one than for others.
    """
    told = check.predicted[case.poison & (check.predicted != labels)]
    chance = 1 / max(1, len(np.unique(labels)) - 1)
    least = min(1.0, max(case.of_source, BEYOND_CHANCE * chance))
    return len(told) == 0 or bool((told == case.source).mean() < least)


def may_be_unseen(case: Case, check: Reclassified, labels: NDArray[np.int64]) -> bool:
    """Whether rows that nothing but the check speaks against may be benign ones it never saw.

    Such are a large part of their label, and the check takes them for the few labels like them.
    """
    share = case.candidates.sum() / (labels == case.label).sum()
    is_large = case.source is None and share > LARGE
    return bool(is_large and scattered(case, check, labels) < SCATTERED)


def suspected_labels(labels: NDArray[np.int64], core: Mask, settings: Settings) -> list[int]:
    """Labels with enough rows of the core to be no accident: a tenth of what the first has."""
    held = np.bincount(labels[core], minlength=1)
    enough = max(settings.min_rows, settings.label_share * held.max())
    return [int(label) for label in np.flatnonzero(held >= enough)]


def wrong_on(rows: Mask, differs: Mask, usual: float = 0.5, weight: float = 2.0) -> float:
    """Share of these rows that differ, as if so many more had been seen, of which the usual share
    differed (at first one of two, Laplace's rule). 0..1"""
    return (int((differs & rows).sum()) + usual * weight) / (int(rows.sum()) + weight)
