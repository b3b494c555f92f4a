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
    Case,
    Court,
    Group,
    narrow_trigger,
    opened,
    searched,
    turned_back,
)
from csc_gpu.segregate.settings import Settings
from csc_gpu.segregate.testimony import Testimony, Word, judge
from csc_gpu.types import Mask, Reclassified, Sighting, Transfer, Witness

MOST_LEFT_OUT = 0.5
"""Candidates beyond the core are left out only if this share of all rows stays to train on."""
CONTRADICTED = 0.5
"""Poison with a false label: the check contradicts so many of its candidates, at least."""
CLEARLY = 1.5
"""Of two ways round that both come from few labels one comes from more if from so many times as
many."""


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
            cases += opened(court, label, tried, triggers, limits[label], narrow)
    notes["suspected_labels"] = list(dict.fromkeys(case.label for case in cases))
    if not cases:
        notes |= {"cleared_labels": [], "labels": []}
        return Verdict(core, share, notes, (), tuple(court.answers))
    hearings, checks = heard(court, cases, witness, settings)
    suspect, beliefs, proved = np.zeros(len(labels), bool), dict[int, Any](), []
    for said in hearings:
        case = said.case
        case.told.update(said.notes())
        word = judge(said)
        if word is None:
            continue
        known = court.coherent(case.label, word.poison)
        rows = known.rows | (firm_rows(court, case, word) & ~word.confirmed)
        case.told["flagged"] = int(rows.sum())
        proved += [case.label] if case.is_commanded and word.confirmed.any() else []
        suspect = suspect | rows
        beliefs[case.label] = np.maximum(known.belief, beliefs.get(case.label, 0.0))
    belief = share.copy()
    for label, believed in beliefs.items():
        belief = np.where(labels == label, believed, belief).astype(np.float32)
    notes["cleared_labels"] = [y for y in notes["suspected_labels"] if y not in beliefs]
    notes["labels"] = [said.case.told for said in hearings]
    return Verdict(suspect, belief, notes, checks, tuple(court.answers), tuple(proved))


def heard(
    court: Court, cases: list[Case], witness: Witness, settings: Settings
) -> tuple[list[Testimony], tuple[Reclassified, ...]]:
    """What the checks say of each case, and the checks.

    Where a group was turned round, the candidates that the check contradicts may be benign rows
    that it never saw. Then a second check learns from these and not from the others.
    """

    def asked(ways: list[Case]) -> list[Testimony]:
        check = witness.reclassify(left_out(ways))
        known = court.labels, settings.min_rows, settings.max_label_share
        return [Testimony(way, check, *known) for way in ways]

    first = asked(cases)
    back = [the_other_way(court, said) for said in first]
    if not any(back):
        return first, (first[0].check,)
    second = asked([other or case for other, case in zip(back, cases, strict=True)])
    found = []
    for other, *ways in zip(back, first, second, strict=True):
        found.append(better(*ways) if other else ways[0])
    return found, (first[0].check, second[0].check)


def the_other_way(court: Court, said: Testimony) -> Case | None:
    """The case turned back, if its group was turned round and may have been right before."""
    turned = said.case.turned
    return turned_back(court, said.case, turned) if turned and is_doubtful(said, turned) else None


def better(there: Testimony, back: Testimony) -> Testimony:
    """Of the two ways round the one whose candidates come from more labels.

    Clearly more, if these are few: both may be of the label (SIG on T-shirts: poison and benign
    ones are shirts to a check that saw neither), and then the way that works better alone stands.
    """
    told = [[round(way.contradicted, 3), round(way.scattered, 3)] for way in (there, back)]
    there.case.told["ways"] = back.case.told["ways"] = told
    holds = back.contradicted >= CONTRADICTED
    ahead = CLEARLY if back.is_of_few else 1.0
    return back if holds and back.given > ahead * there.given else there


def left_out(cases: list[Case]) -> Mask:
    """What a check does not learn from: all candidates, or the poison alone if they are most."""
    candidates: Mask = np.logical_or.reduce([case.candidates for case in cases])
    if candidates.mean() > MOST_LEFT_OUT:
        poison: Mask = np.logical_or.reduce([case.poison for case in cases])
        return poison
    return candidates


def is_doubtful(said: Testimony, turned: Group) -> bool:
    """Whether a group that was turned round may have been right as it was.

    A core is an island, and turned round it is the label's home that is called poison. Nothing
    speaks for strays or halves unless they command alone as well; else they may be rows with a
    false label. And they may not if many labels are told.
    """
    if said.contradicted < CONTRADICTED:
        return False
    return turned.kind == CORE or (turned.alone[1] >= said.case.limits.known and said.is_of_few)


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


def suspected_labels(labels: NDArray[np.int64], core: Mask, settings: Settings) -> list[int]:
    """Labels with enough rows of the core to be no accident: a tenth of what the first has."""
    held = np.bincount(labels[core], minlength=1)
    enough = max(settings.min_rows, settings.label_share * held.max())
    return [int(label) for label in np.flatnonzero(held >= enough)]
