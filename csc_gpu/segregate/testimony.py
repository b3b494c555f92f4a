"""What a check says of a case, that is of a group of a suspected label, and what follows from it.

The check is a model trained without the candidates. It judges rows, the trigger (court.py) labels
and groups: a label that a trigger commands is poisoned unless the check knows better, a label that
none does only if the check says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.segregate.court import FEW, Case
from csc_gpu.types import Mask, Reclassified

TRUSTED = 0.9
"""Share of poison among rows from which they are kept."""
UNEXPLAINED = 0.8
"""Share of poison, by a sure check, from which a core is poison that no trigger explains: a kind of
benign rows that was left out as a whole comes out otherwise as well, but seldom so many of it."""
UNSURE = 0.2
"""A model wrong on more than this share of the controls says nothing about single rows."""
LARGE = 1 / 3
"""Share of a label from which left-out rows may be benign ones that the check has no idea of."""
KIND = 0.3
"""The same of what it contradicts where there are few other labels, for a kind of benign rows, say
one of three, comes out as all of them. Poison of a tenth of all rows is .18 to .31 of its label
where there are two to four."""
BEYOND_CHANCE = 2.0
"""A label is no source that gets less than so many times what an even choice would give it."""
SCATTERED = 0.5
"""Poison with a false label comes from many: its true labels are as many, in perplexity, as this
share of those that so many rows could have at least. Benign rows that a check never saw are taken
for a few like them."""
TOLD = 30
"""Of fewer rows nobody can say that they have so few labels because they are few."""
MOST = 0.5
"""Share of rows that is most of them."""


class Ruling(Enum):
    """What becomes of a case."""

    CLEARED = "cleared"
    AS_IT_IS = "as it is"  # its poison stands: the check cannot tell single rows
    ROW_BY_ROW = "row by row"  # the check adds rows, and frees what no trigger explains


@dataclass(frozen=True)
class Word:
    """What the check says of a case."""

    poison: Mask  # (N,) rows held to be its poison
    confirmed: Mask  # (N,) rows rightly labelled, as far as a check that is to be trusted can tell


@dataclass(frozen=True)
class Testimony:
    """What a check says of a case, in figures."""

    case: Case
    check: Reclassified
    labels: NDArray[np.int64]  # (N,)
    min_rows: int  # so many controls of a label tell as much as those of all others
    max_label_share: float  # more of a label is not held to be poison unless it is told so

    @cached_property
    def ours(self) -> Mask:
        """The rows of the label. (N,)"""
        mine: Mask = self.labels == self.case.label
        return mine

    @cached_property
    def differs(self) -> Mask:
        """The rows that the check contradicts: it gives them another label. (N,)"""
        other: Mask = self.check.predicted != self.labels
        return other

    @cached_property
    def others(self) -> int:
        """How many other labels there are."""
        return len(np.unique(self.labels)) - 1

    @cached_property
    def groups(self) -> tuple[Mask, Mask, Mask]:
        """What is held to be poison, the case's other candidates, rows of the label it learnt."""
        left_out, held = self.check.candidates, self.case.poison
        others = left_out & self.case.candidates & ~held
        return held, others, self.ours & ~left_out & ~self.check.controls

    @cached_property
    def wrong(self) -> float:
        """Share of unseen benign rows that it gets wrong, of all or of the label if more. 0..1"""
        controls = self.check.controls
        usual = wrong_on(controls, self.differs)
        ours = wrong_on(controls & self.ours, self.differs, usual, self.min_rows)
        return max(usual, ours)

    def poison_share(self, group: Mask) -> float:
        """Share of poison in a group (N,), were all poison to differ. 0..1

        A share `differs` of it is predicted otherwise, and a share `wrong` of benign rows is:
        (differs - wrong) / (1 - wrong).
        """
        differs = float(self.differs[group].mean()) if group.any() else 0.0
        return max(0.0, (differs - self.wrong) / (1 - self.wrong))

    @property
    def is_sure(self) -> bool:
        """Whether it can tell single rows."""
        return self.wrong <= UNSURE

    @cached_property
    def share(self) -> float:
        """Share of the label that is held to be poison. 0..1"""
        return float(self.case.poison[self.ours].mean())

    @property
    def knows_label(self) -> bool:
        """Whether it confirms most rows of the label that it learnt from."""
        learnt = self.groups[-1]
        return bool(learnt.any() and self.differs[learnt].mean() < MOST)

    @property
    def false_label(self) -> bool:
        """Whether most of what is held to be poison has a false label by it."""
        return self.poison_share(self.case.poison) >= MOST

    @cached_property
    def unseen(self) -> Mask:
        """The case's candidates that it did not learn from. (N,)"""
        return self.case.candidates & self.check.candidates

    @property
    def contradicted(self) -> float:
        """Share of the candidates that it contradicts, of those that it never saw. 0..1"""
        return float(self.differs[self.unseen].mean()) if self.unseen.any() else 0.0

    @cached_property
    def given(self) -> float:
        """How many labels it gives the candidates that it contradicts. 0..others

        As perplexity: evenly many labels, not those that a few rows get.
        """
        told = self.check.predicted[self.unseen & self.differs]
        share = np.bincount(told) / max(1, len(told))
        share = share[share > 0]
        return float(np.exp(-(share * np.log(share)).sum())) if len(told) else 0.0

    @cached_property
    def scattered(self) -> float:
        """How many labels it gives the candidates that it contradicts, of those it could. 0..1

        Few rows cannot have all other labels; drawn evenly they would have `could` of them.
        """
        told = int((self.unseen & self.differs).sum())
        if not (told and self.others):
            return 0.0
        could = self.others * (1 - (1 - 1 / self.others) ** told) if told >= TOLD else self.others
        return min(1.0, self.given / could)

    @property
    def is_of_few(self) -> bool:
        """Whether what it contradicts gets few labels, as benign rows do that it never saw."""
        return self.scattered < SCATTERED

    @property
    def is_from_elsewhere(self) -> bool:
        """Whether too few of the rows that it contradicts are of the one label they command.

        Not each must be: covers teach the check to give the trigger their labels. A benign kind
        that it never saw is taken for several labels, and no more for that one than for others.
        """
        case = self.case
        told = self.check.predicted[case.poison & self.differs]
        least = min(1.0, max(case.of_source, BEYOND_CHANCE / max(1, self.others)))
        return len(told) == 0 or bool((told == case.source).mean() < least)

    @property
    def may_be_unseen(self) -> bool:
        """Whether rows that nothing but it speaks against may be benign ones that it never saw.

        Such are a large part of their label, and it takes them for the few labels like them, or
        there are no more.
        """
        if self.others < FEW and (self.unseen & self.differs)[self.ours].mean() > KIND:
            return True
        left_out = float(self.check.candidates[self.ours].mean())
        return self.case.source is None and left_out > LARGE and self.is_of_few

    def notes(self) -> dict[str, Any]:
        """What the case's notes tell of it."""
        return {
            "scattered": round(self.scattered, 3),
            "wrong_on_controls": round(self.wrong, 4),
            "checked": [int(group.sum()) for group in self.groups],
            "poison_share": [round(self.poison_share(group), 4) for group in self.groups],
        }


