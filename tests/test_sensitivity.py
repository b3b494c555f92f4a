"""D-BR and D-ST: what is changed and compared, who is told apart, what is unlearnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import d_br, sensitivity
from csc_gpu.defenses.course import Course
from csc_gpu.defenses.sensitivity import Sensitivity
from csc_gpu.errors import ConfigError
from csc_gpu.train import Method, Settings, constant, train
from csc_gpu.types import DefenderView
from tests.test_gpu_backend import digits
from tests.test_train import corpus

CPU = open_backend("cpu", 1)


def picture() -> torch.Tensor:
    return torch.arange(75.0).reshape(1, 3, 5, 5)


def changed(turn: float, across: float, down: float) -> torch.Tensor:
    maps = sensitivity.inverse_maps(np.array([turn]), np.array([[across, down]]))
    return sensitivity.changed(picture(), torch.from_numpy(maps))


def test_nothing_is_changed_by_no_turn_and_no_move():
    torch.testing.assert_close(changed(0, 0, 0), picture())


def test_a_quarter_turn_turns_every_pixel():
    torch.testing.assert_close(changed(math.pi / 2, 0, 0), picture().rot90(-1, (2, 3)))


def test_a_move_by_a_pixel_brings_in_black():
    moved = changed(0, 2 / 5, 0)
    torch.testing.assert_close(moved[..., 1:], picture()[..., :-1])
    assert (moved[..., 0] == sensitivity.BLACK).all()


def test_turning_comes_before_moving():
    moved = changed(math.pi / 2, 0, 2 / 5)
    torch.testing.assert_close(moved[..., 1:, :], picture().rot90(-1, (2, 3))[..., :-1, :])


def test_rows_that_a_change_cannot_alter_have_no_sensitivity():
    there, _ = digits(60)
    there.images[::2] = 0  # black in and black out
    settings = override(d_br.Settings(), {"train.model": "resnet8"})
    course = Course(DefenderView(there), settings, CPU, seed=3)
    fct = sensitivity.sensitivities(course, course.fresh(), Sensitivity())
    np.testing.assert_allclose(fct[::2], 0, atol=1e-6)
    assert (fct[1::2] > 1e-4).all()


def test_the_lowest_are_clean_and_the_highest_are_poison():
    parted = sensitivity.part(np.array([5, 1, 4, 2, 3, 9, 8, 7, 6, 0], np.float32), Sensitivity())
    np.testing.assert_array_equal(np.flatnonzero(parted.clean), [1, 9])
    np.testing.assert_array_equal(np.flatnonzero(parted.poison), [5])
    assert parted.verdict("d-br").score.argmax() == 5


def test_classes_are_driven_apart_by_the_mean_cosine_of_their_means():
    points = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    batch = Batch(points, torch.tensor([0, 0, 1, 3]), torch.arange(4))  # nobody of class 2
    loss = sensitivity.drive_apart(4)(lambda images: images, batch, 1)
    half = math.sqrt(0.5)  # of 0 with 1 and of 1 with 3; 0 with 3 is 0
    assert loss.item() == pytest.approx(2 * (half + half + 0) / 9)


def test_a_pass_unlearns_all_poison_before_it_relearns():
    poison = np.arange(20) % 4 == 0
    order = d_br.first(poison)
    rows = np.arange(2, 20)
    one, two = (order(np.random.default_rng(seed), rows) for seed in (1, 2))
    for drawn in (one, two):
        np.testing.assert_array_equal(np.sort(drawn), rows)
        np.testing.assert_array_equal(poison[drawn], np.sort(poison[rows])[::-1])
    assert (one != two).any()


def test_the_loop_keeps_the_order_that_a_method_asks_for():
    seen: list[int] = []

    def noting(forward, batch, step):
        seen.extend(batch.rows.tolist())
        return forward(batch.images).sum()

    poison = np.arange(20) % 4 == 0
    settings = Settings(model="resnet8", epochs=2, min_steps=0, batch=5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    method = Method(objective=noting, rate=constant, order=d_br.first(poison))
    list(train(model, corpus(), settings, CPU, seed=0, method=method))
    for turn in (seen[:20], seen[20:]):
        assert poison[turn[:5]].all() and not poison[turn[5:]].any()


def test_the_loss_of_poison_is_climbed_and_that_of_others_descended():
    poison = torch.tensor([False, True, False, True])
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]])
    labels, rows = torch.tensor([0, 0, 1]), torch.tensor([2, 1, 0])
    plain = functional.cross_entropy(logits, labels, reduction="none")
    loss = d_br.up_and_down(poison)(lambda _: logits, Batch(logits, labels, rows), 1)
    torch.testing.assert_close(loss, (plain[0] - plain[1] + plain[2]) / 3)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"epochs": 0}, "epochs"),
        ({"move": 1.0}, "move"),
        ({"clean": 0.6}, "clean"),
        ({"poison": 0.0}, "poison"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(changes, name):
    with pytest.raises(ConfigError, match=f"sensitivity.{name}"):
        Sensitivity(**changes)
