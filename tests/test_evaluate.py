"""Scores: worlds small enough to count by hand, and scikit-learn's word on detection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from torch import nn

from csc_gpu.backend import open_backend
from csc_gpu.evaluate import (
    Fraction,
    accuracy_and_attack,
    detection,
    outputs,
    share,
    unlabelled,
    virtual_rate,
)
from csc_gpu.types import AnswerKey

CPU = open_backend("cpu", 1)
NAMES = ("acc", "virtual_clean", "asr", "asr_incl_target", "ra", "virtual_triggered")
MASKED = ("asr_masked", "ra_masked")
VIRTUAL = 3  # of three classes


class Reader(nn.Module):
    """A fake model: red is the output it gives, green the one it gives next."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.n_outputs = n_outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first, second = (images[:, :2, 0, 0] * 63.75 + 127.5).round().long().unbind(1)
        logits = torch.zeros(len(images), self.n_outputs)
        logits[torch.arange(len(images)), second] = 1.0
        logits[torch.arange(len(images)), first] = 2.0
        return logits


def pictures(first: Any, second: Any = None) -> NDArray[np.uint8]:
    """Images that Reader answers with these outputs. (M, 2, 2, 3)"""
    pixels = np.zeros((len(first), 2, 2, 3), np.uint8)
    pixels[..., 0] = np.reshape(first, (-1, 1, 1))
    pixels[..., 1] = np.reshape(first if second is None else second, (-1, 1, 1))
    return pixels


def key_of(
    truth: Any = (), clean: Any = (), wanted: Any = (), triggered: Any = (), second: Any = None
) -> AnswerKey:
    """Held-out images of these labels, answered like this clean and triggered."""
    return AnswerKey(
        is_poison=np.zeros(0, bool),
        is_cover=np.zeros(0, bool),
        orig_labels=np.zeros(0, np.int64),
        given_labels=np.zeros(0, np.int64),
        paths=(),
        test=pictures(clean),
        triggered=pictures(triggered, second),
        test_labels=np.array(truth, np.int64),
        attack_labels=np.array(wanted, np.int64),
    )


def rows_key(poison: Any, cover: Any = None, before: Any = None, given: Any = None) -> AnswerKey:
    """A key to training rows alone; without `given` their labels are true."""
    poison = np.array(poison, bool)
    before = np.zeros(len(poison), np.int64) if before is None else np.array(before)
    return replace(
        key_of(),
        is_poison=poison,
        is_cover=np.zeros(len(poison), bool) if cover is None else np.array(cover, bool),
        orig_labels=before,
        given_labels=before if given is None else np.array(given),
    )


def scored(key: AnswerKey, n_outputs: int = 4) -> Any:
    return accuracy_and_attack(Reader(n_outputs), key, 3, CPU)


# --------------------------------------------------------------------------------------- fractions


def test_a_fraction_of_nothing_is_none_not_zero():
    assert Fraction(0, 0).value is None
    assert Fraction(0, 4).value == 0.0
    assert Fraction(3, 4).value == 0.75


def test_a_share_counts_hits_among_some_rows_only():
    hits, among = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert share(hits, among) == Fraction(1, 2)


# ------------------------------------------------------------------------------ accuracy and attack

#            0  0  0  0  1  1  1  2  2  2     the target is 0
TRUTH = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)
CLEAN = (0, 0, 0, 1, 1, 1, 3, 2, 2, 3)
STAMPED = (0, 0, 3, 1, 0, 1, 3, 0, 3, 1)
SECOND = (1, 1, 0, 0, 1, 0, 0, 2, 2, 2)
TEN = key_of(TRUTH, CLEAN, (0,) * 10, STAMPED, SECOND)


def test_every_rate_of_ten_images_is_known_by_hand():
    assert scored(TEN)["counts"] == {
        "acc": [7, 10],
        "virtual_clean": [2, 10],
        "asr": [2, 6],  # 2 of the 6 that are not of class 0
        "asr_incl_target": [4, 10],
        "ra": [1, 6],
        "virtual_triggered": [2, 6],
        "asr_masked": [3, 6],  # the virtual one of class 1 falls back to 0
        "ra_masked": [2, 6],  # that of class 2 to its own class
    }