def judge(said: Testimony) -> Word | None:
    """What the check says of a case; None if it is cleared."""
    case = said.case
    ruling = by_trigger(said) if case.is_commanded else by_check(said)
    if ruling is Ruling.CLEARED:
        return None
    poison = row_by_row(said) if ruling is Ruling.ROW_BY_ROW else np.zeros_like(said.ours)
    if not poison.any():
        return Word(case.poison, np.zeros_like(said.ours))
    return Word(poison, said.ours & ~said.differs)


def by_trigger(said: Testimony) -> Ruling:
    """A label that a trigger commands: the check tells its rows, or the trigger must be sure.

    The check cannot where it is unsure, where it contradicts even most rows of the label that it
    learnt from, where it confirms their label (poison with a true one; but of strays, a mixture, it
    need only name some), or where they were turned round and neither way they are taken for many
    labels. If these are nearly all of their label, they are what makes it: a stop sign's mean may
    command like a trigger. With so few labels that nobody can say so, a trigger that is not sure,
    or one of most of a label, speaks for a label of two kinds.
    """
    case = said.case
    is_sure_trigger = case.commands >= case.limits.sure
    if said.others < FEW and (said.share > MOST or not is_sure_trigger):
        return Ruling.CLEARED
    parts = case.is_mixture and bool(row_by_row(said).any())
    can_tell = said.is_sure and said.knows_label and (said.false_label or parts)
    if can_tell and not (case.is_disputed and said.is_of_few):
        return Ruling.ROW_BY_ROW
    makes_label = said.share > said.max_label_share and said.is_of_few
    return Ruling.AS_IT_IS if is_sure_trigger and not makes_label else Ruling.CLEARED


def by_check(said: Testimony) -> Ruling:
    """A label that none commands: the check must know it, and contradict most of the rows.

    More of them if it is sure. They must not be such as it may never have seen; if they command the
    images of one other label, it must take enough of them for that one.
    """
    case = said.case
    if said.may_be_unseen or (case.source is not None and said.is_from_elsewhere):
        return Ruling.CLEARED
    least = UNEXPLAINED if said.is_sure else MOST
    if not said.knows_label or said.poison_share(case.poison) < least:
        return Ruling.CLEARED
    return Ruling.ROW_BY_ROW if said.is_sure else Ruling.AS_IT_IS


def row_by_row(said: Testimony) -> Mask:
    """The poison of the label: what a trigger explains, and differing rows that surely are. (N,)

    Of the differing rows of a group, poison / differs are poison: enough, and they are kept. Of
    strays, a mixture, those that the check confirms go free.
    """
    case, differs = said.case, said.differs
    poison = case.firm & differs if case.is_mixture else case.firm
    for group in said.groups:
        share = said.poison_share(group)
        if share > 0 and share >= TRUSTED * float(differs[group].mean()):
            poison = poison | (group & differs)
    return poison


def wrong_on(rows: Mask, differs: Mask, usual: float = 0.5, weight: float = 2.0) -> float:
    """Share of these rows that differ, as if so many more had been seen, of which the usual share
    differed (at first one of two, Laplace's rule). 0..1"""
    return (int((differs & rows).sum()) + usual * weight) / (int(rows.sum()) + weight)
