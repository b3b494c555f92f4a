"""Stage 2: the trigger tells labels and groups, the check single rows, and nobody is asked idly."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

from csc_gpu.backend import open_backend
from csc_gpu.segregate import Settings, capped, observe, segregate
from csc_gpu.segregate.court import Case, Court, Group, Limits
from csc_gpu.segregate.kin import apart, halves
from csc_gpu.segregate.testimony import judge, wrong_on
from csc_gpu.segregate.verify import suspected_labels, verify
from csc_gpu.types import Reclassified, Transfer
from tests.worlds import Oracle, heard_of, oracle, world

CPU = open_backend("cpu", 1)
ROW = np.arange(404)
LABELS = np.maximum(0, ROW - 399)  # 400 rows of label 0, one of each of four others
POISON, REST, CONTROLS = ROW < 100, (ROW >= 100) & (ROW < 200), (ROW >= 300) & (ROW < 400)


def told_of(there, witness, **changes):
    settings = Settings(**changes)
    sighting = observe(there.points, there.labels, 1.0, settings, CPU)
    return segregate([sighting], there.labels, settings, CPU, witness)


def held(differs, *, candidates=POISON, commanded=False, commands=1.0):
    """What is held of the first hundred rows if the check differs on these rows."""
    predicted = np.where(differs, 1 + ROW % 4, LABELS)
    case = Case(0, POISON, candidates, commanded, commands, Limits(0.5, 0.8), {})
    word = judge(heard_of(case, LABELS, Reclassified(candidates, CONTROLS, predicted)))
    return word and word.poison


# ------------------------------------------------------------------------------------------- judge


def test_what_another_case_leaves_out_of_a_label_is_unseen_as_well():
    part = np.arange(len(LABELS)) < 100  # a quarter of label 0
    predicted = np.where(part, 1, LABELS)
    case = Case(0, part, part, False, 0.0, Limits(0.5, 0.8), {})
    for left_out, is_poison in ((133, True), (134, False)):
        check = Reclassified(np.arange(len(LABELS)) < left_out, CONTROLS, predicted)
        assert (judge(heard_of(case, LABELS, check)) is not None) == is_poison


def test_rows_of_which_none_surely_is_poison_stand_as_they_are(monkeypatch):
    """With the constants as they are some always are; benchmarks.thresholds moves them."""
    monkeypatch.setattr("csc_gpu.segregate.testimony.TRUSTED", 1.0)
    np.testing.assert_array_equal(held(ROW < 95), POISON)


@pytest.mark.parametrize(
    ("rows", "kinds", "commanded", "is_poison"),
    [
        (134, 1, False, False),  # a third of label 0, and all of one other label
        (134, 2, False, True),  # of two of four
        (133, 1, False, True),
        (134, 1, True, True),
    ],
)
def test_a_large_part_of_a_label_is_no_poison_if_a_check_takes_it_for_few_labels(
    rows, kinds, commanded, is_poison
):
    """Benign rows that were left out as a whole, and clean-label poison is what was learnt."""
    part = np.arange(len(LABELS)) < rows
    predicted = np.where(part, 1 + ROW % kinds, LABELS)
    case = Case(0, part, part, commanded, 0.9, Limits(0.5, 0.8), {})
    word = judge(heard_of(case, LABELS, Reclassified(part, CONTROLS, predicted)))
    assert (word is not None and (word.poison == part).all()) == is_poison


def test_rows_the_model_trained_on_are_not_added_because_it_errs_now_and_then():
    differs = POISON | (ROW % 10 == 0)  # all of the poison, a tenth of everything else
    np.testing.assert_array_equal(held(differs), POISON)


def test_a_reliable_model_adds_candidates_that_differ_and_frees_rows_that_do_not():
    differs = (ROW < 90) | ((ROW >= 100) & (ROW < 150))
    np.testing.assert_array_equal(held(differs, candidates=POISON | REST), differs)


def test_rows_that_differ_are_added_if_nearly_all_of_them_must_be_poison():
    some, errors = REST & (ROW % 4 == 0), CONTROLS & (ROW % 10 == 0)
    found = held(POISON | some, candidates=POISON | REST)
    np.testing.assert_array_equal(found, POISON | some)
    found = held(POISON | some | errors, candidates=POISON | REST)
    np.testing.assert_array_equal(found, POISON)  # a tenth differ as benign rows do


def test_rows_that_command_the_label_stay_where_a_reliable_model_would_free_them():
    differs = (ROW < 90) | ((ROW >= 100) & (ROW < 150))
    found = held(differs, candidates=POISON | REST, commanded=True)
    np.testing.assert_array_equal(found, POISON | differs)


@pytest.mark.parametrize("commanded", [False, True])
def test_a_model_wrong_on_every_third_control_leaves_the_rows_as_they_stand(commanded):
    differs = (ROW < 98) | REST | (CONTROLS & (ROW % 3 == 0))
    found = held(differs, candidates=POISON | REST, commanded=commanded)
    np.testing.assert_array_equal(found, POISON)


def test_strays_that_a_reliable_model_confirms_go_free_even_if_they_command_the_label():
    """Half of a percent of MNIST was flagged with as many benign strays of its label."""
    confirmed = (ROW >= 60) & (ROW < 100)
    few = (ROW >= 30) & (ROW < 100)
    for commands, errors, right, left in (
        (0.6, 0, confirmed, 60),
        (0.6, 3, confirmed, 0),
        (0.8, 3, confirmed, 100),
        (0.8, 0, few, 30),  # WaNet with seed 3: 39 of 50 strays were benign
    ):
        wrong = CONTROLS & (ROW % errors == 0) if errors else CONTROLS & False
        predicted = np.where((POISON & ~right) | wrong, 1 + ROW % 4, LABELS)
        case = Case(0, POISON, POISON, True, commands, Limits(0.3, 0.8), {}, is_mixture=True)
        for heard in (case, replace(case, is_disputed=True)):
            word = judge(heard_of(heard, LABELS, Reclassified(POISON, CONTROLS, predicted)))
            assert (word.poison.sum() if word else 0) == left
        np.testing.assert_array_equal(case.firm, POISON)


@pytest.mark.parametrize(("commands", "left"), [(0.79, 0), (0.8, 100)])
def test_strays_of_which_a_reliable_model_confirms_all_stand_only_if_they_surely_command(
    commands, left
):
    case = Case(0, POISON, POISON, True, commands, Limits(0.3, 0.8), {}, is_mixture=True)
    word = judge(heard_of(case, LABELS, Reclassified(POISON, CONTROLS, LABELS)))
    assert (word.poison.sum() if word else 0) == left


@pytest.mark.parametrize(
    ("others", "commanded", "commands", "is_poison"),
    [
        (2, True, 0.79, False),
        (2, True, 0.8, True),
        (2, False, 0.0, True),
        (3, True, 0.79, False),
        (3, False, 0.0, True),
        (4, True, 0.79, True),
    ],
)
def test_with_fewer_than_five_labels_a_trigger_must_be_sure(others, commanded, commands, is_poison):
    """Digits below five and the others: one kind of each was flagged, 144 rows of 1,438."""
    labels = np.where(ROW < 380, 0, 1 + ROW % others)
    case = Case(0, POISON, POISON, commanded, commands, Limits(0.5, 0.8), {})
    check = Reclassified(POISON, CONTROLS, np.where(POISON, 1 + ROW % others, labels))
    assert (judge(heard_of(case, labels, check)) is not None) == is_poison


@pytest.mark.parametrize(
    ("others", "held", "commanded", "source", "is_poison"),
    [
        (3, 119, False, None, True),
        (3, 119, False, 1, True),
        (3, 121, False, None, False),  # .3 of the label: one of three kinds
        (3, 121, False, 1, False),
        (4, 121, False, None, True),
        (3, 199, True, None, True),
        (3, 201, True, None, False),  # more than half of it
        (4, 201, True, None, True),
    ],
)
def test_a_kind_of_one_label_among_few_is_no_poison(others, held, commanded, source, is_poison):
    """Digits in four labels: 138 rows, all of a two or of a three, were flagged."""
    labels = np.where(ROW < 400, 0, 1 + ROW % others)
    poison = held > ROW
    predicted = np.where(poison, 1 if source else 1 + ROW % others, labels)
    case = Case(0, poison, poison, commanded, 1.0, Limits(0.5, 0.8), {}, source=source)
    said = heard_of(case, labels, Reclassified(poison, CONTROLS, predicted))
    assert (judge(said) is not None) == is_poison


@pytest.mark.parametrize("disputed", [True, False])
@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(
    ("held", "kinds", "most", "is_poison"),
    [(150, 1, 0.75, True), (151, 1, 0.75, False), (151, 5, 0.75, True), (151, 1, 0.76, True)],
)
def test_nearly_all_rows_of_a_label_are_what_makes_it_if_they_are_taken_for_few_others(
    disputed, knows, held, kinds, most, is_poison
):
    """Stop signs among false labels (GTSRB, seed 7): 235 of 263 commanded .82, and .8 is sure."""
    labels = np.where(ROW < 200, 0, 1 + ROW % 5)
    poison = held > ROW
    other = poison if knows else labels == 0  # the check knows the rest of the label, or no row
    predicted = np.where(other, 1 + ROW % kinds, labels)
    case = Case(0, poison, poison, True, 0.8, Limits(0.5, 0.8), {}, is_disputed=disputed)
    check = Reclassified(poison, CONTROLS, predicted)
    word = judge(heard_of(case, labels, check, max_label_share=most))
    told = knows and not disputed  # then the check tells row by row, however many they are
    assert (word is not None and (word.poison == poison).all()) == (is_poison or told)


def test_among_few_labels_a_kind_may_be_unseen_though_the_core_is_a_part_of_it():
    """What the check contradicts counts: a core of a quarter of its label in a kind of .4."""
    labels = np.where(ROW < 400, 0, 1 + ROW % 3)
    core, kind = ROW < 100, ROW < 160
    case = Case(0, core, kind, False, 0.0, Limits(0.5, 0.8), {})
    for differs, is_poison in ((core, True), (kind, False)):
        predicted = np.where(differs, 1 + ROW % 3, labels)
        said = heard_of(case, labels, Reclassified(kind, CONTROLS, predicted))
        assert (judge(said) is not None) == is_poison
    predicted = np.where(core, 1, labels)  # and of few labels it is as it is among many
    said = heard_of(case, labels, Reclassified(kind, CONTROLS, predicted))
    assert judge(said) is None


def test_an_unsure_model_that_mostly_confirms_a_false_label_leaves_the_rows_as_they_stand():
    differs = (ROW < 96) | (CONTROLS & (ROW % 6 != 0))  # wrong on five of six controls
    np.testing.assert_array_equal(held(differs), POISON)


def test_a_label_that_keeps_its_rows_is_cleared_unless_a_pattern_commands_it():
    differs = ROW < 20
    assert held(differs) is None
    assert held(ROW < 70) is None  # an odd kind of benign rows, it may be
    assert held(ROW < 90) is not None
    assert held(ROW < 70, commanded=True) is not None
    np.testing.assert_array_equal(held(differs, commanded=True), POISON)
    np.testing.assert_array_equal(held(np.zeros(404, bool), commanded=True), POISON)


def test_a_sure_check_that_confirms_the_label_clears_it_unless_it_is_surely_commanded():
    nowhere = np.zeros(404, bool)
    assert held(nowhere, commanded=True, commands=0.79) is None
    np.testing.assert_array_equal(held(nowhere, commanded=True, commands=0.8), POISON)


def test_where_the_check_is_unsure_a_pattern_must_command_the_label_surely():
    unsure = POISON | (CONTROLS & (ROW % 3 == 0))
    assert held(unsure, commanded=True, commands=0.79) is None
    np.testing.assert_array_equal(held(unsure, commanded=True, commands=0.8), POISON)


def test_a_check_that_contradicts_what_it_learnt_of_a_label_says_nothing_of_it():
    """Halves of GTSRB labels, left out nearly whole, came out otherwise, and so did the rest."""
    learnt = ~POISON & ~CONTROLS
    unknown = POISON | (learnt & (ROW % 2 == 0)) | (ROW == 201)  # more than half of what it learnt
    assert held(unknown) is None
    assert held(unknown, commanded=True, commands=0.79) is None
    found = held(unknown, commanded=True, commands=0.8)
    np.testing.assert_array_equal(found, POISON)  # and nothing is added by it
    known = POISON | (learnt & (ROW % 4 == 0))
    assert held(known, commanded=True, commands=0.6) is not None
    assert held(known) is not None
    nothing_learnt = ~CONTROLS
    assert held(nothing_learnt, candidates=nothing_learnt) is None


def test_a_label_is_surely_commanded_if_any_of_its_triggers_is_sure():
    """The core is a poor part of the poison, the halves show the trigger; the labels are true."""

    class Half(Oracle):
        def share(self, group, rest, label):
            found = super().share(group, rest, label)
            return found if group.sum() > 10 else min(found, 0.52)

    there = world()
    there.truth[:] = there.labels
    core = there.poison & (np.cumsum(there.poison) <= 10)
    last = observe(there.points, there.labels, 1.0, Settings(), CPU)
    share = core.astype(np.float32)
    for commands, found in ((1.0, True), (0.55, False)):
        witness = Half(there, 0.0, commands, np, 0)
        told = verify(core, share, [last], there.labels, Settings(), CPU, witness)
        assert told.notes["labels"][0]["commands"][0] == ["core", 0.52]
        assert told.suspect[there.poison].any() == found


def test_what_a_check_confirms_counts_if_it_is_sure_and_the_label_false():
    def confirmed(differs):
        case = Case(0, POISON, POISON, True, 1.0, Limits(0.5, 0.8), {})
        check = Reclassified(POISON, CONTROLS, np.where(differs, LABELS + 1, LABELS))
        return judge(heard_of(case, LABELS, check)).confirmed

    np.testing.assert_array_equal(confirmed(ROW < 90), (ROW >= 90) & (LABELS == 0))
    assert not confirmed(ROW < 40).any()  # poison whose labels are true, it may be
    assert not confirmed((ROW < 90) | (CONTROLS & (ROW % 3 == 0))).any()


def test_controls_of_the_label_count_where_it_is_harder_than_the_others():
    labels = np.where(ROW < 350, 0, 1 + ROW % 3)  # half of the controls are of other labels
    differs = (ROW < 65) | (CONTROLS & (labels == 0) & (ROW % 5 < 2))
    check = Reclassified(POISON, CONTROLS, np.where(differs, (labels + 1) % 4, labels))
    case = Case(0, POISON, POISON, False, 0.0, Limits(0.5, 0.8), {})
    said = heard_of(case, labels, check)
    assert judge(said) is None  # .65 differ, of unseen benign rows .4
    usual = 21 / 102
    wrong = (20 + 8 * usual) / (50 + 8)
    assert said.wrong == pytest.approx(wrong)
    said = heard_of(case, labels, check, min_rows=99)
    assert judge(said) is not None  # too few to say much
    assert said.wrong == pytest.approx((20 + 99 * usual) / (50 + 99))


def test_a_label_of_few_controls_is_as_hard_as_the_others_if_none_of_them_differs():
    labels = np.where(ROW < 310, 0, 1)  # ten of the hundred controls are of this label
    differs = POISON | (CONTROLS & (ROW == 399))
    check = Reclassified(POISON, CONTROLS, np.where(differs, labels + 1, labels))
    case = Case(0, POISON, POISON, False, 0.0, Limits(0.5, 0.8), {})
    assert heard_of(case, labels, check).wrong == pytest.approx(2 / 102)


def test_a_share_of_few_rows_is_pulled_to_one_half():
    nobody = np.zeros(4, bool)
    assert wrong_on(nobody, nobody) == 0.5
    assert wrong_on(~nobody, nobody) == pytest.approx(1 / 6)
    assert wrong_on(~nobody, nobody, 0.3, 8) == pytest.approx(2.4 / 12)


def test_a_label_with_rows_enough_and_a_tenth_of_what_the_first_has_is_suspected():
    labels = np.repeat([0, 1, 2, 3], [60, 30, 9, 7])
    core = np.ones(len(labels), bool)
    assert suspected_labels(labels, core, Settings()) == [0, 1, 2]  # 7 rows are too few
    assert suspected_labels(labels, core, Settings(label_share=0.2)) == [0, 1]
    assert suspected_labels(labels, ~core, Settings()) == []
    even = np.repeat(np.arange(43), 12)  # all-to-all: each label has a 43rd of the core
    assert len(suspected_labels(even, np.ones(len(even), bool), Settings())) == 43


# ----------------------------------------------------------------------------------- all together


def test_a_commanded_label_is_not_cleared_by_a_check_that_confirms_it():
    """Clean-label poison: the labels are true, so that the check cannot differ."""
    there = world()
    there.truth[:] = there.labels
    told = told_of(there, oracle(there, commands=1.0))
    assert told.notes["cleared_labels"] == []
    np.testing.assert_array_equal(told.suspect, there.poison)


def test_an_uncommanded_label_that_keeps_its_label_is_cleared():
    there = world()
    there.truth[:] = there.labels
    told = told_of(there, oracle(there, commands=0.4))
    assert told.notes["cleared_labels"] == told.notes["suspected_labels"] == [0]
    assert not told.suspect.any()


def strays_of(there, also):
    """A sighting in which the poison, and these rows, still lie with other classes."""
    early, (one, two) = there.points.copy(), (np.flatnonzero(there.labels == y)[0] for y in (1, 2))
    early[there.poison | also] = there.points[one]
    early[there.poison & (np.cumsum(there.poison) % 2 == 0)] = there.points[two]
    return observe(early, there.labels, 1.0, Settings(), CPU, scales=())


def seen_twice(there, strays):
    """Two sightings; in the first the strays still lie with label 1."""
    early = there.points.copy()
    early[strays] = there.points[np.flatnonzero(there.labels == 1)[0]]
    return [
        observe(early, there.labels, 1.0, Settings(), CPU, scales=()),
        observe(there.points, there.labels, 2.0, Settings(), CPU),
    ]


def test_rows_a_sure_check_names_stand_where_strays_led_to_them_though_no_probe_knows_them():
    """Half of the poison ends among benign rows of its label: only the check can tell."""
    there = world()
    lost = there.poison & (np.cumsum(there.poison) > 20)
    benign = np.flatnonzero((there.labels == 0) & ~there.poison)
    there.points[lost] = there.points[benign[:20]] + 0.01
    also = np.isin(np.arange(len(lost)), benign[-5:])
    nobody, last = (
        np.zeros(len(lost), bool),
        observe(there.points, there.labels, 2.0, Settings(), CPU),
    )
    seen, share = [strays_of(there, also), last], nobody.astype(np.float32)
    told = verify(nobody, share, seen, there.labels, Settings(), CPU, oracle(there, commands=1.0))
    (label,) = told.notes["labels"]
    assert label["chosen"] == "strays" and label["rows"] == 45 and label["grown"] < 40
    np.testing.assert_array_equal(told.suspect, there.poison)


@pytest.mark.parametrize(("is_false", "commands"), [(True, 0.6), (False, 0.6), (True, 0.8)])
def test_an_island_is_heard_beside_benign_strays_that_command_its_label(is_false, commands):
    """WaNet with seed 3: the strays stood in for the island, and the attack was lost."""
    there = world(classes=5)
    also = (there.labels == 0) & ~there.poison
    also &= np.cumsum(also) <= 10
    there.points[also, 15] += 6
    if not is_false:
        there.truth[:] = there.labels
    seen = seen_twice(there, also)
    share, witness = there.poison.astype(np.float32), Commands(there, {commands: also})
    told = verify(there.poison, share, seen, there.labels, Settings(), CPU, witness)
    assert [case["chosen"] for case in told.notes["labels"]] == ["strays", "core"]
    assert told.notes["suspected_labels"] == [0]
    (left_out,) = witness.left_out
    assert left_out[there.poison | also].all()
    if commands == 0.8:  # surely: both are found, and believed in
        np.testing.assert_array_equal(told.suspect, there.poison | also)
        benign = (there.labels == 0) & ~told.suspect
        assert told.belief[told.suspect].min() > told.belief[benign].max()
    elif is_false:
        np.testing.assert_array_equal(told.suspect, there.poison)
        assert told.notes["cleared_labels"] == []
    else:
        assert not told.suspect.any() and told.notes["cleared_labels"] == [0]


@pytest.mark.parametrize("contradicted", [12, 31])
def test_an_island_beside_strays_is_not_judged_by_what_the_strays_need(contradicted):
    """The check errs on a stray, and contradicts up to .78 of a benign island of forty rows."""
    there = world()
    island = there.poison
    also = (there.labels == 0) & ~island
    also &= np.cumsum(also) <= 10
    there.points[also, 15] += 6
    there.truth[:] = there.labels
    odd = island & (np.cumsum(island) <= contradicted)
    there.truth[odd] = 1 + np.arange(contradicted) % 3
    there.truth[np.flatnonzero(also)[0]] = 1
    share, witness = island.astype(np.float32), Commands(there, {0.6: also})
    seen = seen_twice(there, also)
    told = verify(island, share, seen, there.labels, Settings(), CPU, witness)
    assert [case["chosen"] for case in told.notes["labels"]] == ["strays", "core"]
    assert not told.suspect[island].any()


@pytest.mark.parametrize("commands", [0.6, 0.9])
def test_strays_whose_common_rows_are_benign_are_searched_for_those_that_the_check_contradicts(
    commands,
):
    there = world(classes=5, poison=10)
    also = (there.labels == 0) & ~there.poison
    also &= np.cumsum(also) <= 20
    there.points[also, 15] += 8
    home = np.flatnonzero((there.labels == 0) & ~there.poison & ~also)
    there.points[there.poison] = there.points[home[:10]] + 0.01
    nobody, strays = np.zeros(len(also), bool), also | there.poison
    witness = Commands(there, {commands: strays, 0.95: there.poison})
    share, seen = nobody.astype(np.float32), seen_twice(there, strays)
    told = verify(nobody, share, seen, there.labels, Settings(), CPU, witness)
    (case,) = told.notes["labels"]
    assert (case["chosen"], case["rows"], case["checked"][:2]) == ("strays", 30, [20, 10])
    np.testing.assert_array_equal(told.suspect, there.poison)
    assert case["wrong_on_controls"] < 0.1 and case["poison_share"][0] == 0.0
    assert case["scattered"] > 0.8  # of three other labels


class Commands(Oracle):
    """A witness of label 0: these groups, and no others, command it so much."""

    def __init__(self, there, shares):
        super().__init__(there, 0.0, 0.0, np, 0)
        self.shares = shares

    def share(self, group, rest, label):
        found = [share for share, rows in self.shares.items() if (group == rows).all()]
        return found[0] if found and label == 0 else 0.1


def scattered(rows: str):
    """The verdict where half of a label's candidates lie anywhere: no probe knows them again."""
    there = world()
    lost = there.poison & (np.cumsum(there.poison) > 20)
    if rows == "mislabelled":
        lost = np.isin(
            np.arange(len(lost)), np.flatnonzero((there.labels == 0) & ~there.poison)[:20]
        )
        there.truth[lost] = 1
    there.points[lost] = np.random.default_rng(1).normal(0, 3, (20, 20))
    last = observe(there.points, there.labels, 1.0, Settings(), CPU)
    core = there.poison & ~lost
    share = core.astype(np.float32)
    told = verify(core, share, [last], there.labels, Settings(), CPU, oracle(there, commands=1.0))
    assert told.notes["labels"][0]["added"][0] == 20  # the check names them all
    return told.suspect, there.poison


