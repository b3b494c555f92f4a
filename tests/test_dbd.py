"""DBD: its losses against direct computations, what it contrasts, and MixMatch by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import dbd, views
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


def test_the_contrast_is_of_two_views_of_each_image():
    batch, shown = next(CPU.batches(corpus(), 6)), []

    def forward(images: torch.Tensor) -> torch.Tensor:
        shown.append(images)
        return functional.normalize(images.flatten(1), dim=1)

    seen = views.seeing(views.Views(), 0, flip=False)
    loss = dbd.contrast(seen, dbd.Decoupling())(forward, batch, 3)
    torch.testing.assert_close(shown[0], torch.cat([seen(batch, 3, 1), seen(batch, 3, 2)]))
    torch.testing.assert_close(loss, dbd.nt_xent(forward(shown[0]), 0.5))


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
