"""The training loop and the features: steps, learning rates, and what they leave alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from csc_gpu.backend import Augment, Backend, Batch, open_backend
from csc_gpu.backend.resident import to_float
from csc_gpu.checkpoint import Folder, Record, from_bytes, to_bytes
from csc_gpu.errors import ConfigError
from csc_gpu.features import BATCH, features, predict
from csc_gpu.models import Net, new_model
from csc_gpu.train import (
    Budget,
    Method,
    Moment,
    Settings,
    budget,
    cross_entropy,
    one_cycle,
    train,
)
from csc_gpu.types import Corpus

CPU = open_backend("cpu", 1)
ONE_EPOCH = Settings(model="resnet8", epochs=1, min_steps=0, batch=8)
Weights = dict[str, torch.Tensor]


def corpus(n: int = 20, classes: int = 2, size: int = 8, seed: int = 0) -> Corpus:
    """Class 0 is dark and class 1 bright, with some noise."""
    labels = np.arange(n) % classes
    noise = np.random.default_rng(seed).integers(0, 60, (n, size, size, 3))
    pixels = (noise + 180 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8)
    names = tuple(str(label) for label in range(classes))
    return Corpus(labels, names, np.arange(n), ("",) * n, pixels)


def weights(model: Net) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def trained(there: Corpus, plan: Settings, seed: int = 0, **more: Any) -> tuple[Net, list[Moment]]:
    model = new_model("resnet8", there.n_classes, there.images.shape[1], seed=0)
    return model, list(train(model, there, plan, CPU, seed=seed, **more))


@dataclass
class Spy:
    """A backend that notes what is asked of it and what it hands out."""

    inner: Backend = CPU
    rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    asked: list[Augment | None] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def batches(self, corpus: Corpus, size: int, **more: Any) -> Iterator[Batch]:
        self.asked.append(more.get("augment"))
        for batch in self.inner.batches(corpus, size, **more):
            self.rows += batch.rows.tolist()
            self.labels += batch.labels.tolist()
            yield batch


# ----------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("rows", "changes", "epochs", "steps"),
    [
        (100, {"epochs": 3, "batch": 10, "min_steps": 0}, 3, 10),
        (101, {"epochs": 3, "batch": 10, "min_steps": 0}, 3, 11),
        (5, {"epochs": 3, "batch": 10, "min_steps": 0}, 3, 1),
        (100, {"epochs": 3, "batch": 10, "min_steps": 30}, 3, 10),
        (100, {"epochs": 3, "batch": 10, "min_steps": 31}, 4, 10),
        (100, {"epochs": 1, "batch": 10, "min_steps": 600}, 60, 10),
        (1437, {}, 50, 12),  # 600 / 12
        (50_000, {}, 10, 391),
        (50_000, {"model": "resnet18"}, 100, 391),
    ],
)
def test_few_rows_get_more_epochs_until_there_are_steps_enough(
    rows: int, changes: dict[str, Any], epochs: int, steps: int
):
    assert budget(rows, Settings(**{"model": "resnet8"} | changes)) == Budget(epochs, steps)


def test_a_budget_counts_all_its_steps():
    assert Budget(epochs=3, steps_per_epoch=11).steps == 33


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model": "resnet9"}, "model"),
        ({"batch": 0}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"epochs": -1}, "epochs"),
        ({"min_steps": -1}, "min_steps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup": -1.0}, "warmup"),
        ({"momentum": 1.0}, "momentum"),
        ({"shift": 0.5}, "shift"),
        ({"shift": -0.1}, "shift"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(changes: dict[str, Any], name: str):
    with pytest.raises(ConfigError, match=f"train.{name}"):
        Settings(**changes)


# ---------------------------------------------------------------------------------- learning rate


def test_the_rate_of_ten_steps_is_known_by_hand():
    rates = [one_cycle(step, 2.0, 10) for step in range(1, 11)]
    assert rates == pytest.approx(
        [1 / 2, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]
    )


@settings(deadline=None, max_examples=100)
@given(steps=st.integers(1, 3000), share=st.floats(0, 0.2))
def test_the_rate_rises_then_falls_and_ends_near_zero(steps: int, share: float):
    warmup = share * steps
    rates = np.array([one_cycle(step, warmup, steps) for step in range(1, steps + 1)])
    rise = math.floor(warmup)
    assert (np.diff(rates[:rise]) > 0).all()
    assert (np.diff(rates[rise:]) < 0).all()
    assert rates.min() > 0
    assert rates.max() <= 1
    assert rates.max() >= 1 - 1.5 / steps
    assert rates[-1] <= 1.5 / (0.8 * steps)


def test_every_step_trains_at_the_rate_it_reports():
    plan = Settings(model="resnet8", epochs=10, min_steps=0, batch=10, lr=0.5, warmup=1.0)
    _, moments = trained(corpus(20), plan)
    rates = [moment.lr for moment in moments]
    assert rates == pytest.approx([0.5 * one_cycle(step, 2.0, 20) for step in range(1, 21)])
    assert max(rates) == 0.5


def test_the_first_step_is_that_of_sgd_at_its_rate():
    plan = Settings(
        model="resnet8", epochs=10, min_steps=0, batch=20, lr=0.1, warmup=2.0, shift=0.0
    )
    plan_rate = 0.1 * 1 / 2  # the first of two steps of warm-up
    there = corpus(20)
    model = new_model("resnet8", 2, 8, seed=0)
    twin = new_model("resnet8", 2, 8, seed=0).train()
    next(train(model, there, plan, CPU, seed=0))
    loss = torch.nn.functional.cross_entropy(
        twin(to_float(torch.from_numpy(there.images))), torch.from_numpy(there.labels)
    )
    loss.backward()
    for (name, now), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        slope = before.grad + plan.weight_decay * before
        wanted = before - plan_rate * (1 + plan.momentum) * slope  # Nesterov's first step
        torch.testing.assert_close(now, wanted, rtol=1e-3, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------ steps


def test_there_is_one_yield_a_step():
    plan = Settings(model="resnet8", epochs=3, min_steps=0, batch=8)
    _, moments = trained(corpus(20), plan)
    assert [moment.step for moment in moments] == list(range(1, 10))
    assert [moment.epoch for moment in moments] == pytest.approx([s / 3 for s in range(1, 10)])
    assert {moment.budget for moment in moments} == {Budget(3, 3)}
    assert all(moment.loss.shape == () and not moment.loss.requires_grad for moment in moments)


def both_views(forward: Any, batch: Batch, step: int) -> torch.Tensor:
    """Two views of each image, after a guess that no gradient goes through."""
    with torch.no_grad():
        forward(batch.images)
    return forward(torch.cat([batch.images, batch.images])).square().mean()


def test_images_are_counted_as_often_as_a_loss_goes_back_through_them():
    plan = Settings(model="resnet8", epochs=2, min_steps=0, batch=8)

    def apart(forward: Any, batch: Batch, step: int) -> torch.Tensor:
        return model(batch.images).square().mean()  # by a pass of its own

    for objective, images in ((cross_entropy, 40), (both_views, 80), (apart, 40)):
        model = new_model("resnet8", 2, 8, seed=0)
        *_, last = train(model, corpus(20), plan, CPU, seed=0, method=Method(objective=objective))
        assert last.images == images


def test_a_training_that_goes_on_knows_the_images_of_before(tmp_path: Path):
    plan = Settings(model="resnet8", epochs=2, min_steps=0, batch=8)
    kept = Folder(tmp_path, minutes=60)
    how: dict[str, Any] = {"seed": 0, "kept": kept, "method": Method(objective=both_views)}
    steps = train(new_model("resnet8", 2, 8, seed=0), corpus(20), plan, CPU, **how)
    assert [next(steps).step for _ in range(3)][-1] == 3  # one epoch
    steps.close()
    again = list(train(new_model("resnet8", 2, 8, seed=0), corpus(20), plan, CPU, **how))
    assert [(again[0].step, again[0].images), again[-1].images] == [(3, 40), 80]
    (file,) = tmp_path.iterdir()
    before = from_bytes(file.read_bytes())  # as a record of earlier versions: nobody counted
    facts = {name: value for name, value in before.facts.items() if name != "images"}
    file.write_bytes(to_bytes(Record(before.tensors, facts)))
    (only,) = train(new_model("resnet8", 2, 8, seed=0), corpus(20), plan, CPU, **how)
    assert only.images == 40


def test_the_caller_decides_when_to_stop():
    model = new_model("resnet8", 2, 8, seed=0)
    steps = train(model, corpus(), ONE_EPOCH, CPU, seed=0)
    next(steps)
    after_one = weights(model)
    steps.close()
    assert equal(weights(model), after_one)


def test_nothing_happens_before_the_first_step_is_asked_for():
    model = new_model("resnet8", 2, 8, seed=0)
    before = weights(model)
    train(model, corpus(), ONE_EPOCH, CPU, seed=0)
    assert equal(weights(model), before)


def test_dark_and_bright_are_learnt():
    there = corpus(40)
    plan = Settings(model="resnet8", epochs=8, min_steps=0, batch=8)
    model, moments = trained(there, plan)
    assert (predict(model, there, CPU) == there.labels).all()
    assert moments[-1].loss < moments[0].loss


def test_the_same_seed_gives_the_same_weights_bit_by_bit():
    plan = Settings(model="resnet8", epochs=2, min_steps=0, batch=8, shift=0.2, flip=True)
    first, _ = trained(corpus(), plan, seed=3)
    again, _ = trained(corpus(), plan, seed=3)
    other, _ = trained(corpus(), plan, seed=4)
    assert equal(weights(first), weights(again))
    assert not equal(weights(first), weights(other))


def test_training_does_not_depend_on_the_global_dice_and_leaves_them_alone():
    torch.manual_seed(1)
    first, _ = trained(corpus(), ONE_EPOCH)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, _ = trained(corpus(), ONE_EPOCH)
    assert equal(weights(first), weights(again))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_corpus_is_left_as_it_was():
    there, untouched = corpus(), corpus()
    plan = Settings(model="resnet8", epochs=1, min_steps=0, batch=8, shift=0.2, flip=True)
    model, _ = trained(there, plan)
    features(model, there, CPU)
    predict(model, there, CPU)
    assert (there.images == untouched.images).all()
    assert (there.labels == untouched.labels).all()
    assert (there.ids == untouched.ids).all()


def test_taking_features_between_steps_changes_nothing():
    there = corpus()
    plan = Settings(model="resnet8", epochs=2, min_steps=0, batch=8)
    undisturbed, _ = trained(there, plan)
    model = new_model("resnet8", 2, 8, seed=0)
    for _ in train(model, there, plan, CPU, seed=0):
        features(model, there, CPU)
        assert not model.training
    assert equal(weights(model), weights(undisturbed))


def test_running_statistics_move_at_every_step_even_after_eval():
    model = new_model("resnet8", 2, 8, seed=0)
    before = weights(model)["features.1.running_mean"]
    for _ in train(model, corpus(), ONE_EPOCH, CPU, seed=0):
        now = weights(model)["features.1.running_mean"]
        assert not torch.equal(now, before)
        before = now
        model.eval()


@pytest.mark.parametrize(("share", "pixels"), [(0.0, 0), (0.0625, 0), (0.125, 1), (0.2, 2)])
def test_the_shift_is_a_share_of_the_image_height(share: float, pixels: int):
    spy = Spy()
    plan = Settings(model="resnet8", epochs=1, min_steps=0, batch=8, shift=share, flip=True)
    model = new_model("resnet8", 2, 8, seed=0)
    list(train(model, corpus(), plan, spy, seed=0))
    assert spy.asked == [Augment(shift=pixels, flip=True)]


# ------------------------------------------------------------------------------------------- rows


def test_every_epoch_goes_through_all_rows_once_in_another_order():
    spy = Spy()
    plan = Settings(model="resnet8", epochs=2, min_steps=0, batch=8)
    list(train(new_model("resnet8", 2, 8, seed=0), corpus(20), plan, spy, seed=0))
    first, second = spy.rows[:20], spy.rows[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != sorted(first)


def test_only_the_rows_asked_for_are_trained_on():
    there = corpus(20)
    poisoned = there.labels.copy()
    left_out = np.array([0, 3, 7, 11, 19])
    poisoned[left_out] = 1 - poisoned[left_out]
    rows = np.setdiff1d(np.arange(20), left_out)
    plan = Settings(model="resnet8", epochs=3, min_steps=0, batch=4)
    spy, model = Spy(), new_model("resnet8", 2, 8, seed=0)
    lied_to = Corpus(poisoned, there.classes, there.ids, there.paths, there.images)
    moments = list(train(model, lied_to, plan, spy, seed=0, rows=rows))
    assert sorted(spy.rows) == sorted(np.tile(rows, 3).tolist())
    assert spy.labels == there.labels[spy.rows].tolist()
    assert moments[-1].budget == Budget(3, 4)  # 15 rows in batches of 4
    honest, _ = trained(there, plan, rows=rows)
    assert equal(weights(model), weights(honest))


def test_rows_asked_for_are_left_as_they_were():
    rows = np.array([4, 2, 9, 11])
    trained(corpus(20), ONE_EPOCH, rows=rows)
    assert rows.tolist() == [4, 2, 9, 11]


# --------------------------------------------------------------------------------------- features


def direct(model: Net, there: Corpus) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    with torch.no_grad():
        model.eval()
        points = model.features(to_float(torch.from_numpy(there.images)))
        return points.numpy(), model.head(points).argmax(1).numpy()


def test_features_come_in_row_order_whatever_the_batches(monkeypatch: pytest.MonkeyPatch):
    there = corpus(23, classes=3)
    model, _ = trained(there, ONE_EPOCH)
    wanted, guess = direct(model, there)
    for size in (23, 7, BATCH):
        monkeypatch.setattr("csc_gpu.features.BATCH", size)
        points = features(model, there, CPU)
        assert points == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert predict(model, there, CPU).tolist() == guess.tolist()


def test_features_are_float32_rows_in_c_order():
    there = corpus(5)
    points = features(new_model("resnet8", 2, 8, seed=0), there, CPU)
    assert points.shape == (5, 128)
    assert points.dtype == np.float32
    assert points.flags.c_contiguous
    assert points.flags.writeable
    assert predict(new_model("resnet8", 2, 8, seed=0), there, CPU).dtype == np.int64


def test_features_are_written_back_by_row_even_if_the_loader_shuffles():
    class Shuffling(Spy):
        def batches(self, corpus: Corpus, size: int, **more: Any) -> Iterator[Batch]:
            order = np.random.default_rng(0).permutation(len(corpus))
            yield from self.inner.batches(corpus, 5, order=order)

    there = corpus(17)
    model, _ = trained(there, ONE_EPOCH)
    wanted, guess = direct(model, there)
    assert features(model, there, Shuffling()) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert predict(model, there, Shuffling()).tolist() == guess.tolist()


def test_features_are_taken_without_augmentation():
    spy = Spy()
    features(new_model("resnet8", 2, 8, seed=0), corpus(), spy)
    predict(new_model("resnet8", 2, 8, seed=0), corpus(), spy)
    assert spy.asked == [None, None]


def test_looking_at_features_does_not_change_the_model():
    model, _ = trained(corpus(), ONE_EPOCH)
    before = weights(model)
    first = features(model, corpus(), CPU)
    assert (features(model, corpus(), CPU) == first).all()
    predict(model, corpus(), CPU)
    assert equal(weights(model), before)


def test_one_image_has_features_too():
    there = corpus(6)
    model, _ = trained(there, ONE_EPOCH)
    alone = features(model, there.take(np.array([4])), CPU)
    assert alone[0] == pytest.approx(features(model, there, CPU)[4], rel=1e-4, abs=1e-5)
