"""Anti-Backdoor Learning: the loss is held where it is told, the lowest isolated and unlearnt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import abl
from csc_gpu.errors import ConfigError
from csc_gpu.types import DefenderView
from tests.test_gpu_backend import digits

CPU = open_backend("cpu", 1)


def slope(objective: object, loss: float) -> tuple[float, float]:
    """Value, and slope by the logit of the right one of two classes, where cross-entropy is so."""
    logit = torch.tensor([math.log(1 / math.expm1(loss))], requires_grad=True)
    batch = Batch(torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    value = objective(lambda _: torch.stack([logit, torch.zeros(1)], dim=1), batch, 1)
    value.backward()
    return value.item(), logit.grad.item()


@pytest.mark.parametrize("how", abl.HELD)
def test_above_gamma_the_loss_descends_and_below_it_ascends(how: str):
    held = abl.Held(how, 0.5)
    plain = {loss: slope(abl.cross_entropy, loss)[1] for loss in (0.2, 0.8)}
    assert slope(held, 0.8)[1] == pytest.approx(plain[0.8]) and plain[0.8] < 0
    assert slope(held, 0.2)[1] == pytest.approx(-plain[0.2])
    assert slope(abl.ascent, 0.8)[1] == pytest.approx(-plain[0.8])


def test_flooding_and_local_ascent_have_the_values_of_their_formulas():
    assert slope(abl.Held("flooding", 0.5), 0.2)[0] == pytest.approx(0.8)
    assert slope(abl.Held("flooding", 0.5), 0.8)[0] == pytest.approx(0.8)
    assert slope(abl.Held("lga", 0.5), 0.2)[0] == pytest.approx(-0.2)
    assert slope(abl.Held("lga", 0.5), 0.8)[0] == pytest.approx(0.8)


def test_the_lowest_losses_are_isolated_two_at_least_for_batch_norm():
    losses = np.array([0.5, 0.1, 0.9, 0.2, 0.7], np.float32)
    np.testing.assert_array_equal(abl.lowest(losses, 0.4), [False, True, False, True, False])
    assert len(np.flatnonzero(abl.lowest(losses, 0.01))) == 2


def test_ascent_makes_the_isolated_rows_wrong():
    corpus, _ = digits()
    short = {"train.model": "resnet8", "train.batch": 32, "abl.isolating": 2, "abl.tuning": 2}
    changes = short | {"abl.share": 0.1, "abl.unlearning": 8, "abl.unlearning_lr": 0.05}
    outcome = abl.defend(DefenderView(corpus), override(abl.Settings(), changes), CPU, seed=0)
    isolated = outcome.segregation.suspect
    assert isolated.sum() == 24
    course = abl.Course(DefenderView(corpus), abl.Settings(), CPU, seed=0)
    told = course.predicted(outcome.model)
    assert (told[isolated] == corpus.labels[isolated]).mean() < 0.5


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hold": "hard"}, "hold"),
        ({"share": 0.0}, "share"),
        ({"isolating": 0}, "isolating"),
        ({"gamma": 0.0}, "gamma"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(changes, name):
    with pytest.raises(ConfigError, match=f"abl.{name}"):
        abl.Isolation(**changes)
