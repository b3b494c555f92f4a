"""Laws of every defense: what it returns, what it leaves alone, and that it repeats itself.

A new defense is tested here without a line; what only it can get wrong is in a file of its own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from csc_gpu.backend import open_backend
from csc_gpu.config import names, override
from csc_gpu.defenses import DEFENSES, RATE, RESERVE
from csc_gpu.errors import ConfigError, CorpusError, TrainingDiverged
from csc_gpu.types import Corpus, DefenderView, Outcome
from tests.test_gpu_backend import digits
from tests.worlds import world

CPU = open_backend("cpu", 1)
RIVALS = [name for name in DEFENSES if name != "csc"]
JUDGES = [name for name in DEFENSES if DEFENSES[name].judge]
QUICK = {"train.model": "resnet8", "train.epochs": 3, "train.min_steps": 0, "train.batch": 32}
SHORT: dict[str, dict[str, Any]] = {
    "ac": {"ac.dims": 3, "ac.repair_epochs": 1},  # few rows have few independent components
    "strip": {"strip.overlays": 4},
    "ct": {
        "ct.kept": [0.2],
        "ct.least": [0.05],
        "ct.epochs": [2, 2],
        "ct.iterations": [4, 4],
        "ct.weight": [5, 5],
        "ct.lr": [0.01, 0.01],
        "ct.every": [2, 2],
        "ct.batch": 16,
    },
    "abl": {"abl.isolating": 2, "abl.tuning": 2, "abl.unlearning": 2},
    "d-br": {"sensitivity.epochs": 1, "sensitivity.apart_epochs": 1, "d_br.epochs": 2},
    "d-st": {
        "sensitivity.epochs": 1,
        "sensitivity.apart_epochs": 1,
        "d_st.epochs": 2,
        "d_st.batch": 64,
        "d_st.head_epochs": 2,
    },
    "nad": {"nad.teacher_epochs": 1, "nad.epochs": 2, "nad.min_steps": 0},
    "nc": {"nc.epochs": 2, "nc.unlearn_epochs": 2, "nc.index": 0.5},
    "dbd": {
        "dbd.self_epochs": 1,
        "dbd.self_batch": 64,
        "dbd.head_epochs": 1,
        "dbd.semi_epochs": 1,
        "dbd.iterations": 4,
        "dbd.semi_batch": 32,
    },
    "none-defense": {"none_defense.epochs": 1},
}
"""Settings that make a defense's own trainings short enough for a test, by name."""


def settings_of(name: str) -> Any:
    return override(DEFENSES[name].settings(), QUICK | SHORT.get(name, {}))


def clean(start: int, stop: int) -> Corpus:
    """Digits 0 to 3 as they are; the poisoned ones of `digits` are the first 240."""
    found = load_digits(n_class=4)
    pixels = (found.images[start:stop, ..., None] * 15).astype(np.uint8).repeat(3, axis=3)
    rows = np.arange(stop - start)
    names = ("",) * len(rows)
    return Corpus(found.target[start:stop].astype(np.int64), tuple("0123"), rows, names, pixels)


def ran(name: str, corpus: Corpus, seed: int = 1) -> Outcome:
    trusted = clean(300, 360) if RESERVE in DEFENSES[name].needs else None
    return DEFENSES[name].run(DefenderView(corpus, trusted), settings_of(name), CPU, seed=seed)