def test_what_the_check_adds_stands_if_its_own_pattern_commands_the_label():
    np.testing.assert_array_equal(*scattered("poison"))


def test_mislabelled_rows_of_an_attacked_label_are_no_poison_though_the_check_names_them():
    suspect, poison = scattered("mislabelled")
    assert suspect[poison].all()
    assert (suspect & ~poison).sum() <= 2  # scattered where the poison is


def test_rows_of_a_core_go_free_where_check_and_probe_agree_that_they_are_benign():
    """A third witness is not enough: each alone would free poison, too."""
    there = world()
    benign = np.flatnonzero((there.labels == 0) & ~there.poison)[:10]
    core = there.poison.copy()
    core[benign] = True
    like_benign = np.flatnonzero(there.poison)[:3]  # the check alone can tell
    there.points[like_benign] = there.points[benign[:3]] + 0.01
    like_label = np.flatnonzero(there.poison)[-3:]  # the probe alone can tell
    there.truth[like_label] = 0
    last = observe(there.points, there.labels, 1.0, Settings(), CPU)
    share = core.astype(np.float32)
    told = verify(core, share, [last], there.labels, Settings(), CPU, oracle(there, commands=1.0))
    np.testing.assert_array_equal(told.suspect, there.poison)


@pytest.mark.parametrize("commands", [0.0, 1.0])
def test_poison_with_a_false_label_is_found_with_and_without_a_trigger(commands):
    there = world()
    told = told_of(there, oracle(there, commands=commands))
    np.testing.assert_array_equal(told.suspect, there.poison)