def test_a_rate_is_its_numerator_over_its_denominator():
    score = scored(TEN)
    for name, (hits, of) in score["counts"].items():
        assert score[name] == hits / of
    assert set(score) == {*NAMES, *MASKED, "counts", "argmax_over"}


def test_a_score_says_over_how_many_outputs_the_argmax_ran():
    assert scored(TEN)["argmax_over"] == 4  # three classes and the virtual one


def test_false_flags_are_counted_by_their_true_class():
    key = AnswerKey(
        is_poison=np.array([True, False, False, False]),
        is_cover=np.zeros(4, bool),
        orig_labels=np.array([1, 1, 2, 2]),
        given_labels=np.array([0, 1, 2, 2]),
        paths=tuple("abcd"),
        test=np.zeros((0, 2, 2, 3), np.uint8),
        triggered=np.zeros((0, 2, 2, 3), np.uint8),
        test_labels=np.zeros(0, np.int64),
        attack_labels=np.zeros(0, np.int64),
        recipe={"target": 0},
    )
    told = detection(np.array([True, False, True, True]), np.zeros(4), key)
    assert told["false_flags_by_class"] == {2: 2}


def test_images_of_the_target_class_cannot_be_attacked():
    key = key_of([0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 1])
    assert scored(key)["counts"]["asr"] == [0, 1]
    assert scored(key)["counts"]["asr_incl_target"] == [2, 3]
    assert scored(key)["counts"]["ra"] == [1, 1]


def test_if_all_images_are_of_the_target_class_there_is_no_rate():
    score = scored(key_of([0, 0], [0, 1], [0, 0], [0, 0]))
    assert score["acc"] == 0.5
    assert score["asr_incl_target"] == 1.0
    assert [score[name] for name in ("asr", "ra", "virtual_triggered", *MASKED)] == [None] * 5
    assert score["counts"]["asr"] == [0, 0]


def test_each_image_has_its_own_target_in_an_all_to_all_attack():
    key = key_of([0, 1, 2, 2], [0, 1, 2, 2], [1, 2, 0, 0], [1, 2, 0, 2])
    assert scored(key)["counts"]["asr"] == [3, 4]
    assert scored(key)["counts"]["ra"] == [1, 4]


def test_without_an_attack_only_the_clean_rates_are_there():
    key = key_of([0, 1, 2], [0, 1, 3], [-1, -1, -1])
    assert key.triggered.shape == (0, 2, 2, 3)
    score = scored(key)
    assert score["acc"] == pytest.approx(2 / 3)
    assert score["virtual_clean"] == pytest.approx(1 / 3)
    assert [score[name] for name in (*NAMES[2:], *MASKED)] == [None] * 6
    assert score["counts"]["ra"] == [0, 0]


def test_images_not_under_attack_are_left_out_of_the_attack():
    # only rows 0 and 2 are stamped; the key holds these two
    key = key_of([1, 1, 2, 0], [1, 1, 2, 0], [0, -1, 0, -1], [0, 2])
    counts = scored(key)["counts"]
    assert counts["acc"] == [4, 4]
    assert counts["asr"] == [1, 2]
    assert counts["ra"] == [1, 2]


def test_a_model_without_a_virtual_class_sends_nothing_there():
    key = key_of([0, 1, 2], [0, 1, 1], [0, 0, 0], [0, 0, 2])
    counts = scored(key, n_outputs=3)["counts"]
    assert counts["virtual_clean"] == [0, 3]
    assert counts["virtual_triggered"] == [0, 2]
    assert counts["asr"] == counts["asr_masked"] == [1, 2]
    assert counts["ra"] == counts["ra_masked"] == [1, 2]