def state(model: torch.nn.Module) -> str:
    parts = [value.detach().numpy().tobytes() for value in model.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module", params=RIVALS)
def one(request):
    """A defense that has run once, and the corpus."""
    corpus, _ = digits()
    before = corpus.images.copy(), corpus.labels.copy()
    outcome = ran(request.param, corpus)
    np.testing.assert_array_equal(corpus.images, before[0])
    np.testing.assert_array_equal(corpus.labels, before[1])
    return request.param, corpus, outcome


def test_an_outcome_has_a_model_of_the_corpus_and_seconds_of_each_stage(one):
    _, corpus, outcome = one
    assert outcome.n_classes == corpus.n_classes
    assert outcome.model.n_outputs in (corpus.n_classes, corpus.n_classes + 1)
    assert outcome.undefended is None or outcome.undefended.n_outputs == corpus.n_classes
    assert outcome.seconds and all(seconds >= 0 for seconds in outcome.seconds.values())


def test_suspects_score_half_and_more_and_the_others_less(one):
    _, corpus, outcome = one
    told = outcome.segregation
    if told is None:
        return
    assert told.suspect.shape == told.score.shape == (len(corpus),)
    assert told.suspect.dtype == bool
    assert (told.score >= 0).all() and (told.score <= 1).all()
    np.testing.assert_array_equal(told.score >= 0.5, told.suspect)


def test_the_same_seed_gives_the_same_answer(one):
    name, corpus, outcome = one
    again = ran(name, corpus)
    assert state(again.model) == state(outcome.model)
    if outcome.segregation is not None:
        np.testing.assert_array_equal(again.segregation.suspect, outcome.segregation.suspect)
        np.testing.assert_array_equal(again.segregation.score, outcome.segregation.score)


@pytest.mark.parametrize("name", [name for name in DEFENSES if RESERVE in DEFENSES[name].needs])
def test_a_defense_without_the_clean_images_it_needs_says_so(name):
    corpus, _ = digits()
    with pytest.raises(ConfigError, match="--reserve"):
        DEFENSES[name].run(DefenderView(corpus), settings_of(name), CPU, seed=1)


@pytest.mark.parametrize("name", list(DEFENSES))
def test_a_defense_has_the_common_settings_and_the_one_that_it_needs(name):
    known = names(DEFENSES[name].settings())
    assert {"data.size", "train.epochs", "gpu.memory", "checkpoint.minutes"} <= set(known)
    assert RATE not in DEFENSES[name].needs or f"{name}.rate" in known


@pytest.mark.parametrize("name", JUDGES)
def test_shuffled_features_give_shuffled_verdicts(name):
    there, judge, how = world(3), DEFENSES[name].judge, settings_of(name)
    order = np.random.default_rng(1).permutation(len(there.labels))
    one = judge(there.points, there.labels, how, CPU, seed=0)
    two = judge(there.points[order], there.labels[order], how, CPU, seed=0)
    np.testing.assert_array_equal(one.suspect[order], two.suspect)


@pytest.mark.parametrize("name", [n for n in JUDGES if RATE not in DEFENSES[n].needs])
def test_a_clean_world_has_few_suspects(name):
    there = world(3, poison=0)
    told = DEFENSES[name].judge(there.points, there.labels, settings_of(name), CPU, seed=0)
    assert told.suspect.mean() < 0.05


@pytest.mark.parametrize("name", JUDGES)
def test_an_island_of_another_class_is_found(name):
    there = world(3)
    how = settings_of(name)
    if RATE in DEFENSES[name].needs:
        how = override(how, {f"{name}.rate": float(there.poison.mean())})
    told = DEFENSES[name].judge(there.points, there.labels, how, CPU, seed=0)
    assert told.suspect[there.poison].mean() > 0.95


@pytest.mark.parametrize("name", ["none-defense", "nad", "dp-sgd"])
def test_one_that_looks_into_our_nets_refuses_those_of_a_library(name):
    pytest.importorskip("timm")
    settings = override(settings_of(name), {"train.model": "timm:test_resnet"})
    view = DefenderView(digits()[0].take(np.arange(24)), clean(300, 320))
    with pytest.raises(ConfigError, match=r"train\.model"):
        DEFENSES[name].run(view, settings, CPU, seed=1)


def test_a_net_that_diverged_is_no_outcome():
    settings = override(settings_of("plain"), {"train.lr": 1e9, "train.epochs": 1})
    with pytest.raises(TrainingDiverged):
        DEFENSES["plain"].run(DefenderView(digits()[0]), settings, CPU, seed=1)


def test_too_few_clean_images_to_train_on_are_refused_in_one_line():
    view = DefenderView(digits()[0].take(np.arange(24)), clean(300, 301))
    with pytest.raises(CorpusError, match="too few to train on"):
        DEFENSES["nad"].run(view, settings_of("nad"), CPU, seed=1)