def mostly_poison():
    """A world in which the poison is at home with label 0, and its benign rows are the island."""
    there = world(classes=5, poison=60)
    benign = np.flatnonzero((there.labels == 0) & ~there.poison)
    return there.take(np.setdiff1d(np.arange(len(there.labels)), benign[:60]))


def test_home_is_the_poison_where_its_pattern_works_and_the_islands_does_not():
    there = mostly_poison()
    told = told_of(there, oracle(there))
    (label,) = told.notes["labels"]
    assert label["chosen"] == "core"
    assert label["rows"] > label["checked"][1] > 0  # the island is the smaller group
    np.testing.assert_array_equal(told.suspect, there.poison)


@dataclass
class BothWays(Oracle):
    """Label 0's groups work against one another either way; alone, island and home as told."""

    alone: tuple[float, float] = (0.0, 0.0)

    def share(self, group, rest, label):
        if label != 0:
            return 0.0
        against_others = bool((self.there.labels[rest] != label).all())
        is_island = self.there.poison[group].mean() > 0.5
        return self.alone[0 if is_island else 1] if against_others else 1.0


@pytest.mark.parametrize("alone", [(1.0, 0.3), (0.9, 0.9), (0.3, 1.0)])
def test_of_two_groups_whose_patterns_work_the_one_that_works_better_alone_is_poison(alone):
    there = world(classes=5)
    there.truth[:] = there.labels  # the check helps neither
    told = told_of(there, BothWays(there, 0.0, 1.0, np, 0, alone=alone))
    assert told.notes["cleared_labels"] == []
    swapped = alone[1] > alone[0]
    # all rows of a label at home are more than may be flagged: those are capped
    assert told.suspect[there.poison].mean() == (0.0 if swapped else 1.0)
    assert told.suspect[(there.labels == 0) & ~there.poison].any() == swapped


