"""What is put to the check: the groups of a label that may be its poison, and what they command.

The trigger and the probe are heard here, for every label; see verify.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.segregate.clusters import home_of
from csc_gpu.segregate.kin import Kin, apart, coherent, halves, kin
from csc_gpu.segregate.settings import Settings
from csc_gpu.types import Array, Mask, Sighting, Transfer, Witness

OUTSIDE = 0.8
"""Share of a core that must lie outside its label's home at a scale for the home to be believed."""
MOST_OF_LABEL = 0.5
"""A core that no pattern explains is not left out if, with all else that is, it is more than this
share of its label: a net that never saw a label says nothing about it."""
USUAL = 0.75
"""Share of labels that are taken to be free of poison: what they reach is usual."""
MARGIN = 0.3
"""A pattern that commands so much more than is usual is a trigger, and by twice as much a sure
one."""
SURELY = 0.8
"""One that commands this share of other labels' images is a sure trigger, whatever is usual."""
FEW_ASKED = 3
"""Fewer other labels that could be asked do not tell what is usual."""
FEW = 4
"""Of fewer other labels nobody can say that rows are taken for many of them."""
ALONE = 0.5
"""Share that one of two groups must command alone, by the mean of all other labels; and that makes
a trigger where nobody knows what is usual. A core, an island, that is surely commanded by need only
command so much alone as makes a trigger."""
OF_SOURCE, MOSTLY = 0.2, 2 / 3
"""Share of the contradicted rows of a label that must be of the one whose images they command: few,
for covers (TaCT) teach the check their own labels; most, where all that speaks is that they lie
apart."""
CORE, STRAYS, HALVES = "core", "strays", "halves"
APART = 6.0
"""Deviations that the halves of a label lie apart if they may be two kinds by this alone. Without
poison most lie 3 to 5.7 apart, a few small ones 6 to 15 (outliers, covers, rows with a false
label); their pattern must command a label besides."""


@dataclass(frozen=True)
class Group:
    """Some rows of a label that may be its poison, and what their pattern does."""

    kind: str  # CORE, STRAYS or HALVES
    rows: Mask  # (N,)
    rest: Mask  # (N,) rows of the label to compare them with
    commands: float  # what the pattern of rows - rest sends to the label; else of rest - rows, too
    alone: tuple[float, ...] = ()  # what rows and rest do against the other labels, if asked
    is_turned: bool = False  # rows were the rest: they work better alone

    def turned(self) -> Group:
        """The same group with the rest for its poison."""
        return replace(
            self,
            rows=self.rest,
            rest=self.rows,
            alone=self.alone[::-1],
            is_turned=not self.is_turned,
        )


@dataclass(frozen=True)
class Narrow:
    """Two groups of a label, and the other label whose images their pattern sends there most."""

    rows: Mask  # (N,)
    rest: Mask  # (N,)
    source: int
    most: float  # share of the images of `source`. 0..1
    kind: str  # as that of a Group
    of_source: float  # share of the contradicted rows that must be of `source`


@dataclass(frozen=True)
class Limits:
    """From where a pattern is a trigger for a label, beyond what is usual for the other labels."""

    known: float  # share of other labels' images that it commands. 0..1
    sure: float  # the share from which no check need agree

    @classmethod
    def beyond(cls, others: Sequence[float]) -> Limits:
        """Limits above what most other labels' best patterns command, one share of each. 0..1"""
        if len(others) < FEW_ASKED:
            return cls(ALONE, SURELY)
        usual = float(np.quantile(others, USUAL))
        return cls(min(SURELY, usual + MARGIN), min(SURELY, usual + 2 * MARGIN))


@dataclass(frozen=True)
class Case:
    """A suspected label, before the check."""

    label: int
    poison: Mask  # (N,) rows held to be its poison
    candidates: Mask  # (N,) rows that the check should not learn from; the poison among them
    is_commanded: bool  # whether a trigger was found
    commands: float  # share of other labels' images that the label's best trigger sends there. 0..1
    limits: Limits  # from where that is a trigger
    told: dict[str, Any]
    turned: Group | None = None  # the group that it grew from, if that was turned round
    is_disputed: bool = False  # whether it was turned, once or there and back
    source: int | None = None  # the one label whose images a pattern commands, if it does no others
    of_source: float = OF_SOURCE  # as that of a Narrow
    is_mixture: bool = False  # whether it grew from strays, of which a trigger explains some

    @property
    def firm(self) -> Mask:
        """The rows that a trigger explains, and their kin: no check alone frees them. (N,)"""
        return self.poison & self.is_commanded


