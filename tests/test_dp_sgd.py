"""DP-SGD: its step against one computed image by image, its noise, and the net it hands back."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import dp_sgd
from csc_gpu.defenses.course import Course
from csc_gpu.errors import ConfigError
from csc_gpu.models import Net, new_model
from csc_gpu.types import Corpus, DefenderView

CPU = open_backend("cpu", 1)
LR = {"train.model": "resnet8-group", "train.lr": 0.5, "train.momentum": 0.0}
PLAIN = LR | {"train.weight_decay": 0.0, "train.batch": 6}


def corpus() -> Corpus:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    return Corpus(np.arange(6) % 3, tuple("abc"), np.arange(6), ("",) * 6, pixels)


def stepped(model: Net, step: int = 1, **changes: float) -> Net:
    """The model after one step on all rows at the full learning rate."""
    named = {f"dp_sgd.{name}": value for name, value in changes.items()}
    settings = override(dp_sgd.Settings(), PLAIN | named)
    course = Course(DefenderView(corpus()), settings, CPU, seed=3)
    model = copy.deepcopy(model)
    shaped, method = dp_sgd.shaping(model, 6, settings.train, settings.dp_sgd, course)
    optimiser = method.optimiser(list(shaped.parameters()))
    optimiser.zero_grad()
    method.objective(shaped, next(CPU.batches(corpus(), 6)), step).backward()
    optimiser.step()
    shaped.to_standard_module()
    return model


def moved(one: Net, other: Net) -> torch.Tensor:
    """By how much every weight differs, in one row."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return torch.cat([(b - a).detach().flatten() for a, b in pairs])


def test_a_step_is_the_mean_of_the_clipped_gradients_of_single_images():
    model, clip = new_model("resnet8-group", 3, 8, seed=0), 0.7
    batch: Batch = next(CPU.batches(corpus(), 6))
    total, lengths = torch.zeros(()), []
    for row in range(6):
        loss = functional.cross_entropy(model(batch.images[[row]]), batch.labels[[row]])
        found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
        lengths.append(found.norm().item())
        total = total + found * min(1.0, clip / lengths[-1])
    assert max(lengths) > clip
    wanted = -0.5 * total / 6
    torch.testing.assert_close(
        moved(model, stepped(model, clip=clip, noise=0.0)), wanted, rtol=1e-3, atol=1e-5
    )


def test_noise_is_drawn_from_seed_and_step_and_has_its_deviation():
    model = new_model("resnet8-group", 3, 8, seed=0)
    still = stepped(model, clip=1.0, noise=0.0)
    one, again, later = (stepped(model, step, clip=1.0, noise=2.0) for step in (1, 1, 2))
    assert not moved(one, again).any()
    assert moved(one, later).abs().max() > 0.1
    assert moved(still, one).std().item() == pytest.approx(0.5 * 2.0 * 1.0 / 6, rel=0.05)


def test_the_net_that_is_handed_back_is_a_plain_one_with_group_norm():
    settings = override(dp_sgd.Settings(), PLAIN | {"train.model": "resnet8", "train.epochs": 1})
    settings = override(settings, {"train.min_steps": 0})
    outcome = dp_sgd.defend(DefenderView(corpus()), settings, CPU, seed=0)
    assert outcome.model.name == "resnet8-group"
    assert outcome.undefended is None and outcome.segregation is None
    fresh = new_model(outcome.model.name, 3, 8, seed=0)
    fresh.load_state_dict(outcome.model.state_dict())
    assert not any(part._forward_hooks for part in outcome.model.modules())


def test_without_opacus_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    settings = override(dp_sgd.Settings(), {"train.model": "resnet8"})
    with pytest.raises(ConfigError, match=r"csc-gpu\[dp\]"):
        dp_sgd.defend(DefenderView(corpus()), settings, CPU, seed=0)