def test_the_check_learns_from_no_candidate_and_from_other_labels():
    there = world()
    witness = oracle(there)
    told_of(there, witness)
    (left_out,) = witness.left_out
    assert left_out[there.poison].all()
    assert not left_out[there.labels != 0].any()


def test_every_answer_is_written_down_with_its_question():
    there = world()
    witness = oracle(there)
    told = told_of(there, witness)
    assert {answer.label: 1 for answer in told.transfers}.keys() == {0, 1, 2, 3}
    for answer, (group, rest, label) in zip(told.transfers, witness.asked, strict=True):
        assert answer.label == label
        assert (
            answer.groups == Transfer.fingerprint(group, rest) != Transfer.fingerprint(rest, group)
        )
        assert (answer.share == 1.0) == bool(there.poison[group].mean() > 0.5)
    assert any(answer.share == 1.0 for answer in told.transfers)
    assert len(told.checks) == 1


class Silent:
    """A witness that nobody may ask."""

    def __getattr__(self, name):
        raise AssertionError(f"asked for {name}")


def test_nothing_is_trained_where_no_label_is_suspected():
    there = world(poison=0)
    witness = oracle(there)
    told = told_of(there, witness)
    assert told.notes["suspected_labels"] == []
    assert not told.suspect.any()
    assert told.checks == () and witness.left_out == []
    assert len(told.transfers) == len(witness.asked)


