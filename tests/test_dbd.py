"""DBD: its losses against direct computations, its views, and MixMatch by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import dbd
from csc_gpu.defenses.course import Course
from csc_gpu.models import new_model
from csc_gpu.train import Budget
from csc_gpu.types import Corpus, DefenderView

CPU = open_backend("cpu", 1)


def corpus(count: int = 12) -> Corpus:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    rows = np.arange(count)
    return Corpus(rows % 3, tuple("abc"), rows, ("",) * count, pixels)


def course(**changes: float) -> Course:
    named = {"train.model": "resnet8", "train.shift": 0.0}
    named |= {f"dbd.{name}": value for name, value in changes.items()}
    settings = override(dbd.Settings(), named)
    return Course(DefenderView(corpus()), settings, CPU, seed=0)


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_contrast_is_that_of_every_pair_computed_alone():
    points = functional.normalize(torch.randn(6, 5, generator=dice()), dim=1)
    lost = []
    for row in range(6):
        like = [math.exp(float(points[row] @ other) / 0.5) for other in points]
        lost.append(-math.log(like[(row + 3) % 6] / (sum(like) - like[row])))
    assert float(dbd.nt_xent(points, 0.5)) == pytest.approx(np.mean(lost), rel=1e-5)


def test_symmetric_cross_entropy_is_as_written():
    logits, labels = torch.randn(4, 3, generator=dice()), torch.tensor([0, 2, 1, 1])
    share = logits.softmax(1).numpy()
    for row, label in enumerate(labels.tolist()):
        truth = np.full(3, 1e-4)
        truth[label] = 1.0
        wanted = -0.1 * np.log(share[row, label]) - (share[row] * np.log(truth)).sum()
        got = float(dbd.symmetric(logits, labels, 0.1, 1.0)[row])
        assert got == pytest.approx(wanted, rel=1e-4)


def test_a_view_is_a_part_of_its_own_image_and_drawn_anew_for_each():
    plain = torch.linspace(-2, 2, 3 * 16 * 16).reshape(1, 3, 16, 16).expand(64, -1, -1, -1)
    seen = dbd.a_view(plain, 0.2, dice())
    assert seen.shape == plain.shape and seen.isfinite().all()
    assert seen.min() >= -2.001 and seen.max() <= 2.001
    assert len(torch.unique(seen.flatten(1), dim=0)) == 64
    assert torch.equal(seen, dbd.a_view(plain, 0.2, dice()))
    grey = (seen - seen[:, :1]).abs().amax((1, 2, 3)) < 1e-5
    assert 0.05 < grey.float().mean() < 0.4


def test_a_view_of_half_the_area_shows_half_the_area(monkeypatch):
    for name in ("JITTERED", "GREY"):
        monkeypatch.setattr(dbd, name, 0.0)
    monkeypatch.setattr(dbd, "STRETCH", 1.0)
    slope = torch.linspace(-1, 1, 64).expand(200, 3, 64, 64)  # left to right
    seen = dbd.a_view(slope, 0.25, dice())[:, 0]
    area = (seen[:, 0].amax(1) - seen[:, 0].amin(1)).square() / 4
    assert 0.2 < area.min() < 0.35 and 0.9 < area.max() < 1.01
    assert area.mean().item() == pytest.approx(0.6, abs=0.06)
    mirrored = (seen[:, 0, 0] > seen[:, 0, -1]).float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.12)


def test_the_rate_falls_from_one_to_nothing_and_is_half_in_the_middle():
    rates = [dbd.cosine(step, Budget(4, 25)) for step in (1, 51, 100)]
    assert rates == pytest.approx([1.0, 0.5, 0.0], abs=1e-3)


def test_the_extractor_stays_while_the_head_learns():
    net = new_model("resnet8", 3, 8, seed=0)
    net.features.requires_grad_(False)
    before = {name: value.clone() for name, value in net.features.state_dict().items()}
    loss = dbd.on_frozen(net, dbd.Decoupling())
    net.train()
    loss(net, next(CPU.batches(corpus(), 12)), 1).backward()
    assert all(
        torch.equal(value, before[name]) for name, value in net.features.state_dict().items()
    )
    assert net.head.weight.grad is not None


def test_losses_are_each_rows_own():
    there = course()
    net = there.fresh().eval()
    found = dbd.losses(net, there, dbd.Decoupling())
    with torch.no_grad():
        batch = next(CPU.batches(corpus(), 12))
        wanted = dbd.symmetric(net(batch.images), batch.labels, 0.1, 1.0).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


class Bright(nn.Module):
    """Logits by the mean of each colour: the same in train and eval mode."""

    n_outputs = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 3 * images.mean((2, 3))


def test_mixmatch_is_as_computed_row_by_row_and_the_unlabelled_weigh_more_and_more():
    there = course(semi_epochs=1, iterations=10, semi_batch=4)
    how, net = there.settings.dbd, Bright()
    others = np.arange(4, 12)
    batch = next(CPU.batches(corpus(), 4, order=np.arange(4)))
    batch = Batch(batch.images.clone(), batch.labels, batch.rows)
    got = [dbd.mixmatch(net, others, how, there)(net, batch, step).item() for step in (5, 5)]
    assert got[0] == got[1]  # the same step draws the same

    rng = np.random.default_rng((0, 5))
    rows = np.tile(rng.choice(others, 4, replace=False), 2)
    more = next(CPU.batches(corpus(), 8, order=rows)).images
    images = torch.cat([batch.images, more])
    guess = net(more[:4]).softmax(1) ** 2  # both are alike without shift; temperature .5
    guess = guess / guess.sum(1, keepdim=True)
    wanted = torch.cat([torch.eye(3)[batch.labels], guess, guess])
    share = rng.beta(0.75, 0.75)
    share = max(share, 1 - share)
    other = rng.permutation(12)
    logits = net(share * images + (1 - share) * images[other])
    wanted = share * wanted + (1 - share) * wanted[other]
    known = -(wanted[:4] * logits[:4].log_softmax(1)).sum(1).mean()
    apart = ((logits[4:].softmax(1) - wanted[4:]) ** 2).mean()
    assert got[0] == pytest.approx((known + 15 * 0.5 * apart).item(), rel=1e-4)