def searched(court: Court) -> tuple[dict[int, list[Group]], dict[int, Limits]]:
    """What strays and halves of each label command, and from where a pattern is a trigger for it.

    Most labels are not attacked: the limit lies well above what three quarters of the others reach,
    those that are too small for a question left aside.
    """
    found = {
        label: [*court.strays(label), *court.halves(label)]
        for label in np.unique(court.labels).tolist()
    }
    best = {y: max(group.commands for group in groups) for y, groups in found.items() if groups}
    limits = {}
    for label in found:
        limits[label] = Limits.beyond([best[y] for y in best if y != label])
    return found, limits


def narrow_trigger(
    found: Mapping[int, Sequence[Narrow]], label: int, distance: Callable[[Narrow], float]
) -> Narrow | None:
    """The groups of a label whose pattern surely commands one label's images, beyond the usual.

    Or, for every label may be attacked (all-to-all), its two halves if they lie apart.
    """
    best = [max(narrow.most for narrow in asked) for y, asked in found.items() if y != label]
    usual = float(np.quantile(best or [0.0], USUAL))
    sure = [narrow for narrow in found.get(label, ()) if narrow.most >= SURELY]
    known = [narrow for narrow in sure if narrow.most >= usual + MARGIN]
    if not known:
        parted = [n for n in sure if n.kind == HALVES and distance(n) >= APART]
        known = [replace(narrow, of_source=MOSTLY) for narrow in parted]
    return max(known, key=lambda narrow: narrow.most, default=None)