def without_a_core(there, witness):
    """The verdict where stage 1 found nobody."""
    settings, nobody = Settings(), np.zeros(len(there.labels), bool)
    sighting = observe(there.points, there.labels, 1.0, settings, CPU)
    share = nobody.astype(np.float32)
    return verify(nobody, share, [sighting], there.labels, settings, CPU, witness)


def test_a_label_is_suspected_without_a_core_if_a_half_of_it_commands_it():
    there = world()
    told = without_a_core(there, oracle(there))
    assert told.notes["suspected_labels"] == [0]
    np.testing.assert_array_equal(told.suspect, there.poison)
    witness = oracle(there, commands=0.4)
    assert not without_a_core(there, witness).suspect.any()
    assert witness.left_out == []


class OneLabel(Oracle):
    """The pattern of label 0's poison sends the images of label 2 there, and no others."""

    usual = 0.0  # what the pattern of any other two groups does

    def transfers(self, group, rest, label):
        answer = super().transfers(group, rest, label)
        works = bool(answer.share) and label == 0
        return replace(answer, share=0.2 * works, source=2, most=0.9 if works else self.usual)


@pytest.mark.parametrize(
    ("usual", "of_source", "found"),
    [(0.0, 1.0, True), (0.0, 0.7, True), (0.0, 0.6, False), (0.7, 1.0, True)],
)
def test_a_trigger_for_the_images_of_one_label_is_found_if_the_check_gives_rows_that_label(
    usual, of_source, found
):
    """Where it is usual to command a label the poison is one of two halves that lie apart."""
    there = world()
    poison = np.flatnonzero(there.poison)
    from_two = int(of_source * len(poison))
    there.truth[poison] = np.where(np.arange(len(poison)) < from_two, 2, 1)
    witness = OneLabel(there, 0.0, 1.0, np, 0)
    witness.usual = usual
    told = without_a_core(there, witness)
    np.testing.assert_array_equal(told.suspect, there.poison & found)
    assert told.proved == ()  # no cap is lifted for it
    if usual == 0.0:
        (case,) = told.notes["labels"]
        assert (case["chosen"], case["source"], case["most"]) == ("narrow", 2, 0.9)
        assert not case["trigger"]


