"""The witness of a run and the recovered net: who has learnt from which rows, and how long."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from csc_gpu import segregate
from csc_gpu.backend import open_backend
from csc_gpu.errors import ConfigError
from csc_gpu.models import Net, new_model
from csc_gpu.recover import Recovered, Settings, left_out, recover
from csc_gpu.train import Settings as Training
from csc_gpu.types import Corpus, Segregation
from csc_gpu.witness import Trained
from tests.test_train import Spy, corpus

CPU = open_backend("cpu", 1)
THREE_EPOCHS = Training(model="resnet8", epochs=3, min_steps=0, batch=8)
SUSPECT = np.arange(40) < 6


def untrained(seed: int) -> Net:
    return new_model("resnet8", 2, 8, seed=seed)


def witness(there: Corpus, backend: Any = CPU, **changes: Any) -> Trained:
    """The witness of a training that has not begun."""
    how = segregate.Settings(**changes)
    clock = lambda stage: nullcontext()  # noqa: E731
    return Trained(untrained(0), there, untrained, THREE_EPOCHS, how, backend, clock, seed=3)


def recovered(backend: Any = CPU) -> Recovered:
    return recover(corpus(40), SUSPECT, untrained, THREE_EPOCHS, backend, seed=3)


# ----------------------------------------------------------------------------------------- witness


def test_the_check_is_trained_without_candidates_and_controls():
    spy = Spy()
    check = witness(corpus(40), spy, controls=0.3, check_epochs=2).reclassify(SUSPECT)
    assert 0 < check.controls.sum() < 30
    assert not (check.controls & SUSPECT).any()
    learnt = np.flatnonzero(~SUSPECT & ~check.controls)
    trained = spy.rows[: 2 * len(learnt)]
    assert sorted(trained) == sorted([*learnt, *learnt])  # check_epochs is less than epochs
    assert sorted(spy.rows[len(trained) :]) == list(range(40))  # every row is predicted, once
    assert check.candidates is SUSPECT
    assert check.predicted.dtype == np.int64


def test_the_check_is_trained_no_longer_than_the_model():
    spy = Spy()
    check = witness(corpus(40), spy, check_epochs=50).reclassify(SUSPECT)
    learnt = int((~SUSPECT & ~check.controls).sum())
    assert len(spy.rows) == 3 * learnt + 40


def test_features_are_computed_once_however_often_they_are_asked_for():
    spy = Spy()
    there = witness(corpus(40), spy)
    assert there.points() is there.points()
    assert spy.rows == list(range(40))
    assert there.points().shape == (40, 128)


def test_the_witness_tries_a_pattern_on_its_own_model(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "csc_gpu.witness.trigger.transfers", lambda *words: (asked.append(words), 0.75)[1]
    )
    there = witness(corpus(40))
    assert there.transfers(SUSPECT, ~SUSPECT, 1) == 0.75
    ((model, _, group, rest, label, _),) = asked
    assert model is there._model
    assert group is SUSPECT and (rest == ~SUSPECT).all() and label == 1


# ----------------------------------------------------------------------------------------- recover


def test_a_net_is_trained_without_the_unwanted_rows_as_long_as_the_first():
    spy = Spy()
    found = recovered(spy)
    assert sorted(spy.rows) == sorted(3 * list(range(6, 40)))
    assert found.model.n_outputs == 2
    assert (found.without == SUSPECT).all()


def test_the_same_seed_recovers_the_same_net():
    one, two = (recovered().model.head.weight for _ in range(2))
    assert torch.equal(one, two)


def test_left_out_are_the_suspects_and_the_doubtful_rows_of_their_labels():
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    suspect = np.array([1, 0, 0, 0, 0, 0, 0, 0], bool)
    score = np.array([0.9, 0.3, 0.02, 0.01, 0.0, 0.4, 0.0, 0.3], np.float32)
    verdict = Segregation(suspect, score, {}, {})
    rows = np.flatnonzero(left_out(verdict, labels, Settings(doubt=0.02)))
    assert rows.tolist() == [0, 1, 2]  # nobody of label 1 is suspect, so nobody is doubted
    assert np.flatnonzero(left_out(verdict, labels, Settings(doubt=1.0))).tolist() == [0]


def test_doubt_takes_no_more_than_half_of_a_labels_other_rows():
    labels = np.array([0] * 6 + [1] * 3)
    suspect = np.array([1, 1, 0, 0, 0, 0, 1, 0, 0], bool)
    score = np.array([0.9, 0.9, 0.03, 0.05, 0.04, 0.5, 0.9, 0.3, 0.0], np.float32)
    verdict = Segregation(suspect, score, {}, {})
    rows = np.flatnonzero(left_out(verdict, labels, Settings(doubt=0.02)))
    assert rows.tolist() == [0, 1, 3, 5, 6, 7]  # 2 and 4 are doubtful, too, but less
    rows = np.flatnonzero(left_out(verdict, labels, Settings(doubt=0.02, most=1.0)))
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_doubt_that_is_no_score_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"recover\.doubt"):
        Settings(doubt=1.5)