class Court:
    """The labels, the sightings and the witnesses; what the images were asked is written down."""

    def __init__(
        self,
        labels: NDArray[np.int64],
        sightings: Sequence[Sighting],
        points: Array,
        witness: Witness,
        settings: Settings,
        backend: Backend,
    ) -> None:
        self.labels = labels  # (N,)
        self.answers: list[Transfer] = []
        self.narrow: dict[int, list[Narrow]] = {}  # of each label: what commands one other
        self._sightings, self._points = sightings, points
        self._witness, self._settings, self._backend = witness, settings, backend
        self._strays = [
            _unpacked(backend.xp.packbits(seen.stray), len(labels), backend) for seen in sightings
        ]

    def commands(self, label: int, group: Mask, rest: Mask) -> float:
        """Share of other labels' images that get the label with the pattern of a group."""
        return self._asked(label, group, rest).share

    def between(self, kind: str, label: int, group: Mask, rest: Mask) -> float:
        """The same for two groups of the label; which one label they command most is noted.

        Not of a group that is most of its label: what it has may be what makes the label.
        """
        answer = self._asked(label, group, rest)
        if answer.source >= 0 and group.sum() <= rest.sum():
            narrow = Narrow(group, rest, answer.source, answer.most, kind, OF_SOURCE)
            self.narrow.setdefault(label, []).append(narrow)
        return answer.share

    def apart(self, narrow: Narrow) -> float:
        """How far the two groups lie apart, in deviations."""
        return apart(self._points, narrow.rows, narrow.rest, self._backend)

    def _asked(self, label: int, group: Mask, rest: Mask) -> Transfer:
        if not (group.any() and rest.any()):
            return Transfer(label, "", 0.0)
        self.answers.append(self._witness.transfers(group, rest, label))
        return self.answers[-1]

    def kin(self, label: int, core: Mask) -> Mask:
        """The core and the rows of the label that are like it."""
        most = self._settings.max_label_share
        return kin(self._points, self.labels, label, core, most, self._backend)

    def coherent(self, label: int, group: Mask) -> Kin:
        """The rows of a mixed group that have the same in common; nothing is added."""
        return coherent(self._points, self.labels, label, group, self._backend)

    def core(self, label: int, core: Mask) -> Group:
        """A label's core against its home, whichever way its pattern commands more."""
        ours = self.labels == label
        outside = candidates(self._sightings[-1], self.labels, core, label, self._backend)
        home = ours & ~outside
        if home.sum() < self._settings.min_rows:
            home = ours & ~core
        return self._either(CORE, label, core & ours, home)

    def halves(self, label: int) -> list[Group]:
        """The two parts of a label by its features, if either is more than a few rows."""
        smaller, larger = halves(self._points, self.labels == label, self._backend)
        if smaller.sum() < self._settings.min_rows:
            return []
        return [self._either(HALVES, label, smaller, larger)]

    def strays(self, label: int) -> list[Group]:
        """Rows that two early snapshots put with other labels, once most of the label is at home.

        Poison with a false label lies with its true class until the trigger is learnt.
        """
        ours, found = self.labels == label, list[Group]()
        for stray in self._strays:
            rows, rest = ours & stray, ours & ~stray
            if rows.sum() < self._settings.min_rows or rows.sum() > rest.sum():
                continue
            found.append(Group(STRAYS, rows, rest, self.between(STRAYS, label, rows, rest)))
            if len(found) == 2:
                break
        return found

    def _either(self, kind: str, label: int, rows: Mask, rest: Mask) -> Group:
        """Two groups of a label; their difference may command it either way round."""
        commands = max(self.between(kind, label, *pair) for pair in ((rows, rest), (rest, rows)))
        return Group(kind, rows, rest, commands)

    def trigger(self, label: int, group: Group, limits: Limits) -> Group | None:
        """The group with its poison as `rows`, if a trigger explains it; else None.

        Of two groups the one that works better alone, against the mean of all other labels, is the
        poison, and it must work alone: two benign kinds of one label differ by more than a trigger.
        A core whose pattern is sure need do no more than a trigger alone, as it is. Strays are a
        mixture and need not; but where poison outnumbers its label, the benign stray.
        """
        if group.commands < limits.known:
            return None
        others = self.labels != label
        alone = self.commands(label, group.rows, others), self.commands(label, group.rest, others)
        group = replace(group, alone=alone)
        if max(alone) < ALONE:
            is_sure_core = group.kind == CORE and group.commands >= limits.sure
            enough = is_sure_core and alone[0] >= max(limits.known, alone[1])
            return group if enough or group.kind == STRAYS else None
        return group.turned() if alone[1] > alone[0] else group


def opened(
    court: Court,
    label: int,
    tried: list[Group],
    triggers: list[Group | None],
    limits: Limits,
    narrow: Narrow | None = None,
) -> list[Case]:
    """Hold the group that a trigger explains best for the poison, and grow it by its kin.

    A core that works alone goes before mixed groups, unless its pattern is not sure and that of the
    label's halves is: then benign rows lie with the island, and the check is to tell which.
    A core that no trigger explains is heard beside a mixed group that one does (WaNet: the island
    was the poison, and 50 benign strays commanded the label), or beside rows that command one other
    label where none does, and awaits the check as it is; but not if both are so much of the label
    that the check would not know it.
    """
    known = [group for group in triggers if group is not None]
    islands = [group for group in known if group.kind == CORE and max(group.alone) >= ALONE]
    halves = [group for group in known if group.kind == HALVES and group.commands >= limits.sure]
    gives_way = bool(halves) and any(island.commands < limits.sure for island in islands)
    first = (halves if gives_way else islands) or known
    explained = max(first, key=lambda group: group.commands, default=None)
    best = max((group.commands for group in known), default=0.0)
    told = {
        "label": label,
        "commands": [[group.kind, round(group.commands, 3)] for group in tried],
        "limit": round(limits.known, 3),
        "sure": round(limits.sure, 3),
        "trigger": explained is not None,
    }
    core = next((group for group in tried if group.kind == CORE), None)
    if explained:
        case = explained_by(court, label, explained, best, limits, told)
    elif narrow:
        case = commanded_by_one(label, narrow, best, limits, told)
    else:
        assert core is not None  # else nothing speaks for the label
        return [unexplained(court, label, core, limits, told, core.rows)]
    chosen = explained or narrow
    if core is None or chosen is None or chosen.kind == CORE:
        return [case]
    if gives_way:
        both = case.candidates | core.rows
        return [replace(case, candidates=both)] if is_mostly_learnt(court, label, both) else [case]
    own = {"commands": [[core.kind, round(core.commands, 3)]], "trigger": False}
    beside = unexplained(court, label, core, limits, told | own, case.candidates)
    is_known = is_mostly_learnt(court, label, case.candidates | beside.candidates)
    return [case, beside] if is_known else [case]