def test_halves_that_do_not_lie_apart_are_not_found_where_it_is_usual_to_command_a_label():
    there = world()
    there.truth[there.poison] = 2
    for noise, found in ((0.0, True), (4.0, False)):
        blurred = np.random.default_rng(1).normal(0, 1, there.points.shape).astype(np.float32)
        points = there.points + noise * blurred
        witness = OneLabel(replace(there, points=points), 0.0, 1.0, np, 0)
        witness.usual = 0.7
        told = without_a_core(replace(there, points=points), witness)
        assert told.suspect[there.poison].any() == found
        assert bool(told.notes["labels"]) == found


def test_rows_that_command_one_label_go_before_a_core_that_no_trigger_explains():
    there = world()
    benign = (there.labels == 0) & ~there.poison
    there.truth[there.poison] = 2
    last = observe(there.points, there.labels, 1.0, Settings(), CPU)
    witness = OneLabel(there, 0.0, 1.0, np, 0)
    told = verify(benign, benign.astype(np.float32), [last], there.labels, Settings(), CPU, witness)
    np.testing.assert_array_equal(told.suspect, there.poison)


def test_a_pattern_that_is_usual_among_the_labels_is_no_trigger():
    """Half of the images follow the pattern of any two halves: that is no backdoor."""

    class Fickle(Oracle):
        def share(self, group, rest, label):
            return max(0.6 if label else 0.0, super().share(group, rest, label))

    there = world()
    for commands, suspected in ((0.8, [0]), (0.7, [])):
        told = without_a_core(there, Fickle(there, 0.0, commands, np, 0))
        assert told.notes["suspected_labels"] == suspected
        assert [case["limit"] for case in told.notes["labels"]] == [0.8] * len(suspected)


