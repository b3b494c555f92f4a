"""Neural Attention Distillation: its attention maps against a direct computation, and its aim."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from csc_gpu.backend import Batch
from csc_gpu.defenses import nad
from csc_gpu.errors import ConfigError
from csc_gpu.models import new_model


def batch(size: int = 16) -> Batch:
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(8) % 4, torch.arange(8))


def test_attention_is_the_channels_power_sum_at_unit_length():
    maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    wanted = (np.abs(maps.numpy()) ** 3).sum(1).reshape(2, 12)
    wanted /= np.sqrt((wanted**2).sum(1, keepdims=True))
    np.testing.assert_allclose(nad.attention(maps, 3.0).numpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "widths"), [("resnet8", [32, 64, 128]), ("resnet18", [64, 128, 256, 512])]
)
def test_a_group_is_the_last_block_of_a_width_and_the_features_are_the_nets_own(name, widths):
    model = new_model(name, 4, 16, seed=0).eval()
    maps, features = nad.looked(model, batch().images)
    assert [m.shape[1] for m in maps] == widths
    torch.testing.assert_close(features, model.features(batch().images))
    torch.testing.assert_close(maps[-1].mean((2, 3)), features)  # the last is what is pooled


def test_a_student_like_its_teacher_has_the_ordinary_loss_alone():
    student = new_model("resnet8", 4, 16, seed=0).eval()
    objective = nad.distillation(student, copy.deepcopy(student), nad.Distillation())
    loss = objective(student, batch(), 1)
    plain = functional.cross_entropy(student(batch().images), batch().labels)
    torch.testing.assert_close(loss, plain)


def test_the_last_weight_is_the_deepest_groups_and_each_counts_in_proportion():
    student, teacher = (new_model("resnet8", 4, 16, seed=seed).eval() for seed in (0, 1))
    plain = functional.cross_entropy(student(batch().images), batch().labels).item()
    ours, theirs = (nad.looked(model, batch().images)[0] for model in (student, teacher))
    apart = [
        (nad.attention(a, 2.0) - nad.attention(b, 2.0)).square().mean().item()
        for a, b in zip(ours, theirs, strict=True)
    ]
    for betas, wanted in (((7.0,), 7 * apart[2]), ((5.0, 0.0), 5 * apart[1])):
        loss = nad.distillation(student, teacher, nad.Distillation(betas=betas))
        assert loss(student, batch(), 1).item() - plain == pytest.approx(wanted, rel=1e-3)


def test_the_teacher_gets_no_gradient():
    student, teacher = (new_model("resnet8", 4, 16, seed=seed) for seed in (0, 1))
    nad.distillation(student, teacher.eval(), nad.Distillation())(student, batch(), 1).backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad is not None for weight in student.parameters())


def test_weights_of_no_group_are_refused():
    with pytest.raises(ConfigError, match=r"nad\.betas"):
        nad.Distillation(betas=())