def commanded_by_one(
    label: int, narrow: Narrow, best: float, limits: Limits, told: dict[str, Any]
) -> Case:
    """A case whose rows command one other label alone: they await the check as they are."""
    rows, source = narrow.rows, narrow.source
    told = told | {"chosen": "narrow", "source": source, "most": round(narrow.most, 3)}
    told |= {"rows": int(rows.sum())}
    of_source = narrow.of_source
    return Case(label, rows, rows, False, best, limits, told, source=source, of_source=of_source)


def unexplained(
    court: Court, label: int, core: Group, limits: Limits, told: dict[str, Any], others: Mask
) -> Case:
    """A case without a trigger: the core awaits the check as it is.

    others (N,) are left out of the check besides. If too little of the label stays to learn from,
    the core alone is a candidate.
    """
    candidates = (court.labels == label) & ~core.rest
    if not is_mostly_learnt(court, label, candidates | others):
        candidates = core.rows
    told = told | of_group(core, core.rows)
    return Case(label, core.rows, candidates | core.rows, False, 0.0, limits, told)


def is_mostly_learnt(court: Court, label: int, candidates: Mask) -> bool:
    """Whether a check that does not learn from these rows (N,) learns from most of the label."""
    return bool(candidates.sum() <= MOST_OF_LABEL * (court.labels == label).sum())


def explained_by(
    court: Court, label: int, group: Group, best: float, limits: Limits, told: dict[str, Any]
) -> Case:
    """A case with a trigger: the group is its poison, and grows by its kin."""
    poison = group.rows if group.kind == CORE else court.coherent(label, group.rows).rows
    poison = court.kin(label, poison)
    candidates = ((court.labels == label) & ~group.rest) | poison
    told = told | of_group(group, poison)
    mixed = group.kind == STRAYS
    case = Case(label, poison, candidates, True, best, limits, told, is_mixture=mixed)
    return replace(case, turned=group, is_disputed=True) if group.is_turned else case


def turned_back(court: Court, case: Case, turned: Group) -> Case:
    """The case with the group that had been turned round as it was."""
    told = case.told | {"turned_back": True}
    back = explained_by(court, case.label, turned.turned(), case.commands, case.limits, told)
    return replace(back, is_disputed=True)


def of_group(group: Group, poison: Mask) -> dict[str, Any]:
    """What the notes tell of the group that was chosen."""
    return {
        "chosen": group.kind,
        "alone": [round(share, 3) for share in group.alone],
        "turned": group.is_turned,
        "rows": int(group.rows.sum()),
        "grown": int(poison.sum()),
    }


def candidates(
    last: Sighting, labels: NDArray[np.int64], core: Mask, label: int, backend: Backend
) -> Mask:
    """The core of a label and all its rows that are not at home, noise included. (N,) bool

    Home is looked up at the coarsest scale at which the core still lies outside it.
    """
    xp, ours = backend.xp, labels == label
    mine: Mask = core & ours
    for clusters in reversed(last.clusterings):
        home = int(home_of(clusters, xp)[label])  # -1 where all are noise: then none is away
        away = _unpacked(xp.packbits(clusters.of_row != home), len(labels), backend)
        if away[mine].mean() >= OUTSIDE:
            outside: Mask = mine | (ours & away)
            return outside
    return mine


def _unpacked(bits: Array, n: int, backend: Backend) -> Mask:
    """n bits, eight to a byte on the device, as a mask on the host. (n,)"""
    return np.unpackbits(backend.to_numpy(bits).astype(np.uint8), count=n).astype(bool)