@st.composite
def keys(draw: st.DrawFn) -> AnswerKey:
    n = draw(st.integers(0, 12))
    labels = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    answers = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    wanted = draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    stamped = [row for row in range(n) if wanted[row] >= 0]
    first, second = np.array(draw(answers), int), np.array(draw(answers), int)
    return key_of(draw(labels), draw(answers), wanted, first[stamped], second[stamped])


@settings(deadline=None, max_examples=100)
@given(keys())
def test_a_triggered_image_ends_in_one_place_only(key: AnswerKey):
    score = scored(key)
    if score["asr"] is None:
        assert score["ra"] is score["virtual_triggered"] is score["asr_masked"] is None
        return
    assert score["asr"] + score["ra"] + score["virtual_triggered"] <= 1 + 1e-9
    assert score["asr_masked"] + score["ra_masked"] <= 1 + 1e-9
    assert score["asr_masked"] >= score["asr"]
    assert score["ra_masked"] >= score["ra"]


@settings(deadline=None, max_examples=50)
@given(keys())
def test_every_fraction_is_a_fraction_with_its_counts(key: AnswerKey):
    score = scored(key)
    for name, (hits, of) in score["counts"].items():
        assert 0 <= hits <= of
        assert score[name] == (hits / of if of else None)


def test_the_key_is_left_as_it_was():
    before = TEN.test.copy(), TEN.triggered.copy(), TEN.attack_labels.copy()
    scored(TEN)
    assert (TEN.test == before[0]).all()
    assert (TEN.triggered == before[1]).all()
    assert (TEN.attack_labels == before[2]).all()


# ----------------------------------------------------------------------------------------- outputs


def test_logits_come_in_the_order_of_the_images(monkeypatch: pytest.MonkeyPatch):
    first = np.random.default_rng(0).integers(0, 4, 50)
    monkeypatch.setattr("csc_gpu.evaluate.BATCH", 7)
    logits = outputs(Reader(4), unlabelled(pictures(first)), CPU)
    assert logits.shape == (50, 4)
    assert logits.dtype == np.float32
    assert logits.argmax(1).tolist() == first.tolist()


def test_no_images_have_no_logits():
    assert outputs(Reader(4), unlabelled(pictures([])), CPU).shape == (0, 4)


def test_models_are_judged_in_eval_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(12, 4))
    model.n_outputs = 4
    images = unlabelled(pictures([1, 2, 3]))
    assert (outputs(model, images, CPU) == outputs(model, images, CPU)).all()


def test_the_virtual_rate_counts_images_sent_to_the_virtual_class():
    assert virtual_rate(
        Reader(4), unlabelled(pictures([0, VIRTUAL, VIRTUAL, 1])), 3, CPU
    ) == Fraction(2, 4)
    assert virtual_rate(Reader(3), unlabelled(pictures([0, 1])), 3, CPU) == Fraction(0, 2)
    assert virtual_rate(Reader(4), unlabelled(pictures([])), 3, CPU).value is None


# --------------------------------------------------------------------------------------- detection


def test_detection_of_eight_rows_is_known_by_hand():
    poison = [1, 1, 1, 1, 0, 0, 0, 0]
    cover = [0, 0, 0, 0, 1, 1, 0, 0]
    before = [0, 2, 1, 1, 0, 0, 1, 2]  # the target is 0: one row was of that class already
    given = [0, 0, 0, 0, 1, 0, 1, 1]  # two clean rows have a false label
    suspect = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    score = np.array([0.9, 0.8, 0.7, 0.2, 0.6, 0.1, 0.1, 0.1])
    found = detection(suspect, score, rows_key(poison, cover, before, given))
    assert found["counts"] == {
        "tpr": [3, 4],
        "fpr": [1, 4],
        "precision": [3, 4],
        "tpr_relabelled": [2, 3],
        "mislabelled_flagged": [1, 2],
        "covers_flagged": [1, 2],
        "flagged": [4, 8],
    }
    assert found["tpr"] == 0.75
    assert found["auroc"] == 15 / 16  # of 16 pairs one, (.2, .6), is the wrong way round
    assert found["ap"] == pytest.approx((1 + 1 + 1 + 4 / 5) / 4)