def test_the_halves_of_a_label_are_its_two_blobs_whatever_the_order_of_the_rows():
    there = world()
    ours = there.labels == 0
    smaller, larger = halves(there.points, ours, CPU)
    np.testing.assert_array_equal(smaller, there.poison)
    np.testing.assert_array_equal(larger, ours & ~there.poison)
    order = np.random.default_rng(0).permutation(len(ours))
    again, _ = halves(there.points[order], ours[order], CPU)
    np.testing.assert_array_equal(again, smaller[order])


@pytest.mark.parametrize("order", [1, -1])
def test_groups_lie_apart_by_the_deviations_between_their_means(order):
    along = np.repeat([-1.0, 1.0], 50)  # means 4 apart, deviation 1 along the line, 9 across it
    points = np.column_stack([along + np.tile([-2.0, 2.0], 50), np.full(100, 1e4), np.zeros(100)])
    points[:, 2] = np.tile([-9.0, -9.0, 9.0, 9.0], 25)
    one = np.tile([True, False], 50)[::order].copy()
    found = apart(points[::order].astype(np.float32), one, ~one, CPU)
    assert found == pytest.approx(4, rel=0.05)


def test_the_halves_of_a_label_are_its_two_blobs_though_one_is_small():
    """The first axis alone would give the small one a part of the large."""
    there = world(poison=10)
    smaller, _ = halves(there.points, there.labels == 0, CPU)
    np.testing.assert_array_equal(smaller, there.poison)


