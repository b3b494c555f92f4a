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
from csc_gpu.features import predict
from csc_gpu.models import Net, new_model
from csc_gpu.recover import Recovered, Settings, recover
from csc_gpu.train import Settings as Training
from csc_gpu.types import Corpus
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


def recovered(
    without: Any, backend: Any = CPU, suspect: Any = SUSPECT, **changes: Any
) -> Recovered:
    how = Settings(on=True, **changes)
    return recover(corpus(40), suspect, without, untrained, THREE_EPOCHS, how, backend, seed=3)


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


def test_the_net_of_the_check_is_known_for_rows_it_has_not_seen():
    there = witness(corpus(40), controls=0.1)
    assert there.without(SUSPECT) is None  # nothing is trained yet
    check = there.reclassify(SUSPECT)
    net = there.without(SUSPECT)
    assert net is not None and net is not there._model
    assert there.without(SUSPECT | check.controls) is net
    seen = ~SUSPECT & ~check.controls
    assert there.without(SUSPECT | (np.arange(40) == np.flatnonzero(seen)[0])) is None
    assert (predict(net, corpus(40), CPU) == check.predicted).all()


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


def test_a_net_that_saw_no_suspect_is_handed_out_and_nothing_is_trained():
    net, spy = untrained(7), Spy()
    found = recovered(lambda rows: net if rows is SUSPECT else None, spy)
    assert found.model is net
    assert found.source == "check"
    assert spy.rows == []


def test_where_none_is_known_one_is_trained_without_the_suspects_as_long_as_the_first():
    spy = Spy()
    found = recovered(lambda rows: None, spy)
    assert found.source == "scratch"
    assert sorted(spy.rows) == sorted(3 * list(range(6, 40)))
    assert found.model.n_outputs == 2


def test_from_scratch_a_net_is_trained_whatever_is_known():
    net, spy = untrained(7), Spy()
    found = recovered(lambda rows: net, spy, source="scratch")
    assert found.model is not net
    assert found.source == "scratch"
    assert sorted(spy.rows) == sorted(3 * list(range(6, 40)))


def test_the_same_seed_recovers_the_same_net():
    one, two = (recovered(lambda rows: None).model.head.weight for _ in range(2))
    assert torch.equal(one, two)


def test_a_source_that_is_unknown_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"recover\.source"):
        Settings(source="memory")