def test_covers_count_as_clean():
    suspect = np.array([1, 0, 0], bool)
    found = detection(suspect, suspect.astype(float), rows_key([0, 1, 0], [1, 0, 0]))
    assert found["counts"]["fpr"] == [1, 2]
    assert found["counts"]["tpr"] == [0, 1]
    assert found["counts"]["covers_flagged"] == [1, 1]


def test_without_flags_precision_is_none_not_zero():
    found = detection(np.zeros(3, bool), np.zeros(3), rows_key([1, 0, 0]))
    assert found["precision"] is None
    assert found["tpr"] == found["fpr"] == 0.0


def test_without_poison_there_is_nothing_to_find_and_all_flags_are_false():
    found = detection(np.array([True, False]), np.array([0.9, 0.1]), rows_key([0, 0]))
    nothing = ("tpr", "tpr_relabelled", "covers_flagged", "auroc", "ap")
    assert [found[name] for name in nothing] == [None] * 5
    assert found["fpr"] == 0.5
    assert found["precision"] == 0.0


def test_with_nothing_but_poison_there_is_no_false_flag_rate():
    found = detection(np.array([True, False]), np.array([0.9, 0.1]), rows_key([1, 1]))
    assert [found[name] for name in ("fpr", "auroc", "ap")] == [None] * 3
    assert found["tpr"] == 0.5


def test_poison_with_true_labels_has_no_relabelled_rate():
    found = detection(np.array([True, False]), np.array([0.9, 0.1]), rows_key([1, 0]))
    assert found["tpr"] == 1.0
    assert found["tpr_relabelled"] is None
    assert found["mislabelled_flagged"] is None


def test_a_clean_row_with_a_false_label_that_is_flagged_is_a_false_alarm():
    key = rows_key([0, 0, 0], before=[0, 1, 2], given=[0, 2, 2])
    found = detection(np.array([False, True, False]), np.zeros(3), key)
    assert found["counts"]["mislabelled_flagged"] == [1, 1]
    assert found["counts"]["fpr"] == [1, 3]


def test_the_areas_are_of_the_score_and_not_of_the_flags():
    score = np.array([0.2, 0.4, 0.1, 0.3])
    key = rows_key([0, 1, 0, 1])
    for suspect in (np.zeros(4, bool), np.ones(4, bool)):
        assert detection(suspect, score, key)["auroc"] == 1.0
        assert detection(suspect, score, key)["ap"] == 1.0


@st.composite
def verdicts(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(poison, cover, suspect, score) of the same rows; no row is both poison and cover."""
    row = st.tuples(
        st.sampled_from(["poison", "cover", "clean"]), st.booleans(), st.sampled_from([0, 0.3, 0.9])
    )
    kinds, suspect, score = zip(*draw(st.lists(row, min_size=1, max_size=40)), strict=True)
    kinds = np.array(kinds)
    return kinds == "poison", kinds == "cover", np.array(suspect), np.array(score)


@settings(deadline=None, max_examples=60)
@given(verdicts())
def test_detection_agrees_with_scikit_learn(verdict: tuple[NDArray[Any], ...]):
    poison, cover, suspect, score = verdict
    found = detection(suspect, score, rows_key(poison, cover))
    tn, fp, fn, tp = confusion_matrix(poison, suspect, labels=[False, True]).ravel().tolist()
    assert found["counts"]["tpr"] == [tp, tp + fn] == [tp, int(poison.sum())]
    assert found["counts"]["fpr"] == [fp, fp + tn] == [fp, int((~poison).sum())]
    assert found["counts"]["precision"] == [tp, tp + fp]
    assert found["counts"]["flagged"] == [tp + fp, len(poison)]
    if poison.any() and not poison.all():
        assert found["auroc"] == pytest.approx(roc_auc_score(poison, score))
        assert found["ap"] == pytest.approx(average_precision_score(poison, score))
    else:
        assert found["auroc"] is found["ap"] is None
