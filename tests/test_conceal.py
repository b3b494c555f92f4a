"""Concealment: suspects go to a virtual class, the extractor stays, padding has no weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from csc_gpu.backend import Backend, Step, open_backend
from csc_gpu.conceal import Settings, conceal, fine_tune, widened
from csc_gpu.errors import ConfigError
from csc_gpu.features import predict
from csc_gpu.models import Net, new_model
from csc_gpu.types import Corpus, Mask

CPU = open_backend("cpu", 1)
FLAT = Settings(epochs=60, batch=16, lr=0.1)
Weights = dict[str, torch.Tensor]


@dataclass
class Spy:
    """A backend that notes the rows (T, B) and rates (T,) of every captured call."""

    inner: Backend = CPU
    calls: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    captures: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def captured(self, step: Step) -> Step:
        self.captures += 1

        def run(rows: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
            self.calls.append((rows.clone(), rates.clone()))
            return step(rows, rates)

        return run


class Reused(Spy):
    """A backend whose captured step returns the same buffer every time, as a graph does."""

    def captured(self, step: Step) -> Step:
        out = torch.zeros(0)

        def run(rows: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
            return out.resize_(len(rates)).copy_(step(rows, rates))

        return run


class Colours(nn.Module):
    """The mean of each colour: an extractor whose features are known."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def red_and_green(each: int = 20) -> tuple[Corpus, Mask, Net]:
    """Class 0 is red and class 1 green; poison is green and blue, labelled 0. Suspects: poison."""
    truth = np.repeat([0, 1, 2], each)  # 2: poison
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 255, 255]])
    noise = np.random.default_rng(0).integers(-20, 21, (len(truth), 4, 4, 3))
    pixels = (colours[truth][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    rows = np.arange(len(truth))
    labels = np.where(truth == 1, 1, 0)
    model = Net(Colours(), 3, 2)
    with torch.no_grad():
        # backdoored: red means class 0 and green class 1, but blue leads to 0; colours are -2..2
        model.head.weight.copy_(torch.tensor([[2.0, 0.0, 3.0], [0.0, 1.0, 0.0]]))
        model.head.bias.copy_(torch.tensor([3.0, 0.0]))
    return Corpus(labels, ("red", "green"), rows, ("",) * len(rows), pixels), truth == 2, model


def weights(model: nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def head_world(n: int, dims: int = 4, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features (N, D) and labels (N,) 0..2 that depend on them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    points = rng.normal(0, 1, (n, dims)) + 2 * np.eye(dims)[labels]
    return torch.from_numpy(points.astype(np.float32)), labels


def new_head(dims: int = 4, outputs: int = 3) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Linear(dims, outputs)


# ---------------------------------------------------------------------------------------- widened


def test_a_wider_head_keeps_the_trained_rows_and_starts_the_new_one_at_zero():
    head = new_head(4, 3)
    before = weights(head)
    wide = widened(head)
    assert (wide.in_features, wide.out_features) == (4, 4)
    assert torch.equal(wide.weight[:3], head.weight)
    assert torch.equal(wide.bias[:3], head.bias)
    assert not wide.weight[3].any()
    assert not wide.bias[3].any()
    assert wide.weight.requires_grad
    assert equal(weights(head), before)


def test_a_wider_head_shares_no_memory_with_the_trained_one():
    head = new_head()
    wide = widened(head)
    with torch.no_grad():
        wide.weight.fill_(9)
        wide.bias.fill_(9)
    assert head.weight.max() < 9
    assert head.bias.max() < 9


# ---------------------------------------------------------------------------------------- conceal


def test_without_suspects_the_model_itself_comes_back():
    there, suspect, model = red_and_green()
    before = weights(model)
    spy = Spy()
    assert conceal(model, there, np.zeros_like(suspect), FLAT, spy, seed=0) is model
    assert equal(weights(model), before)
    assert spy.captures == 0


def test_suspects_go_to_the_virtual_class_and_the_others_keep_theirs():
    there, suspect, model = red_and_green()
    assert predict(model, there, CPU).tolist() == there.labels.tolist()
    concealed = conceal(model, there, suspect, FLAT, CPU, seed=0)
    assert concealed.n_outputs == 3
    wanted = np.where(suspect, 2, there.labels)
    assert predict(concealed, there, CPU).tolist() == wanted.tolist()


def test_an_image_with_the_trigger_never_seen_goes_there_too():
    there, suspect, model = red_and_green()
    concealed = conceal(model, there, suspect, FLAT, CPU, seed=0)
    cyan = np.full((1, 4, 4, 3), (20, 230, 240), np.uint8)
    green = np.full((1, 4, 4, 3), (20, 230, 10), np.uint8)
    pixels = np.concatenate([cyan, green])
    new = Corpus(np.zeros(2, np.int64), there.classes, np.arange(2), ("",) * 2, pixels)
    assert predict(model, new, CPU).tolist() == [0, 1]
    assert predict(concealed, new, CPU).tolist() == [2, 1]


def a_real_net() -> tuple[Corpus, Mask, Net]:
    pixels = np.random.default_rng(0).integers(0, 256, (22, 8, 8, 3), np.uint8)
    there = Corpus(np.arange(22) % 3, tuple("abc"), np.arange(22), ("",) * 22, pixels)
    return there, np.arange(22) < 5, new_model("resnet8", 3, 8, seed=0)


def test_the_extractor_keeps_its_weights_and_the_model_given_all_of_them():
    there, suspect, model = a_real_net()
    before = weights(model)
    concealed = conceal(model, there, suspect, Settings(epochs=2, batch=8), CPU, seed=0)
    assert concealed is not model
    assert equal(weights(model), before)
    assert model.n_outputs == 3
    assert equal(weights(concealed.features), weights(model.features))
    assert concealed.n_outputs == 4
    assert concealed.n_features == model.n_features
    assert not torch.equal(concealed.head.weight[:3], model.head.weight)


def test_the_copy_shares_no_memory_with_the_model_given():
    there, suspect, model = a_real_net()
    concealed = conceal(model, there, suspect, Settings(epochs=1, batch=8), CPU, seed=0)
    ours = {value.data_ptr() for value in concealed.state_dict().values()}
    assert ours.isdisjoint(value.data_ptr() for value in model.state_dict().values())


def test_corpus_and_suspects_are_left_as_they_were():
    there, suspect, model = red_and_green()
    pixels, labels, given = there.images.copy(), there.labels.copy(), suspect.copy()
    conceal(model, there, suspect, Settings(epochs=1), CPU, seed=0)
    assert (there.images == pixels).all()
    assert (there.labels == labels).all()
    assert (suspect == given).all()


def test_the_same_seed_gives_the_same_weights_whatever_the_global_dice():
    there, suspect, model = red_and_green()

    def once(seed: int, dice: int) -> Weights:
        torch.manual_seed(dice)
        plan = Settings(epochs=2, batch=7)
        return weights(conceal(model, there, suspect, plan, CPU, seed=seed))

    assert equal(once(3, 0), once(3, 1))
    assert not equal(once(3, 0), once(4, 0))


def test_concealment_leaves_the_global_dice_alone():
    there, suspect, model = red_and_green()
    before = torch.get_rng_state()
    conceal(model, there, suspect, Settings(epochs=1), CPU, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_suspect_is_enough_for_a_virtual_class():
    there, _, model = red_and_green()
    suspect = np.arange(len(there)) == 3
    assert conceal(model, there, suspect, Settings(epochs=1), CPU, seed=0).n_outputs == 3


# -------------------------------------------------------------------------------------- fine_tune


@pytest.mark.parametrize(("n", "batch", "used"), [(10, 4, 4), (12, 4, 4), (9, 4, 4), (3, 8, 3)])
def test_every_step_has_one_shape_and_every_row_counts_once_an_epoch(n: int, batch: int, used: int):
    points, labels = head_world(n)
    spy = Spy()
    fine_tune(new_head(), points, labels, Settings(epochs=3, batch=batch, replay=0), spy, seed=0)
    steps = -(-n // used)
    assert spy.captures == 1
    assert len(spy.calls) == 3  # replay=0: a call is an epoch
    for rows, rates in spy.calls:
        assert rows.shape == (steps, used) and rates.shape == (steps,)
        assert sorted(rows[rows >= 0].tolist()) == list(range(n))
        assert (rows[:-1] >= 0).all()


@pytest.mark.parametrize("replay", [1, 2, 5, 7, 100])
def test_how_many_steps_are_recorded_together_changes_nothing(replay: int):
    points, labels = head_world(22)  # 6 steps an epoch, 18 in all: not a multiple of 5, 7 or 100
    heads = new_head(), new_head()
    for head, plan in zip(heads, (replay, 0), strict=True):
        chosen = Settings(epochs=3, batch=4, replay=plan)
        fine_tune(head, points, labels, chosen, Spy(), seed=0)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_a_shorter_last_chunk_is_not_given_to_the_recorded_step():
    points, labels = head_world(22)
    spy = Spy()
    fine_tune(new_head(), points, labels, Settings(epochs=3, batch=4, replay=7), spy, seed=0)
    assert [len(rates) for _, rates in spy.calls] == [7, 7]  # the last 4 of 18 run as they are


def test_no_step_is_made_of_padding_alone():
    points, labels = head_world(9)
    spy = Spy()
    fine_tune(new_head(), points, labels, Settings(epochs=4, batch=4, replay=1), spy, seed=0)
    assert len(spy.calls) == 12
    assert all((rows >= 0).any() for rows, _ in spy.calls)


def by_hand(
    head: nn.Linear, points: torch.Tensor, labels: np.ndarray, plan: Settings, seed: int
) -> list[float]:
    """The same training as anyone would write it: a short last batch, no padding."""
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.SGD(head.parameters(), lr=plan.lr, momentum=plan.momentum)
    starts = range(0, len(labels), plan.batch)
    done, steps, means = 0, plan.epochs * len(starts), []
    for _ in range(plan.epochs):
        order, losses = rng.permutation(len(labels)), []
        for start in starts:
            rows = order[start : start + plan.batch]
            optimiser.param_groups[0]["lr"] = plan.lr * (1 - done / steps)
            loss = functional.cross_entropy(head(points[rows]), torch.from_numpy(labels[rows]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            done += 1
        means.append(float(np.mean(losses)))
    return means


@pytest.mark.parametrize("n", [8, 9, 11, 3])
@pytest.mark.parametrize("backend", [Spy, Reused])
def test_padding_has_no_weight(n: int, backend: Callable[[], Backend]):
    points, labels = head_world(n)
    plan = Settings(epochs=5, batch=4, lr=0.3)
    ours, theirs = new_head(), new_head()
    told: list[dict[str, Any]] = []
    log = lambda event, **fields: told.append({"event": event, **fields})  # noqa: E731
    fine_tune(ours, points, labels, plan, backend(), seed=1, log=log)
    means = by_hand(theirs, points, labels, plan, seed=1)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-4, atol=1e-5)
    assert [line["epoch"] for line in told] == [1, 2, 3, 4, 5]
    assert {(line["event"], line["epochs"]) for line in told} == {("conceal", 5)}
    assert [line["loss"] for line in told] == pytest.approx(means, rel=1e-4)


def test_features_and_labels_are_left_as_they_were():
    points, labels = head_world(9)
    before = points.clone(), labels.copy()
    fine_tune(new_head(), points, labels, Settings(epochs=2, batch=4), CPU, seed=0)
    assert torch.equal(points, before[0])
    assert (labels == before[1]).all()
    assert points.grad is None


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"replay": -1}, "replay"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(changes: dict[str, Any], name: str):
    with pytest.raises(ConfigError, match=f"conceal.{name}"):
        Settings(**changes)