@pytest.mark.parametrize("rule", ["persistence", "text", "algorithm1", "per_label"])
def test_no_other_rule_asks_a_witness(rule):
    assert told_of(world(), Silent(), rule=rule).checks == ()


def test_where_candidates_are_too_many_the_poison_alone_is_left_out(monkeypatch):
    there = world()
    witness = oracle(there)
    told_of(there, witness)
    module = sys.modules["csc_gpu.segregate.verify"]  # the package's own verify is the function
    monkeypatch.setattr(module, "MOST_LEFT_OUT", 0.09)  # 40 of 440 rows are poison
    told_of(there, witness)
    many, few = witness.left_out
    assert few.sum() < many.sum()
    np.testing.assert_array_equal(few, there.poison)


def test_where_poison_outnumbers_its_label_the_strays_are_the_benign_rows():
    """73 benign rows of a GTSRB label beside 608 of poison strayed, and were flagged for it."""
    there = world(rows=50, poison=200)
    benign = (there.labels == 0) & ~there.poison
    last = observe(there.points, there.labels, 1.0, Settings(), CPU)
    court = Court(there.labels, [last], there.points, oracle(there), Settings(), CPU)
    turned = court.trigger(0, Group("strays", benign, there.poison, 1.0), Limits(0.5, 0.8))
    np.testing.assert_array_equal(turned.rows, there.poison)
    np.testing.assert_array_equal(turned.rest, benign)
    right = Group("strays", there.poison, benign, 1.0)
    np.testing.assert_array_equal(court.trigger(0, right, Limits(0.5, 0.8)).rows, right.rows)
    assert court.trigger(0, right, Limits(0.5, 0.8)).alone == turned.alone
    half = there.poison & (np.cumsum(there.poison) % 3 == 0)
    mixed = Group("strays", half | benign, there.poison & ~half, 0.7)
    weak = Court(there.labels, [last], there.points, oracle(there, commands=0.49), Settings(), CPU)
    # neither works alone: strays are a mixture
    np.testing.assert_array_equal(weak.trigger(0, mixed, Limits(0.5, 0.8)).rows, mixed.rows)
    assert weak.trigger(0, Group("halves", half, benign, 0.7), Limits(0.5, 0.8)) is None


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_a_label_is_taken_beyond_its_cap_only_where_trigger_and_check_agree(wrong):
    there = world(classes=5, rows=50, poison=200)
    core = there.poison.copy()
    last = observe(there.points, there.labels, 1.0, Settings(), CPU)
    witness = oracle(there, wrong=wrong)
    told = verify(core, core.astype(np.float32), [last], there.labels, Settings(), CPU, witness)
    assert told.proved == ((0,) if wrong == 0.0 else ())
    assert told.suspect[there.poison].mean() > 0.9
    kept, was_capped = capped(
        told.suspect, told.belief, there.labels, Settings(max_share=1.0), told.proved
    )
    assert was_capped == (not told.proved)
    assert kept[there.poison].all() == bool(told.proved)
    assert (kept.sum() <= 0.75 * 250) == (not told.proved)
