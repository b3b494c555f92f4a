"""Who is trained on what: a defense that finds the poison and then does nothing with it fails here.

The training loop is recorded instead of run, so that a whole defense takes no time. Where its nets
must know something, a lesson plants it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from csc_gpu import train as training
from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import DEFENSES, RESERVE, confusion, d_br, d_st, dbd, none_defense, strip
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.defenses.sensitivity import Parted
from csc_gpu.errors import ConfigError
from csc_gpu.models import blocks_of
from csc_gpu.types import Corpus, DefenderView, Outcome
from tests.test_defenses import clean, settings_of
from tests.test_gpu_backend import digits

CPU = open_backend("cpu", 1)
CORPUS, POISON = digits()
ALL = np.arange(len(CORPUS))
TRUSTED = clean(300, 360)


@dataclass(frozen=True)
class Lesson:
    """One call of the training loop."""

    model: nn.Module
    corpus: Corpus
    rows: np.ndarray
    how: training.Settings
    method: training.Method

    @property
    def labels(self) -> np.ndarray:
        """What is taught, row by row."""
        return self.corpus.labels[self.rows]

    def loss(self, logits: torch.Tensor, *rows: int, step: int = 1) -> torch.Tensor:
        """Of these rows, if the net said so. ()"""
        batch = next(CPU.batches(self.corpus, len(rows), order=np.array(rows)))
        return self.method.objective(lambda images: logits, batch, step)


@dataclass
class School:
    """The lessons of a run by stage, and what a net knows after one."""

    lessons: dict[str, Lesson] = field(default_factory=dict)
    plants: dict[str, Callable[[Any], None]] = field(default_factory=dict)

    def __getitem__(self, stage: str) -> Lesson:
        return self.lessons[stage]

    def train(
        self, model: nn.Module, corpus: Corpus, how: Any, backend: Any, **given: Any
    ) -> Iterator[training.Moment]:
        """In place of training.train."""
        name, rows, method = given["name"], given["rows"], given["method"]
        rows = np.arange(len(corpus)) if rows is None else rows
        assert name not in self.lessons
        self.lessons[name] = Lesson(model, corpus, rows, how, method)
        self.plants.get(name, nn.Module.eval)(model)
        return iter(())

    def run(self, name: str, **changes: Any) -> Outcome:
        """This defense of the digits; a change is to a section of its own name."""
        section = name.replace("-", "_")
        own = {f"{section}.{key}": value for key, value in changes.items()}
        trusted = TRUSTED if RESERVE in DEFENSES[name].needs else None
        settings = override(settings_of(name), own)
        return DEFENSES[name].run(DefenderView(CORPUS, trusted), settings, CPU, seed=1)


@pytest.fixture
def school(monkeypatch: pytest.MonkeyPatch) -> School:
    """A training loop that trains nothing."""
    there = School()
    monkeypatch.setattr(training, "train", there.train)
    return there


def saying(label: int) -> Callable[[Any], None]:
    """A net that calls everything so from now on."""

    def plant(model: Any) -> None:
        with torch.no_grad():
            model.head.bias[label] = 1e4

    return plant


def planted(*rows: int) -> np.ndarray:
    """These rows, or else the poison, as a mask."""
    return np.isin(ALL, rows) if rows else POISON.copy()


def same(rows: np.ndarray, mask: np.ndarray) -> None:
    """Rows in any order are those of the mask."""
    np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(mask))


# -------------------------------------------------------------------------------- first and last


SURE = {"spectral": {}, "spectre": {}, "strip": {}, "scan": {"index": 0.1}, "ct": {"surely": 1e-6}}
"""Settings by which even a net that knows nothing finds suspects."""


@pytest.mark.parametrize("name", SURE)
def test_suspects_are_what_the_last_training_leaves_out(school, name):
    outcome = school.run(name, **SURE[name])
    suspect = outcome.segregation.suspect
    assert 0 < suspect.sum() < len(suspect)
    same(school["train"].rows, planted(*ALL))
    same(school["retrain"].rows, ~suspect)
    assert school["retrain"].how == school["train"].how
    assert outcome.model is school["retrain"].model and outcome.undefended is school["train"].model


def test_without_suspects_the_first_net_is_the_last(school):
    outcome = Course(DefenderView(CORPUS), settings_of("plain"), CPU, seed=1).by_features(
        lambda points: verdict(planted(-1), np.zeros(len(ALL)), "none")
    )
    assert list(school.lessons) == ["train"] and outcome.model is outcome.undefended


@pytest.mark.parametrize("name", [name for name in DEFENSES if RESERVE in DEFENSES[name].needs])
def test_clean_images_are_asked_for_before_an_hour_is_spent(school, name):
    with pytest.raises(ConfigError):
        DEFENSES[name].run(DefenderView(CORPUS), settings_of(name), CPU, seed=1)
    assert not school.lessons


# --------------------------------------------------------------------------- what each is taught


def test_ac_teaches_suspects_the_label_that_a_net_gives_which_has_not_seen_them(school):
    school.plants["exclude"] = saying(3)
    suspect = school.run("ac", decide="size", size=0.45).segregation.suspect
    assert 0 < suspect.sum() < len(suspect)
    same(school["exclude"].rows, ~suspect)
    mended = school["repair"]
    np.testing.assert_array_equal(mended.labels, np.where(suspect, 3, CORPUS.labels))
    assert mended.model is not school["train"].model


def test_ac_can_leave_suspects_out_instead(school):
    suspect = school.run("ac", decide="size", size=0.45, repair="remove").segregation.suspect
    assert 0 < suspect.sum() < len(suspect)
    anew = school["retrain"]
    same(anew.rows, ~suspect)
    np.testing.assert_array_equal(anew.labels, CORPUS.labels[anew.rows])  # as they were given


def test_ct_fits_and_confuses_ever_fewer_rows_and_at_last_the_reserve_too(school):
    three = {"epochs": [1] * 3, "iterations": [4] * 3, "weight": [5] * 3, "lr": [0.01] * 3}
    school.run("ct", kept=[0.5, 0.2], least=[0.01, 0.01], every=[2] * 3, **three)
    half, fifth = len(ALL) // 2, len(ALL) // 5
    assert len(school["fit-0"].rows) == len(ALL)
    assert half <= len(school["fit-1"].rows) < half + 5
    assert fifth <= len(school["fit-2"].rows) - len(TRUSTED) < fifth + 5
    assert all(school[f"confuse-{number}"].corpus is TRUSTED for number in range(3))


def test_ct_asks_the_undefended_net_what_is_right(school):
    school.plants |= {"train": saying(2), "fit-0": saying(1), "fit-1": saying(1)}
    school.run("ct")
    for stage in ("confuse-0", "confuse-1"):
        logits = torch.zeros(5, 4, requires_grad=True)
        school[stage].loss(logits, *range(5), step=2).backward()
        assert logits.grad.argmin(1).tolist() == [0] * 5  # (2 + 1 + 1) mod 4; after a 1, a 3


def test_ct_weighs_the_classes_of_its_distilled_rows_until_only_these_are_left(school, monkeypatch):
    heard = []

    def listening(undefended, stream, weights, **how):
        heard.append(weights.numpy())
        return functional.cross_entropy

    monkeypatch.setattr(confusion, "confusion", listening)
    three = {"epochs": [1] * 3, "iterations": [4] * 3, "weight": [5] * 3, "lr": [0.01] * 3}
    school.run("ct", kept=[0.5, 0.2], least=[0.01, 0.01], every=[2] * 3, evening=0.1, **three)
    for number, weights in enumerate(heard[:2]):
        labels = school[f"fit-{number}"].labels
        share = np.bincount(labels, minlength=4) / len(labels)
        np.testing.assert_allclose(weights, (share + 0.1) ** -0.5, rtol=1e-6)
    assert heard[2].tolist() == [1] * 4


def test_abl_tunes_on_the_rows_that_are_left_and_unlearns_the_isolated(school):
    isolated = school.run("abl", share=0.1).segregation.suspect
    assert isolated.sum() == len(ALL) // 10
    same(school["isolate"].rows, planted(*ALL))
    same(school["tune"].rows, ~isolated)
    same(school["unlearn"].rows, isolated)
    assert school["unlearn"].loss(torch.eye(4)[:2], 0, 1) < 0


def test_abl_holds_the_loss_while_it_isolates_and_lets_it_fall_after(school):
    school.run("abl", gamma=0.5, hold="flooding", tuning=8, falls_at=3)
    sure = 20 * functional.one_hot(torch.from_numpy(CORPUS.labels[:3]).long(), 4).float()
    isolate, tune = school["isolate"], school["tune"]
    assert isolate.loss(sure, 0, 1, 2) == pytest.approx(1.0)  # gamma above it is gamma below
    assert tune.loss(sure, 0, 1, 2) == pytest.approx(0.0, abs=1e-6)
    budget = training.Budget(epochs=8, steps_per_epoch=10)
    assert [isolate.method.rate(step, budget) for step in (1, 80)] == [1, 1]
    rates = [tune.method.rate(step, budget) for step in (1, 30, 31, 80)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1])


def told_apart(module: Any, monkeypatch: pytest.MonkeyPatch) -> Parted:
    """Poison is taken for poison, and rows 1, 2, 4 and 9 for clean."""
    parted = Parted(planted(1, 2, 4, 9), planted(), POISON.astype(np.float32))
    assert not (parted.clean & parted.poison).any()
    monkeypatch.setattr(module, "tell_apart", lambda course, chosen: parted)
    return parted


def test_d_br_unlearns_poison_first_and_relearns_what_is_clean(school, monkeypatch):
    parted = told_apart(d_br, monkeypatch)
    school.run("d-br")
    lesson = school["remove"]
    same(lesson.rows, parted.poison | parted.clean)
    order = lesson.method.order(np.random.default_rng(0), lesson.rows)
    assert parted.poison[order[: parted.poison.sum()]].all()
    logits = torch.zeros(len(order), 4, requires_grad=True)
    lesson.loss(logits, *order).backward()
    own = logits.grad.numpy()[np.arange(len(order)), CORPUS.labels[order]]
    np.testing.assert_array_equal(own > 0, parted.poison[order])  # up: the loss is climbed
    assert lesson.model is not school["train"].model


def test_d_st_draws_clean_rows_to_their_label_and_unlearns_poison_with_the_head(
    school, monkeypatch
):
    parted = told_apart(d_st, monkeypatch)
    school.run("d-st")
    rows = [*np.flatnonzero(parted.clean), *np.flatnonzero(parted.poison)]
    points = functional.normalize(torch.linspace(0, 99, 12 * len(rows)).sin().reshape(-1, 6), dim=1)
    drawn = d_st.to_each_other(
        torch.from_numpy(CORPUS.labels[rows]), torch.from_numpy(parted.clean[rows])
    )
    expected = d_st.contrastive(points, drawn.repeat(2, 2), 0.1) * (0.1 / 0.07)
    torch.testing.assert_close(school["contrast"].loss(points, *rows), expected)
    same(school["contrast"].rows, planted(*ALL))
    same(school["head"].rows, parted.clean | parted.poison)
    logits = torch.zeros(len(rows), 4, requires_grad=True)
    school["head"].loss(logits, *rows).backward()
    own = logits.grad.numpy()[np.arange(len(rows)), CORPUS.labels[rows]]
    np.testing.assert_array_equal(own > 0, parted.poison[rows])


def test_dbd_believes_the_half_of_the_lowest_losses(school, monkeypatch):
    lost = np.random.default_rng(0).permutation(len(ALL)).astype(np.float32)
    monkeypatch.setattr(dbd, "losses", lambda net, course, chosen: lost)
    low = lost < len(ALL) // 2
    suspect = school.run("dbd").segregation.suspect
    np.testing.assert_array_equal(suspect, ~low)
    for stage, rows in (("simclr", planted(*ALL)), ("head", planted(*ALL)), ("mixmatch", low)):
        same(school[stage].rows, rows)


@pytest.mark.parametrize(("name", "stage"), [("dbd", "simclr"), ("d-st", "contrast")])
@pytest.mark.parametrize("flip", [False, True])
def test_views_are_mirrored_only_if_images_may_be(school, monkeypatch, name, stage, flip):
    shown: list[torch.Tensor] = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        shown.append(images[:, 0, 4])
        return functional.normalize(images.flatten(1), dim=1)

    still = {"smallest": 1.0, "stretch": 1.0, "jittered": 0.0, "grey": 0.0}
    settings = override(settings_of(name), {f"views.{key}": at for key, at in still.items()})
    settings = override(settings, {"train.flip": flip})
    DEFENSES[name].run(DefenderView(CORPUS), settings, CPU, seed=1)
    slope = torch.linspace(-1, 1, 8).expand(40, 3, 8, 8)  # left to right
    rows = torch.arange(40)
    school[stage].method.objective(forward, Batch(slope, rows % 4, rows), 1)
    mirrored = shown[0][:, 0] > shown[0][:, -1]
    assert not mirrored.any() if not flip else 20 < mirrored.sum() < 60
    assert not school[stage].how.flip  # the views are the augmentation


# ---------------------------------------------------------------------------------- what is cured


def test_strip_removes_the_rows_that_keep_their_prediction(school, monkeypatch):
    usual = np.linspace(1.0, 2.0, len(TRUSTED))

    def entropies(model, corpus, *rest, **how):
        return usual if corpus is TRUSTED else np.where(POISON, 0.2, 1.5)

    monkeypatch.setattr(strip, "entropies", entropies)
    np.testing.assert_array_equal(school.run("strip").segregation.suspect, POISON)
    same(school["retrain"].rows, ~POISON)


def test_nc_unlearns_the_one_small_trigger_on_clean_images(school):
    small = 2

    @torch.no_grad()
    def shrink(trigger: Any) -> None:
        trigger.hidden_mask.fill_(-2.0)
        trigger.hidden_pattern.fill_(9.0)  # white

    school.plants[f"trigger-{small}"] = shrink
    outcome = school.run("nc", index=2.0, unlearn_share=1.0)
    lesson = school["unlearn"]
    assert lesson.corpus is TRUSTED and lesson.model is outcome.model
    assert lesson.model is not outcome.undefended
    shown: list[torch.Tensor] = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        shown.append(images)
        return torch.zeros(len(images), 4)

    batch = next(CPU.batches(TRUSTED, 8))
    lesson.method.objective(forward, batch, 1)
    trigger = school[f"trigger-{small}"].model
    torch.testing.assert_close(shown[0], trigger(batch.images).detach())


def test_none_resets_the_channel_that_fires_for_poison_and_drops_its_rows(school, monkeypatch):
    planted_at = 7

    def activations(model, corpus, backend):
        layers = list(none_defense.layers(model))
        widths = [layer.convolution.out_channels for layer in layers]
        fired = [np.zeros((len(ALL), width), np.float32) for width in widths]
        for values in fired:
            values[:, planted_at] = 50.0 * POISON
        return fired, np.eye(4, dtype=np.float32)[CORPUS.labels]

    monkeypatch.setattr(none_defense, "activations", activations)
    outcome = school.run("none-defense", most=0.001)  # one channel of each
    np.testing.assert_array_equal(outcome.segregation.suspect, POISON)
    same(school["fine-tune"].rows, ~POISON)
    for layer in none_defense.layers(outcome.model):
        silent = layer.convolution.weight.flatten(1).abs().sum(1) == 0
        assert silent.nonzero()[:, 0].tolist() == [planted_at]
    assert school["fine-tune"].model is outcome.model
    for layer in none_defense.layers(outcome.undefended):
        assert layer.convolution.weight.flatten(1).abs().sum(1).all()


def test_nad_distils_from_a_teacher_that_clean_images_have_tuned(school):
    @torch.no_grad()
    def elsewhere(model: Any) -> None:
        for block in blocks_of(model, "nad"):
            block.conv2.weight.normal_(generator=torch.Generator().manual_seed(0))

    school.plants["teacher"] = elsewhere
    outcome = school.run("nad")
    teacher, student = school["teacher"], school["student"]
    assert teacher.corpus is student.corpus is TRUSTED
    assert student.model is outcome.model
    assert len({id(net) for net in (outcome.undefended, teacher.model, student.model)}) == 3
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    batch = next(CPU.batches(TRUSTED, 8))
    student.model.eval()
    plain = functional.cross_entropy(student.model(batch.images), batch.labels)
    assert student.method.objective(student.model, batch, 1) > plain + 0.01
