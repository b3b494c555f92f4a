"""The whole defense: learning and concluding are all of it, and what is kept is what was seen."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from csc_gpu import csc, recover, sources
from csc_gpu.backend import open_backend
from csc_gpu.conceal import Settings as Concealment
from csc_gpu.data import Settings as Reading
from csc_gpu.segregate import Settings as Segregation
from csc_gpu.train import Settings as Training
from csc_gpu.types import DefenderView
from tests.test_gpu_backend import digits

CPU = open_backend("cpu", 1)


def settings_of(*, keep: bool = False, recovering: bool = False, **changes: object) -> csc.Settings:
    return csc.Settings(
        train=Training(model="resnet8", epochs=8, min_steps=0, batch=32),
        watch=csc.Watch(epochs=4, keep=keep),
        segregate=Segregation(check_epochs=2, persistence=2, min_rows=5, **changes),
        conceal=Concealment(epochs=2, batch=32),
        recover=recover.Settings(on=recovering),
    )


def same_weights(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_to_defend_is_to_learn_and_to_conclude():
    corpus, _ = digits()
    how = settings_of(keep=True, recovering=True)
    whole = csc.defend(DefenderView(corpus), how, CPU, seed=1)
    clock = csc.Stopwatch(CPU)
    learnt = csc.learn(corpus, how, CPU, clock, seed=1)
    assert same_weights(learnt.model, whole.undefended)
    assert set(clock.seconds) == {"train", "features", "cluster"} == set(clock.cpu_seconds)
    parts = csc.conclude(learnt, corpus, how, CPU, clock, seed=1)
    assert whole.segregation.suspect.any()
    np.testing.assert_array_equal(whole.segregation.suspect, parts.segregation.suspect)
    np.testing.assert_array_equal(whole.segregation.score, parts.segregation.score)
    assert same_weights(whole.model, parts.model)
    assert same_weights(whole.recovered.model, parts.recovered.model)
    assert (whole.recovered.without == parts.recovered.without).all()
    assert (whole.recovered.without >= whole.segregation.suspect).all()
    assert whole.seconds.keys() == parts.seconds.keys() == parts.cpu_seconds.keys()
    assert whole.snapshots.keys() == parts.snapshots.keys() == {"features", "epoch", "final"}
    for name, kept in whole.snapshots.items():
        np.testing.assert_array_equal(kept, parts.snapshots[name])


def test_a_stage_in_another_counts_for_itself_alone_also_in_processor_seconds():
    told = iter([0.0, 1.0, 4.0, 10.0])
    clock = csc.Stopwatch(SimpleNamespace(stage=nullcontext, cpu_seconds=lambda: next(told)))
    with clock("train"), clock("features"):
        pass
    assert clock.cpu_seconds == {"features": 3.0, "train": 7.0}
    clock = csc.Stopwatch(SimpleNamespace(stage=nullcontext, cpu_seconds=lambda: None))  # a GPU
    with clock("train"):
        pass
    assert clock.cpu_seconds == {} and set(clock.seconds) == {"train"}


def test_what_was_learnt_may_be_judged_by_another_rule():
    """Clusterings are kept, not verdicts: concluding twice is training once."""
    corpus, _ = digits()
    learnt = csc.learn(corpus, settings_of(), CPU, csc.Stopwatch(CPU), seed=1)
    for rule in ("persistence", "text"):
        how = settings_of(rule=rule, latest=4)
        told = csc.conclude(learnt, corpus, how, CPU, csc.Stopwatch(CPU), seed=1).segregation
        assert told.notes["rule"] == rule
        whole = csc.defend(DefenderView(corpus), how, CPU, seed=1).segregation
        np.testing.assert_array_equal(told.suspect, whole.suspect)


@pytest.mark.parametrize(
    ("keep", "rule", "seen", "kept"),
    [
        (False, "persistence", 2, 0),
        (True, "persistence", 2, 4),
        (True, "text", 4, 4),
    ],
)
def test_snapshots_that_do_not_count_are_kept_if_asked_for_but_not_clustered(
    keep: bool, rule: str, seen: int, kept: int
):
    corpus, _ = digits(80)
    how = settings_of(keep=keep, rule=rule, latest=2)
    learnt = csc.learn(corpus, how, CPU, csc.Stopwatch(CPU), seed=1)
    assert [sighting.epoch for sighting in learnt.sightings] == [1, 2, 3, 4]
    clustered = [bool(sighting.clusterings) for sighting in learnt.sightings]
    assert clustered == [False] * (4 - seen) + [True] * seen
    assert [epoch for epoch, _ in learnt.kept] == list(range(1, kept + 1))
    assert all(points.shape == (80, 128) for _, points in learnt.kept)


def test_nothing_is_recovered_where_nobody_is_suspect_or_nobody_asked():
    corpus, _ = digits()
    calm = settings_of(recovering=True, rule="persistence", coarsest=0.05, min_share=1.0)
    told = csc.defend(DefenderView(corpus), calm, CPU, seed=1)
    assert not told.segregation.suspect.any()
    assert told.recovered is None
    assert told.model is told.undefended
    assert csc.defend(DefenderView(corpus), settings_of(), CPU, seed=1).recovered is None


@pytest.mark.parametrize("merged", [lambda y: y // 2, lambda y: y % 4, lambda y: y // 3])
def test_classes_of_several_kinds_each_are_suspected_and_go_free(merged):
    """Digits in four or five labels: their kinds lie apart and command labels as triggers do.

    Of four labels a check that never saw a kind gives it all three others: 138 rows were flagged.
    """
    found = sources.load("digits", Reading(), backend=CPU).train
    labels = merged(found.labels)
    paired = replace(found, labels=labels, classes=tuple("01234"[: labels.max() + 1]))
    how = csc.Settings(train=Training(model="resnet8"))
    outcome = csc.defend(DefenderView(paired), how, CPU, seed=0)
    notes = outcome.segregation.notes
    assert notes["suspected_labels"] and notes["cleared_labels"] == notes["suspected_labels"]
    assert not outcome.segregation.suspect.any()
