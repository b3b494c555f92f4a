"""Neural Cleanse: its search on a net whose backdoor is known, its index, its unlearning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import nc
from csc_gpu.defenses.course import Course
from csc_gpu.models import Net
from csc_gpu.types import Corpus, DefenderView

CPU = open_backend("cpu", 1)
QUICK = {
    "nc.epochs": 40,
    "nc.batch": 8,
    "nc.cost": 0.02,
    "nc.patience": 2,
    "train.model": "resnet8",
}


def noise(count: int = 32) -> Corpus:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    rows = np.arange(count)
    return Corpus(rows % 4, tuple("abcd"), rows, ("",) * count, pixels)


def backdoored() -> Net:
    """Class 2 is what has a bright corner; the others compare the means of whole quarters."""
    net = Net(nn.Flatten(), 3 * 36, 4)
    weight = torch.zeros(4, 3, 6, 6)
    for label, (top, left) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        weight[label, :, top : top + 3, left : left + 3] = 0.2
    weight[2] = 0
    weight[2, :, 5, 0] = 3.0
    with torch.no_grad():
        net.head.weight.copy_(weight.flatten(1))
        net.head.bias.copy_(torch.tensor([0.0, 0.0, -9.0, 0.0]))
    return net


def course() -> Course:
    settings = override(nc.Settings(), QUICK)
    return Course(DefenderView(noise(), noise()), settings, CPU, seed=0)


def test_the_search_finds_the_one_pixel_that_commands_a_class_and_its_net_stays():
    there, model = course(), backdoored()
    chosen = there.settings.nc
    before = model.head.weight.detach().clone()
    plain, backdoor = (nc.sought(there, model, label, chosen) for label in (0, 2))
    assert backdoor.smallest < 1.0 < plain.smallest
    mask, pattern = backdoor.found()
    assert mask[5, 0] == mask.max() and mask[5, 0] > 0.5
    assert (pattern[:, 5, 0] > 1.0).all()
    torch.testing.assert_close(model.head.weight, before)
    assert model.head.weight.requires_grad and model.head.weight.grad is None


def test_the_mask_grows_dear_with_success_and_cheap_without():
    trigger, rule = nc.Trigger((4, 4), np.random.default_rng(0)), nc.Cleanse(patience=2)
    costs = []
    for hits in (10, 10, 10, 10, 3, 3, 3, 3, 10):
        trigger.hits = torch.tensor(float(hits))
        trigger.judge(10, rule)
        costs.append(float(trigger.cost))
    wanted = [0, 1e-3, 1e-3, 2e-3, 2e-3, 2e-3 / 2**1.5, 2e-3 / 2**1.5, 2.5e-4, 2.5e-4]
    assert costs == pytest.approx(wanted)


def test_the_smallest_mask_that_worked_is_kept():
    trigger = nc.Trigger((4, 4), np.random.default_rng(0))
    assert torch.equal(trigger.found()[0], trigger.mask())  # none has worked yet
    kept = None
    for level, hits in ((1.0, 10), (-1.0, 10), (-3.0, 5), (0.0, 10)):
        with torch.no_grad():
            trigger.hidden_mask.fill_(level)
        kept = trigger.mask().detach() if level == -1.0 else kept
        trigger.hits = torch.tensor(float(hits))
        trigger.judge(10, nc.Cleanse())
    torch.testing.assert_close(trigger.found()[0], kept)


def test_only_the_chosen_rows_carry_a_trigger_and_all_keep_their_label():
    triggers = [nc.Trigger((6, 6), np.random.default_rng(seed)) for seed in (0, 1)]
    objective = nc.unlearning(triggers, np.array([2, 1, 2, 0]), CPU)
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    seen = []

    def forward(shown: torch.Tensor) -> torch.Tensor:
        seen.append(shown)
        return 20.0 * torch.eye(4)[[0, 2, 3, 1]]

    batch = Batch(images[[0, 2, 3, 1]], torch.tensor([0, 2, 3, 1]), torch.tensor([0, 2, 3, 1]))
    assert objective(forward, batch, 1) < 1e-3
    torch.testing.assert_close(seen[0][:2], images[[0, 2]])
    for place, trigger, row in ((2, 0, 3), (3, 1, 1)):
        mask, pattern = triggers[trigger].found()
        wanted = images[row] * (1 - mask) + mask * pattern
        torch.testing.assert_close(seen[0][place], wanted)
