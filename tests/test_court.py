"""Which rows of a label are asked against which, what a trigger is, and who is held for poison."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from csc_gpu.backend import open_backend
from csc_gpu.segregate import Settings
from csc_gpu.segregate.court import (
    Case,
    Court,
    Group,
    Limits,
    Narrow,
    candidates,
    explained_by,
    narrow_trigger,
    opened,
    searched,
    turned_back,
)
from csc_gpu.segregate.kin import Kin, coherent
from csc_gpu.segregate.testimony import Ruling, Word, by_check, judge
from csc_gpu.segregate.verify import firm_rows, heard, is_doubtful, verify
from csc_gpu.types import Clusters, Reclassified, Sighting, Transfer
from tests.worlds import heard_of, oracle, world

CPU = open_backend("cpu", 1)
ROW = np.arange(200)
LABELS = np.where(ROW < 100, 0, 1)
OURS, NOBODY = LABELS == 0, np.zeros(200, bool)


def rows(first, end):
    """The rows from the first to before the end, as a mask. (N,)"""
    return np.isin(ROW, range(first, end))


CORE = rows(0, 20)
LIMITS = Limits(0.5, 0.8)


@dataclass
class Answers:
    """A witness that gives these answers one after the other; the last one again and again."""

    answers: list[float]
    asked: list[tuple] = field(default_factory=list)

    def points(self):
        return np.ones((200, 2), np.float32)

    def transfers(self, group, rest, label):
        self.asked.append((group, rest))
        share = self.answers[min(len(self.asked), len(self.answers)) - 1]
        return Transfer(label, Transfer.fingerprint(group, rest), share)


class Plain(Court):
    """A court whose probe is told by hand: the last row of label 0 is kin, even rows are alike."""

    def kin(self, label, core):
        return core | (ROW == 99)

    def coherent(self, label, group):
        return Kin(group & (ROW % 2 == 0), np.zeros(200, np.float32))


def sighting(*homes, stray=NOBODY):
    """A snapshot at several scales; homes (N,) int say the cluster of every row, -1 for noise."""
    scales = []
    for number, home in enumerate(homes):
        held = np.zeros((home.max() + 1, 2), np.int64)
        np.add.at(held, (home[home >= 0], LABELS[home >= 0]), 1)
        scales.append(Clusters(home, held.sum(axis=1), held, np.ones(len(held)), 1.0, number / 10))
    return Sighting(1.0, tuple(scales), 8, stray)


def court(*sightings, answers=(0.0,)):
    """A court of these snapshots, and the witness that answers it."""
    witness = Answers(list(answers))
    seen = sightings or (sighting(),)
    return Plain(LABELS, seen, witness.points(), witness, Settings(), CPU), witness


def assert_rows(group, chosen, rest):
    np.testing.assert_array_equal(group.rows, chosen)
    np.testing.assert_array_equal(group.rest, rest)


# ---------------------------------------------------------------------------- the groups of a label


@pytest.mark.parametrize("at_home", [8, 7])
def test_a_core_is_compared_with_its_labels_home_or_if_that_is_too_small_with_all_others(at_home):
    """The core lies in ten islands of two; beside them are a small home and rows that are noise."""
    is_home = rows(20, 20 + at_home)
    of_row = np.select([CORE, is_home], [1 + ROW // 2, 0], -1)
    judges, witness = court(sighting(of_row), answers=[0.3, 0.7])
    group = judges.core(0, CORE | (ROW == 150))  # a row of another label is none of its core
    assert_rows(group, CORE, is_home if at_home == 8 else OURS & ~CORE)
    assert group.commands == 0.7  # the better way round
    assert_rows(Group("core", *witness.asked[1], 0.0), group.rest, CORE)


def test_nobody_is_asked_about_a_core_that_is_all_of_its_label():
    judges, witness = court(answers=[1.0])
    assert judges.core(0, OURS).commands == 0.0
    assert witness.asked == judges.answers == []


def test_home_is_looked_up_at_the_coarsest_scale_at_which_the_core_lies_outside_it():
    noise = np.full(200, -1)
    fine = np.where(rows(20, 40), 0, -1)
    coarse = np.where(rows(20, 80), 0, -1)
    coarse[:4] = 0  # four fifths of the core are outside still
    closer = np.where(rows(0, 5), 0, coarse)
    together = np.where(rows(0, 80), 0, -1)

    def found(*homes):
        return np.flatnonzero(candidates(sighting(*homes), LABELS, CORE, 0, CPU)).tolist()

    both = [*range(20), *range(80, 100)]
    assert found(fine, coarse, together, noise) == both
    assert found(fine, closer, together) == [*range(20), *range(40, 100)]
    assert found(together, noise) == list(range(20))  # nowhere: the core alone
    assert found() == list(range(20))


def test_strays_are_those_of_the_two_earliest_snapshots_in_which_most_of_the_label_is_at_home():
    first = [60, 50, 7, 8, 30]  # so many rows of label 0 stray, and some of label 1
    seen = [sighting(stray=rows(0, n) | rows(150, 200)) for n in first]
    judges, witness = court(*seen, answers=[0.2, 0.4])
    one, two = judges.strays(0)
    assert_rows(one, rows(0, 50), rows(50, 100))
    assert_rows(two, rows(0, 8), rows(8, 100))
    assert [(group.kind, group.commands) for group in (one, two)] == [
        ("strays", 0.2),
        ("strays", 0.4),
    ]
    assert len(witness.asked) == 2  # strays are a mixture: one way round tells


@pytest.mark.parametrize("few", [8, 7])
def test_halves_of_which_one_is_a_few_rows_are_not_asked(few):
    points = np.where(rows(0, few)[:, None], [1, 0], [0, 1]).astype(np.float32)
    witness = Answers([0.4])
    found = Court(LABELS, (sighting(),), points, witness, Settings(), CPU).halves(0)
    assert len(found) == (1 if few == 8 else 0)
    for group in found:
        assert_rows(group, rows(0, 8), rows(8, 100))
    assert len(witness.asked) == 2 * len(found)  # either way round


class Table:
    """A court in which the best patterns of some labels are known."""

    def __init__(self, **commands):
        self.table = {int(name[1:]): found for name, found in commands.items()}
        self.labels = np.repeat(list(self.table), 3)

    def strays(self, label):
        return [Group("strays", NOBODY, NOBODY, share) for share in self.table[label][1:]]

    def halves(self, label):
        return [Group("halves", NOBODY, NOBODY, share) for share in self.table[label][:1]]


def test_the_limit_of_a_label_lies_above_what_three_quarters_of_the_other_labels_reach():
    groups, limits = searched(Table(y0=[0.1, 0.9], y1=[0.3, 0.1], y2=[0.4], y3=[0.2], y4=[0.35]))
    assert {y: [group.commands for group in found] for y, found in groups.items()} == {
        0: [0.9, 0.1],
        1: [0.1, 0.3],
        2: [0.4],
        3: [0.2],
        4: [0.35],
    }
    # the others reach .2 .3 .35 .4 (a quarter of the way from .35 to .4), and with .9 more
    known = {label: found.known for label, found in limits.items()}
    assert known == pytest.approx({0: 0.6625, 1: 0.8, 2: 0.7875, 3: 0.8, 4: 0.8})


def test_what_a_label_itself_reaches_does_not_raise_its_limit():
    _, limits = searched(Table(y0=[0.9], y1=[0.3], y2=[0.3], y3=[0.3]))
    assert [found.known for found in limits.values()] == pytest.approx([0.6, 0.8, 0.8, 0.8])


def test_labels_too_small_to_be_asked_do_not_lower_the_limit_of_the_others():
    _, limits = searched(Table(y0=[0.9], y1=[0.3], y2=[0.3], y3=[0.3], y4=[], y5=[]))
    assert limits[0].known == pytest.approx(0.6)


def test_where_fewer_than_three_others_can_be_asked_half_is_a_trigger_and_a_sure_one_is_so():
    assert set(searched(Table(y0=[0.9], y1=[], y2=[0.0], y3=[0.0]))[1].values()) == {
        Limits(0.5, 0.8),
        Limits.beyond([0.9, 0.0, 0.0]),  # for y1, that was not asked itself
    }
    assert searched(Table(y0=[]))[1] == {0: Limits(0.5, 0.8)}


@pytest.mark.parametrize(
    ("usual", "known", "sure"),
    [(0.0, 0.3, 0.6), (0.1, 0.4, 0.7), (0.25, 0.55, 0.8), (0.4, 0.7, 0.8), (0.7, 0.8, 0.8)],
)
def test_a_trigger_is_sure_from_twice_the_margin_above_what_is_usual(usual, known, sure):
    limits = Limits.beyond([0.0, usual, usual])
    assert [limits.known, limits.sure] == pytest.approx([known, sure])


def narrow(*most, kind="core"):
    """What commands one other label, of labels 0, 1, ..."""
    return {y: [Narrow(NOBODY, NOBODY, 9, share, kind, 0.2)] for y, share in enumerate(most)}


def distance(narrow):
    """Nothing lies apart."""
    return 5.9


@pytest.mark.parametrize(
    ("most", "found"),
    [
        ((0.8, 0.1, 0.2, 0.3, 0.5), True),
        ((0.79, 0.1, 0.2, 0.3, 0.5), False),  # never less than surely
        ((1.0, 0.7, 0.7, 0.1, 0.7), True),  # the usual .7 and .3
        ((0.99, 0.7, 0.7, 0.1, 0.7), False),
        ((1.0,), True),
    ],
)
def test_one_label_is_commanded_if_that_is_sure_and_beyond_the_usual(most, found):
    assert bool(narrow_trigger(narrow(*most), 0, distance)) == found
    assert narrow_trigger(narrow(*most), 9, distance) is None  # a label that was not asked


@pytest.mark.parametrize(
    ("kind", "most", "deviations", "found"),
    [
        ("halves", 0.8, 6.0, True),
        ("halves", 0.8, 5.9, False),
        ("halves", 0.79, 20.0, False),  # rows with a false label lie apart, and command nothing
        ("strays", 1.0, 20.0, False),  # a mixture
    ],
)
def test_where_every_label_is_commanded_halves_that_lie_apart_are_found(
    kind, most, deviations, found
):
    others = narrow(most, 1.0, 1.0, 1.0, kind=kind)
    assert bool(narrow_trigger(others, 0, lambda narrow: deviations)) == found


def test_what_is_usual_is_the_most_that_each_other_label_does():
    asked = narrow(1.0, 0.1, 0.1, 0.1)
    assert narrow_trigger(asked, 0, distance) is not None
    for other in (1, 2, 3):
        asked[other].append(Narrow(NOBODY, NOBODY, 9, 0.9, "core", 0.2))
    assert narrow_trigger(asked, 0, distance) is None


def test_of_groups_that_command_one_label_the_one_that_does_most_is_taken():
    weak, strong = (Narrow(NOBODY, NOBODY, 9, most, "halves", 0.2) for most in (0.8, 0.9))
    for usual in (0.1, 1.0):
        asked = {
            0: [weak, strong],
            **{y: [Narrow(NOBODY, NOBODY, 9, usual, "core", 0.2)] for y in (1, 2, 3)},
        }
        found = narrow_trigger(asked, 0, lambda narrow: 9.0)
        assert found.most == strong.most
        assert found.of_source == (0.2 if usual == 0.1 else 2 / 3)


@pytest.mark.parametrize(
    ("classes", "of_source", "told", "elsewhere"),
    [
        (11, 0.2, 20, False),  # of 100 contradicted rows; ten others, so chance gives 10
        (11, 0.2, 19, True),
        (6, 0.2, 40, False),  # twice what chance gives
        (6, 0.2, 39, True),
        (11, 2 / 3, 67, False),
        (11, 2 / 3, 66, True),
        (2, 0.2, 100, False),  # there is no other
    ],
)
def test_rows_are_of_one_source_if_the_check_gives_it_more_than_chance_does(
    classes, of_source, told, elsewhere
):
    labels = np.arange(200) % classes
    labels[:100] = 0
    predicted = np.where(np.arange(200) < told, 1, min(2, classes - 1))
    check = Reclassified(rows(0, 100), NOBODY, predicted)
    case = Case(
        0, rows(0, 100), rows(0, 100), False, 0.0, LIMITS, {}, source=1, of_source=of_source
    )
    assert heard_of(case, labels, check).is_from_elsewhere == elsewhere


def test_groups_of_a_label_are_noted_with_the_one_label_that_they_command():
    judges, witness = court()
    asked = ((0.5, 1, (0, 9)), (0.9, 3, (0, 50)), (0.9, 2, (0, 30)), (1.0, 5, (0, 51)))
    for share, source, (a, b) in asked:  # the last is most of the label
        witness.transfers = lambda group, rest, label, told=(share, source): Transfer(
            label, "", 0.1, told[1], told[0]
        )
        assert judges.between("halves", 0, rows(a, b), rows(b, 100)) == 0.1
    witness.transfers = lambda group, rest, label: Transfer(label, "", 0.1)  # too few of each
    judges.between("halves", 4, rows(100, 120), rows(120, 200))
    assert judges.narrow.keys() == {0}
    noted = [(found.source, found.most, found.kind) for found in judges.narrow[0]]
    assert noted == [(1, 0.5, "halves"), (3, 0.9, "halves"), (2, 0.9, "halves")]
    assert_rows(judges.narrow[0][1], rows(0, 50), rows(50, 100))


# ----------------------------------------------------------------------- what is held for poison


def group(kind, most, first_of_rest, commands, alone=()):
    """The rows of label 0 before `most` against those from `first_of_rest` on."""
    return Group(kind, rows(0, most), rows(first_of_rest, 100), commands, alone)


def test_a_core_that_a_trigger_explains_goes_before_a_mixed_group_that_commands_more():
    judges, _ = court()
    tried = [
        group("core", 20, 60, 0.7, (0.91234, 0.1)),
        group("strays", 40, 40, 0.9, (0.8, 0.2)),
    ]
    (case,) = opened(judges, 0, tried, list(tried), Limits(0.61234, 0.8))
    np.testing.assert_array_equal(case.poison, CORE | (ROW == 99))  # as it is, and its kin
    np.testing.assert_array_equal(case.candidates, rows(0, 60) | (ROW == 99))
    assert (case.label, case.is_commanded, case.limits.known) == (0, True, 0.61234)
    assert case.commands == 0.9  # of all triggers
    assert case.told == {
        "label": 0,
        "commands": [["core", 0.7], ["strays", 0.9]],
        "limit": 0.612,
        "sure": 0.8,
        "trigger": True,
        "chosen": "core",
        "alone": [0.912, 0.1],
        "turned": False,
        "rows": 20,
        "grown": 21,
    }


@pytest.mark.parametrize(
    ("core", "kind", "mixed", "chosen"),
    [
        (0.79, "halves", 0.8, "halves"),
        (0.8, "halves", 0.9, "core"),  # sure enough
        (0.79, "halves", 0.79, "core"),
        (0.79, "strays", 0.9, "core"),  # a mixture at best
    ],
)
def test_an_island_that_is_not_sure_gives_way_to_halves_that_are(core, kind, mixed, chosen):
    """MNIST blend with seed 6: 104 benign rows lay with the island, none with one of the halves."""
    judges, _ = court()
    tried = [group("core", 45, 70, core, (0.9, 0.1)), group(kind, 40, 40, mixed, (0.6, 0.2))]
    (case,) = opened(judges, 0, tried, list(tried), Limits(0.6, 0.8))
    assert case.told["chosen"] == chosen and case.is_commanded
    if chosen == "halves":  # the check is to tell which of the island's rows are poison
        np.testing.assert_array_equal(case.candidates, rows(0, 45) | (ROW == 99))
        large = [replace(tried[0], rows=rows(0, 50)), tried[1]]  # with row 99 more than half
        (case,) = opened(judges, 0, large, list(large), Limits(0.6, 0.8))
        np.testing.assert_array_equal(case.candidates, rows(0, 40) | (ROW == 99))
    tried[0] = replace(tried[0], alone=(0.4, 0.1))  # does not work alone: the most goes first
    (first, *_) = opened(judges, 0, tried, list(tried), Limits(0.6, 0.8))
    assert first.told["chosen"] == (kind if mixed > core else "core")


def test_of_mixed_groups_the_one_that_commands_most_is_held_for_what_it_has_in_common():
    judges, _ = court()
    tried = [group("strays", 40, 40, 0.7, (0.8, 0.2)), group("halves", 30, 30, 0.9, (0.7, 0.3))]
    (case,) = opened(judges, 0, tried, list(tried), Limits(0.6, 0.8))
    assert (case.told["chosen"], case.told["alone"]) == ("halves", [0.7, 0.3])
    np.testing.assert_array_equal(case.poison, (rows(0, 30) & (ROW % 2 == 0)) | (ROW == 99))
    np.testing.assert_array_equal(case.candidates, rows(0, 30) | (ROW == 99))


@pytest.mark.parametrize("kind", ["strays", "halves"])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("home_from", "most", "left_out"),
    [(49, 40, 49), (50, 40, 20), (90, 49, 20), (90, 50, None)],  # row 99 is kin, too
)
def test_a_core_that_no_trigger_explains_is_heard_beside_a_mixed_group_that_one_does(
    kind, is_turned, home_from, most, left_out
):
    """WaNet with seed 3 was lost: 50 benign strays commanded, and stood in for the island."""
    judges, _ = court()
    mixed = replace(group(kind, most, most, 0.7, (0.8, 0.2)), is_turned=is_turned)
    tried = [group("core", 20, home_from, 0.3), mixed]
    found = opened(judges, 0, tried, [None, mixed], Limits(0.6, 0.8))
    cases = 1 if left_out is None else 2  # the check must still know the label
    assert [case.told["chosen"] for case in found] == [kind, "core"][:cases]
    assert [case.is_commanded for case in found] == [True, False][:cases]
    assert [case.told["trigger"] for case in found] == [True, False][:cases]
    for beside in found[1:]:
        np.testing.assert_array_equal(beside.poison, CORE)
        np.testing.assert_array_equal(beside.candidates, rows(0, left_out))
        assert beside.told["commands"] == [["core", 0.3]]


def test_a_core_gives_up_what_lies_around_it_where_the_check_would_learn_too_little():
    """All that the strays leave out counts, not only what of them is held for poison."""
    judges, _ = court()
    strays = Group("strays", rows(60, 85), rows(0, 60) | rows(85, 100), 0.7, (0.8, 0.2))
    found = opened(
        judges, 0, [group("core", 20, 30, 0.3), strays], [None, strays], Limits(0.6, 0.8)
    )
    np.testing.assert_array_equal(found[0].candidates, rows(60, 85) | (ROW == 99))
    np.testing.assert_array_equal(found[1].candidates, CORE)  # 26 and 30 of 100 would be too many


@pytest.mark.parametrize(("most", "both"), [(40, True), (50, True), (51, False)])
def test_a_core_that_no_trigger_explains_is_heard_beside_rows_that_command_one_label(most, both):
    """Ten benign strays that command one label stood in for an island that the check convicts."""
    judges, _ = court()
    tried, limits = [group("core", 20, 60, 0.3)], Limits(0.6, 0.8)
    narrow = Narrow(rows(0, most), rows(most, 100), 1, 0.9, "strays", 0.2)
    found = opened(judges, 0, tried, [None], limits, narrow)
    assert [case.told["chosen"] for case in found] == ["narrow", "core"][: 1 + both]
    assert [case.source for case in found] == [1, None][: 1 + both]
    assert not any(case.is_commanded or case.told["trigger"] for case in found)
    np.testing.assert_array_equal(found[0].candidates, rows(0, most))
    for beside in found[1:]:
        np.testing.assert_array_equal(beside.poison, CORE)
        np.testing.assert_array_equal(beside.candidates, CORE)  # 60 of 100 would be too many
        assert beside.told["commands"] == [["core", 0.3]]


@pytest.mark.parametrize(
    ("kind", "commands", "alone", "is_trigger"),
    [
        ("core", 0.8, 0.4, True),
        ("core", 0.79, 0.4, False),
        ("core", 0.8, 0.39, False),
        ("halves", 0.8, 0.4, False),
        ("halves", 0.8, 0.5, True),
        ("core", 0.79, 0.5, True),
    ],
)
def test_a_core_that_surely_commands_need_only_be_a_trigger_alone(
    kind, commands, alone, is_trigger
):
    """CIFAR-10 blend at 1 %: the core commanded .82, alone .498, and half was asked of it."""
    judges, _ = court(answers=[alone, 0.1])
    asked = group(kind, 20, 60, commands)
    assert (judges.trigger(0, asked, Limits(0.4, 0.8)) is not None) == is_trigger
    judges, _ = court(answers=[0.5, 0.1])  # nothing asks more of an island than of halves
    assert judges.trigger(0, replace(asked, commands=0.9), Limits(0.7, 0.8)) is not None


def test_a_core_is_not_turned_round_for_a_home_that_does_not_work_alone():
    """Where a mean works as a pattern (digits) the home would be convicted for the island."""
    for home, is_trigger in ((0.45, False), (0.5, True)):
        judges, _ = court(answers=[0.42, home])
        found = judges.trigger(0, group("core", 20, 60, 0.9), Limits(0.4, 0.8))
        assert (found is not None and found.is_turned) == is_trigger
        assert found is None or is_trigger


def test_a_core_that_works_less_than_half_alone_does_not_go_before_strays_that_command_more():
    judges, _ = court()
    tried = [group("core", 20, 30, 0.8, (0.45, 0.1)), group("strays", 40, 40, 0.9, (0.8, 0.2))]
    found = opened(judges, 0, tried, list(tried), Limits(0.4, 0.8))
    assert [case.told["chosen"] for case in found] == ["strays", "core"]
    tried[0] = replace(tried[0], alone=(0.5, 0.1))
    (case,) = opened(judges, 0, tried, list(tried), Limits(0.4, 0.8))
    assert case.told["chosen"] == "core"
    (case,) = opened(judges, 0, [replace(tried[0], alone=(0.45, 0.1))], tried[:1], LIMITS)
    assert case.told["chosen"] == "core" and case.is_commanded


def test_an_island_that_commands_one_label_is_heard_once():
    """Beside itself it would be heard without the label that the check must give it."""
    judges, _ = court()
    narrow = Narrow(CORE, rows(60, 100), 1, 0.9, "core", 0.2)
    (case,) = opened(judges, 0, [group("core", 20, 60, 0.3)], [None], LIMITS, narrow)
    assert case.source == 1


def test_of_two_ways_round_the_smaller_group_does_not_win_for_its_size():
    labels = np.concatenate([np.zeros(240, int), np.repeat(np.arange(1, 43), 10)])
    poison, ours = np.arange(len(labels)) < 40, labels == 0
    group = Group("core", ours & ~poison, poison, 1.0, (0.9, 0.6), True)
    case = explained_by(Still(labels), 0, group, 1.0, LIMITS, {})

    class Alike:
        """Half of what it never saw gets label 1, a quarter each 2 and 3."""

        def reclassify(self, candidates):
            told = np.array([1, 1, 2, 3])[np.arange(len(labels)) % 4]
            predicted = np.where(candidates, told, labels)
            return Reclassified(candidates, np.zeros_like(candidates), predicted)

    (found,), checks = heard(Still(labels), [case], Alike(), Settings())
    assert len(checks) == 2 and found.case is case
    (_, there), (_, back) = case.told["ways"]
    assert back > 1.1 * there


@pytest.mark.parametrize(("home_from", "left_out"), [(50, 50), (51, 20)])
def test_without_a_trigger_the_core_awaits_the_check_and_most_of_its_label_is_learnt(
    home_from, left_out
):
    judges, _ = court()
    tried = [group("core", 20, home_from, 0.3), group("halves", 40, 40, 0.4)]
    (case,) = opened(judges, 0, tried, [None, None], Limits(0.6, 0.8))
    assert not case.is_commanded and case.commands == 0.0 and case.told["alone"] == []
    np.testing.assert_array_equal(case.poison, CORE)
    np.testing.assert_array_equal(case.candidates, rows(0, left_out))


@pytest.mark.parametrize(("commands", "most"), [(0.6, 30), (0.59, 20)])
def test_rows_that_the_check_adds_are_tried_against_rows_of_the_label_that_it_leaves(
    commands, most
):
    judges, witness = court(answers=[commands])
    case = Case(0, CORE, CORE, True, 0.9, Limits(0.6, 0.8), {})
    firm = firm_rows(judges, case, Word(rows(0, 30), NOBODY))
    np.testing.assert_array_equal(firm, rows(0, most))
    ((added, rest),) = witness.asked
    assert_rows(Group("added", added, rest, 0.0), rows(20, 30), rows(30, 100))
    assert case.told["added"] == [10, commands]


def test_nobody_is_asked_where_the_check_adds_nothing_or_no_trigger_was_found():
    judges, witness = court(answers=[1.0])
    explained, unexplained = (
        Case(0, CORE, CORE, known, 0.9, Limits(0.6, 0.8), {}) for known in (True, False)
    )
    np.testing.assert_array_equal(firm_rows(judges, explained, Word(rows(0, 10), NOBODY)), CORE)
    assert not firm_rows(judges, unexplained, Word(rows(0, 30), NOBODY)).any()
    assert witness.asked == []
    assert "added" not in explained.told | unexplained.told


# ----------------------------------------------------------------------------------- the verdict


def verdict(there, core, witness):
    """The verdict where stage 1 believes in every row by .3; the snapshot shows no clusters."""
    seen = Sighting(1.0, (), 8, np.zeros(len(core), bool))
    share = np.full(len(core), 0.3, np.float32)
    return verify(core, share, [seen], there.labels, Settings(), CPU, witness)


def test_belief_in_the_rows_of_a_convicted_label_is_that_of_the_probe_and_elsewhere_of_stage_1():
    there = world(classes=3, rows=50, poison=20)
    told = verdict(there, there.poison, oracle(there))
    np.testing.assert_array_equal(told.suspect, there.poison)
    probe = coherent(there.points, there.labels, 0, there.poison, CPU).belief
    wanted = np.where(there.labels == 0, probe, np.float32(0.3))
    np.testing.assert_array_equal(told.belief, wanted)
    assert told.belief.dtype == np.float32
    benign = (there.labels == 0) & ~there.poison
    assert told.belief[there.poison].min() > 0.3 > told.belief[benign].max()
    assert told.notes["commands"] == [1.0, 0.0, 0.0]
    (label,) = told.notes["labels"]
    assert (label["flagged"], label["alone"]) == (20, [1.0, 0.0])


def test_belief_in_the_rows_of_a_cleared_label_stays_and_its_core_goes_before_its_halves():
    there = world(classes=3, rows=50, poison=20)
    there.truth[:] = there.labels
    told = verdict(there, there.poison, oracle(there, commands=0.0))
    assert told.notes["cleared_labels"] == [0] and not told.suspect.any()
    assert told.notes["labels"][0]["chosen"] == "core"
    assert (told.belief == np.float32(0.3)).all()


@pytest.mark.parametrize(("commands", "proved"), [(0.0, ()), (1.0, (0,))])
def test_a_label_is_proved_by_a_trigger_and_the_check_not_by_the_check_alone(commands, proved):
    there = world(classes=4, rows=50, poison=20)
    told = verdict(there, there.poison, oracle(there, commands=commands))
    np.testing.assert_array_equal(told.suspect, there.poison)
    assert told.proved == proved


def test_without_a_witness_the_core_of_the_suspected_labels_is_the_verdict():
    there = world(classes=3, rows=50, poison=20)
    few = (there.labels == 1) & (np.cumsum(there.labels == 1) <= 7)
    told = verdict(there, there.poison | few, None)
    np.testing.assert_array_equal(told.suspect, there.poison)
    assert told.notes["suspected_labels"] == [0]


# --- a second hearing ---------------------------------------------------------------------------


def turned_world():
    """Label 0 holds 60 benign rows and 20 of poison from labels 1 to 5; 40 rows of each other."""
    labels = np.repeat(np.arange(6), [80, 40, 40, 40, 40, 40])
    poison = np.arange(len(labels)) < 20
    truth = np.where(poison, 1 + np.arange(len(labels)) % 5, labels)
    return labels, poison, truth


class Twice:
    """A witness whose nets give poison its true label, and benign rows they never saw label 5."""

    def __init__(self, labels, poison, truth):
        self.labels, self.poison, self.truth, self.asked = labels, poison, truth, []

    def reclassify(self, candidates):
        self.asked.append(candidates)
        benign_unseen = candidates & ~self.poison & (self.labels == 0)
        predicted = np.where(benign_unseen, 5, np.where(candidates, self.truth, self.labels))
        return Reclassified(candidates, np.zeros_like(candidates), predicted)


class Still:
    """A court of these labels in which every group is as coherent as can be, and has no kin."""

    def __init__(self, labels):
        self.labels = labels

    def coherent(self, label, group):
        return Kin(group, group.astype(np.float32))

    def kin(self, label, core):
        return core


@pytest.mark.parametrize("is_turned", [True, False])
def test_benign_rows_that_were_taken_for_the_poison_are_found_out_by_their_few_labels(is_turned):
    labels, poison, truth = turned_world()
    benign = (labels == 0) & ~poison
    group = Group("halves", benign, poison, 1.0, (0.9, 0.5), is_turned)
    case = explained_by(Still(labels), 0, group, 1.0, LIMITS, {})
    witness = Twice(labels, poison, truth)
    (found,), checks = heard(Still(labels), [case], witness, Settings())
    if not is_turned:  # nobody doubts a group that was not turned round
        assert found.case is case and len(checks) == len(witness.asked) == 1
        return
    np.testing.assert_array_equal(witness.asked[0], benign)
    np.testing.assert_array_equal(witness.asked[1], poison)
    np.testing.assert_array_equal(found.case.poison, poison)
    back = found.case
    assert back.told["turned_back"] and back.turned is None and back.is_disputed
    assert found.check is checks[1]


@pytest.mark.parametrize(("kind", "hearings"), [("halves", 1), ("strays", 1), ("core", 2)])
def test_poison_that_comes_from_many_labels_is_not_doubted_but_a_core_is_heard_both_ways(
    kind, hearings
):
    labels, poison, truth = turned_world()
    group = Group(kind, poison, (labels == 0) & ~poison, 1.0, (0.9, 0.5), True)
    case = explained_by(Still(labels), 0, group, 1.0, LIMITS, {})
    (found,), checks = heard(Still(labels), [case], Twice(labels, poison, truth), Settings())
    assert found.case is case and len(checks) == hearings
    assert case.is_disputed and case.is_mixture == (kind == "strays")
    assert found.scattered == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("is_turned", "there_and_back", "kinds", "commands", "is_poison"),
    [
        (True, False, 1, 0.79, False),  # of four other labels: it is taken for one
        (True, False, 1, 0.8, True),
        (True, False, 2, 0.79, True),
        (True, True, 1, 0.79, False),
        (False, False, 1, 0.79, True),  # nobody disputes it
    ],
)
def test_a_group_that_was_turned_must_be_of_many_labels_or_surely_command(
    is_turned, there_and_back, kinds, commands, is_poison
):
    """Thirteen rows with a false label were left of a GTSRB label that was heard both ways."""
    labels = np.repeat(np.arange(5), [80, 30, 30, 30, 30])
    poison, controls = np.arange(200) < 20, np.arange(200) % 10 == 9
    group = Group("halves", poison, (labels == 0) & ~poison, commands, (), is_turned)
    case = explained_by(Still(labels), 0, group, commands, LIMITS, {})
    assert case.is_disputed == is_turned
    if there_and_back:
        case = turned_back(Still(labels), case, group.turned())
    predicted = np.where(poison, 1 + np.arange(200) % kinds, labels)
    check = Reclassified(poison, controls & ~poison, predicted)
    word = judge(heard_of(case, labels, check))
    assert (word is not None) == is_poison


def test_only_the_doubtful_case_is_turned_and_the_second_check_still_leaves_out_the_others():
    labels, poison, truth = turned_world()
    benign = (labels == 0) & ~poison
    doubtful = explained_by(
        Still(labels), 0, Group("halves", benign, poison, 1.0, (0.9, 0.5), True), 1.0, LIMITS, {}
    )
    few = (labels == 3) & (np.cumsum(labels == 3) <= 10)
    sure = explained_by(
        Still(labels), 3, Group("core", few, (labels == 3) & ~few, 1.0), 1, LIMITS, {}
    )
    witness = Twice(labels, poison, truth)
    found, checks = heard(Still(labels), [doubtful, sure], witness, Settings())
    np.testing.assert_array_equal(witness.asked[1], poison | few)
    assert found[1].case is sure and found[1].check is checks[0]


def test_a_way_round_that_the_check_mostly_confirms_does_not_count_for_its_few_errors():
    """Four of sixty benign rows came out otherwise, each as another label; the poison all did."""
    labels = np.repeat(np.arange(5), [180, 60, 60, 60, 60])
    place = np.arange(len(labels))
    benign = place < 60
    poison = (labels == 0) & ~benign
    uneven = 1 + (place % 10 >= 4) + (place % 10 >= 7) + (place % 10 >= 9)
    case = explained_by(
        Still(labels), 0, Group("core", poison, benign, 0.9, (0.9, 0.3), True), 0.9, LIMITS, {}
    )

    class Errs(Twice):
        def reclassify(self, candidates):
            self.asked.append(candidates)
            odd = np.where(place < 4, 1 + place, labels)
            predicted = np.where(poison, uneven, labels) if candidates[poison].any() else odd
            return Reclassified(candidates, np.zeros_like(candidates), predicted)

    (found,), checks = heard(Still(labels), [case], Errs(labels, poison, uneven), Settings())
    (first, turned) = case.told["ways"]
    assert turned[1] > first[1] > 0.8 and turned[0] < 0.1  # more labels, of hardly any rows
    assert found.case is case and found.check is checks[0] and len(checks) == 2


def test_the_way_round_whose_poison_comes_from_more_labels_counts_even_if_it_was_doubted():
    labels, poison, truth = turned_world()
    benign = (labels == 0) & ~poison
    case = explained_by(
        Still(labels), 0, Group("halves", benign, poison, 1.0, (0.9, 0.5), True), 1.0, LIMITS, {}
    )
    same = np.where(poison, 0, truth)  # the other group keeps its label: it is right
    found, checks = heard(Still(labels), [case], Twice(labels, poison, same), Settings())
    assert len(checks) == 2 and found[0].case is case


@pytest.mark.parametrize(
    ("kind", "firsts", "kinds", "is_back"),
    [
        ("halves", 1, 3, True),  # of five
        ("halves", 1, 2, True),  # few, but clearly more
        ("halves", 2, 2, False),
        ("core", 3, 4, True),
        ("core", 4, 3, False),
    ],
)
def test_a_way_round_counts_if_its_poison_is_of_more_labels_clearly_if_they_are_few(
    kind, firsts, kinds, is_back
):
    """SIG on Fashion-MNIST: .213 of the labels one way, .199 the other, and the wrong one won."""
    labels, poison, _ = turned_world()
    benign = (labels == 0) & ~poison
    group = Group(kind, benign, poison, 1.0, (0.9, 0.6), True)
    case = explained_by(Still(labels), 0, group, 1.0, LIMITS, {})

    class Each(Twice):
        def reclassify(self, candidates):
            self.asked.append(candidates)
            told = 1 + np.arange(len(labels)) % (firsts if candidates[benign].all() else kinds)
            predicted = np.where(candidates, told, labels)
            return Reclassified(candidates, np.zeros_like(candidates), predicted)

    witness, settings = Each(labels, poison, labels), Settings(min_rows=5)
    (found,), checks = heard(Still(labels), [case], witness, settings)
    assert [way[0] for way in case.told["ways"]] == [1.0, 1.0] and found.min_rows == 5
    assert len(checks) == 2 and (found.case is not case) == is_back


@pytest.mark.parametrize(
    ("told", "others", "share"),
    [
        ([1] * 40, 5, 1 / 5),
        ([1, 2] * 20, 5, 2 / 5),
        ([1, 2, 3, 4, 5] * 8, 5, 1),
        ([1, 2] * 15, 40, 2 / (40 * (1 - 0.975**30))),  # thirty drawn evenly have 21 of forty
        ([1, 2] * 14 + [1], 40, 2 / 40),  # fewer rows may be of few by chance
        ([], 5, 0),
        ([], 0, 0),
        ([1] * 4, 0, 0),  # a class of which no row is there
    ],
)
def test_labels_are_counted_as_perplexity_of_those_that_so_many_rows_could_have(
    told, others, share
):
    labels = np.array([0] * (len(told) + 9) + [*range(1, others + 1)])
    poison = np.arange(len(labels)) < len(told)
    predicted = labels.copy()
    predicted[: len(told)] = told
    case = Case(0, poison, poison, True, 1.0, LIMITS, {})
    check = Reclassified(poison, np.zeros(len(labels), bool), predicted)
    assert heard_of(case, labels, check).scattered == pytest.approx(share, abs=2e-4)


@pytest.mark.parametrize(("labels", "rows"), [(10, 400), (43, 36), (100, 60), (1000, 400)])
def test_rows_from_anywhere_are_of_many_labels_however_many_there_are(labels, rows):
    """By the share of all other labels 60 rows of a hundred had at most .61, drawn evenly .41."""
    rng = np.random.default_rng(0)
    given = np.concatenate([np.zeros(rows * 2, int), np.repeat(np.arange(1, labels), 3)])
    poison = np.arange(len(given)) < rows
    case = Case(0, poison, poison, True, 1.0, LIMITS, {})
    for kinds, is_few in ((labels - 1, False), (max(1, (labels - 1) // 8), True)):
        predicted = np.where(poison, rng.integers(1, kinds + 1, len(given)), given)
        check = Reclassified(poison, np.zeros(len(given), bool), predicted)
        assert heard_of(case, given, check).is_of_few == is_few


def test_what_a_check_has_learnt_says_nothing_of_how_many_rows_it_contradicts():
    """Of candidates that are most of all rows the poison alone is left out."""
    labels, poison, truth = turned_world()
    case = Case(0, poison, labels == 0, True, 1.0, LIMITS, {})
    check = Reclassified(poison, np.zeros(len(labels), bool), np.where(poison, truth, labels))
    said = heard_of(case, labels, check)
    assert said.contradicted == 1.0 and said.scattered == 1.0
    other = replace(check, candidates=labels == 0)  # 20 of 80 that it did not see
    assert heard_of(case, labels, other).contradicted == 0.25
    assert heard_of(case, labels, replace(check, candidates=labels == 9)).contradicted == 0


@pytest.mark.parametrize(("share", "is_false"), [(0.45, False), (0.55, True)])
def test_a_label_is_false_if_most_of_what_is_held_for_poison_is(share, is_false):
    labels = np.repeat([0, 1], 200)
    held = np.arange(400) < 100
    case = Case(0, held, held, True, 1.0, LIMITS, {})
    differs = np.arange(400) < 100 * share
    check = Reclassified(held, labels == 1, np.where(differs, 1, labels))
    assert heard_of(case, labels, check).false_label == is_false


def told_few(contradicted, source=None):
    """Of half a label the check gives so many candidates to one other label."""
    labels = np.repeat(np.arange(6), 40)
    half = (labels == 0) & (np.cumsum(labels == 0) <= 20)
    predicted = np.where(half & (np.cumsum(half) <= contradicted), 1, labels)
    case = Case(0, half, half, False, 0.0, LIMITS, {}, source=source)
    check = Reclassified(half, np.zeros(len(labels), bool), predicted)
    return heard_of(case, labels, check)


def test_a_large_part_with_few_labels_may_be_unseen_but_not_if_it_commands_one_label():
    assert by_check(told_few(20)) is Ruling.CLEARED
    assert by_check(told_few(20, source=1)) is Ruling.AS_IT_IS  # poison of one class has few, too


def test_a_group_that_the_check_mostly_confirms_is_not_doubted_for_its_few_labels():
    alone = (0.9, 0.5)
    for contradicted, doubtful in ((10, True), (9, False)):
        said = told_few(contradicted)
        for kind in ("halves", "core"):
            turned = Group(kind, NOBODY, NOBODY, 1.0, alone)
            assert is_doubtful(said, turned) == doubtful


@pytest.mark.parametrize(
    ("kind", "doubtful"), [("halves", False), ("strays", False), ("core", True)]
)
def test_halves_that_command_nothing_alone_are_not_turned_back(kind, doubtful):
    """75 rows of Fashion-MNIST's trousers with a false label were flagged for being turned back."""
    turned = Group(kind, NOBODY, NOBODY, 1.0, (0.9, 0.49))
    assert is_doubtful(told_few(20), turned) == doubtful
