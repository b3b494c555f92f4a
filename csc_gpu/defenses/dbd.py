"""Decoupling-based Backdoor Defense (Huang et al., ICLR 2022, arXiv 2202.03423).

Labels come late. 1. SimCLR trains the extractor on images alone, so that poison lies among its true
class. 2. On the frozen extractor a head learns the given labels by symmetric cross-entropy; the
half of the rows with the lowest loss is credible. 3. MixMatch trains the whole net with the labels
of that half, and without those of the others: these are the suspects of its verdict, half of all
rows whatever the poison, so its scores tell more than its flags.

Published settings. What differs: views of an image are those of D-ST (views.py), not blurred, and
mirrored where the run mirrors images (train.flip), not always; rows are parted once, as in the
paper, not before every epoch, as in its code; MixMatch sees all mixed images as one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from csc_gpu import csc
from csc_gpu.backend import Augment, Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.defenses.views import Seen, Views, seeing
from csc_gpu.features import BATCH
from csc_gpu.models import Net
from csc_gpu.train import Budget, Method, Objective, constant
from csc_gpu.types import DefenderView, Outcome

PROJECTION = 128
"""Dimensions in which SimCLR compares views."""
NEVER = 1e-4
"""What symmetric cross-entropy takes for a probability of zero."""


@dataclass(frozen=True, kw_only=True)
class Decoupling:
    """The three trainings."""

    self_epochs: int = 1000
    """Passes of SimCLR."""
    self_batch: int = 512
    """Images in one of its steps, two views of each."""
    self_lr: float = 0.4
    """Its first learning rate, falling to zero as a cosine."""
    self_temperature: float = 0.5
    """By which likeness of views is divided."""
    head_epochs: int = 10
    """Passes of the head alone."""
    head_batch: int = 128
    """Images in one of its steps."""
    alpha: float = 0.1
    """Weight of cross-entropy."""
    beta: float = 1.0
    """Weight of reverse cross-entropy."""
    credible: float = 0.5
    """Share of the rows whose labels are used at last, those of the lowest loss."""
    semi_epochs: int = 190
    """Of MixMatch, `iterations` steps each."""
    iterations: int = 1024
    """Optimiser steps of such an epoch."""
    semi_batch: int = 64
    """Labelled images in one of them, and unlabelled ones, twice."""
    unlabelled: float = 15.0
    """Weight of the unlabelled images at the end; it grows from 0 all the way."""
    temperature: float = 0.5
    """Of guessed labels: the lower, the surer."""
    mix: float = 0.75
    """Images are mixed in a ratio drawn from Beta(mix, mix)."""
    lr: float = 0.002
    """Of Adam, for the head and MixMatch."""

    def __post_init__(self) -> None:
        counts = ("self_epochs", "head_epochs", "semi_epochs", "iterations")
        require(self, "dbd", "1 or more", lambda count: count >= 1, *counts)
        batches = ("self_batch", "head_batch", "semi_batch")
        require(self, "dbd", "4 or more", lambda rows: rows >= 4, *batches)
        rates = ("self_lr", "self_temperature", "temperature", "mix", "lr")
        require(self, "dbd", "above 0", lambda value: 0 < value < math.inf, *rates)
        weights = ("alpha", "beta", "unlabelled")
        require(self, "dbd", "0 or more", lambda value: 0 <= value < math.inf, *weights)
        require(self, "dbd", "in (0, 1)", lambda share: 0 < share < 1, "credible")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, those of the three trainings, and the views of the first."""

    dbd: Decoupling = field(default_factory=Decoupling)
    views: Views = field(default_factory=Views)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Learn images without labels, then whom to believe, then from those."""
    course = Course(view, settings, backend, **how)
    chosen, net = settings.dbd, course.fresh()
    seen = seeing(settings.views, course.seed, flip=settings.train.flip)
    course.train(
        Projected(net, course.seed).to(backend.device),
        "simclr",
        method=Method(objective=contrast(seen, chosen), rate=cosine),
        epochs=chosen.self_epochs,
        batch=chosen.self_batch,
        lr=chosen.self_lr,
        weight_decay=1e-4,
        min_steps=0,
        shift=0.0,  # the views are the augmentation
        flip=False,
    )
    adam = partial(torch.optim.Adam, lr=chosen.lr)
    net.features.requires_grad_(False)
    course.trained(
        "head",
        model=net,
        method=Method(objective=on_frozen(net, chosen), rate=constant, optimiser=adam),
        again=1,
        epochs=chosen.head_epochs,
        batch=chosen.head_batch,
        lr=chosen.lr,
        min_steps=0,
    )
    net.features.requires_grad_(True)
    with course.clock("judge"):
        lost = losses(net, course, chosen)
        order = np.argsort(lost, kind="stable")
        count = min(max(1, round(chosen.credible * len(order))), len(order) - 1)
        credible = np.sort(order[:count])
    suspect = np.ones(len(lost), bool)
    suspect[credible] = False
    course.trained(
        "mixmatch",
        model=net,
        rows=credible,
        method=Method(
            objective=mixmatch(net, np.flatnonzero(suspect), chosen, course),
            rate=constant,
            optimiser=adam,
        ),
        again=2,
        epochs=1,
        min_steps=chosen.semi_epochs * chosen.iterations,
        batch=chosen.semi_batch,
        lr=chosen.lr,
    )
    return course.outcome(
        net, verdict=verdict(suspect, lost, "dbd", {"labels_used": len(credible)})
    )


# --- 1. images without labels ---------------------------------------------------------------------


class Projected(nn.Module):
    """The extractor of a net, and what SimCLR lays over it: images (B, 3, H, W) -> (B, 128)"""

    def __init__(self, net: Net, seed: int) -> None:
        super().__init__()
        width = net.n_features
        self.features = net.features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            over = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION))
        self.projection = over

    def forward(self, images: Tensor) -> Tensor:
        """Of unit length."""
        return functional.normalize(self.projection(self.features(images)).float(), dim=1)


def cosine(step: int, budget: Budget) -> float:
    """From 1 down to 0 as half a wave."""
    return (1 + math.cos(math.pi * (step - 1) / budget.steps)) / 2


def contrast(seen: Seen, settings: Decoupling) -> Objective:
    """SimCLR: of all views in the batch, which shows the same image?"""

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        shown = [seen(batch, step, which) for which in (1, 2)]
        return nt_xent(forward(torch.cat(shown)), settings.self_temperature)

    return objective


def nt_xent(points: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding row i + B from row i and back, among rows (2B, D) of length 1. ()"""
    likeness = (points @ points.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(points), device=points.device).roll(len(points) // 2)
    return functional.cross_entropy(likeness, partner)


# --- 2. whom to believe ---------------------------------------------------------------------------


def symmetric(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha times cross-entropy and beta times its reverse (Wang et al. 2019). (B,)"""
    usual = functional.cross_entropy(logits, labels, reduction="none")
    given = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return alpha * usual - beta * math.log(NEVER) * (1 - given)


def on_frozen(net: Net, settings: Decoupling) -> Objective:
    """Symmetric cross-entropy, the extractor as in use."""

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        del step
        net.features.eval()
        logits = forward(batch.images)
        return symmetric(logits, batch.labels, settings.alpha, settings.beta).mean()

    return objective


@torch.inference_mode()
def losses(net: Net, course: Course, settings: Decoupling) -> NDArray[np.float32]:
    """Symmetric cross-entropy of every row. (N,)"""
    net.eval()
    backend = course.backend
    lost = backend.xp.empty(len(course.corpus), dtype=backend.xp.float32)
    for batch in backend.batches(course.corpus, BATCH):
        found = symmetric(net(batch.images), batch.labels, settings.alpha, settings.beta)
        lost[backend.array(batch.rows)] = backend.array(found)
    return backend.to_numpy(lost).astype(np.float32)


# --- 3. from those --------------------------------------------------------------------------------


def mixmatch(
    net: Net, others: NDArray[np.int64], settings: Decoupling, course: Course
) -> Objective:
    """MixMatch (Berthelot et al. 2019): the batch has labels, `others` are rows without."""
    train, total = course.settings.train, settings.semi_epochs * settings.iterations
    shift = round(train.shift * course.corpus.image_size[0])
    augment = Augment(shift=shift, flip=train.flip)

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        rng = np.random.default_rng((course.seed, step))
        count = len(batch.rows)
        rows = np.tile(rng.choice(others, count, replace=count > len(others)), 2)
        found = course.backend.batches(
            course.corpus, len(rows), order=rows, augment=augment, rng=rng
        )
        images = torch.cat([batch.images, next(iter(found)).images])
        with torch.no_grad():
            guessed = forward(images[count:]).softmax(1)
            sure = ((guessed[:count] + guessed[count:]) / 2) ** (1 / settings.temperature)
            sure = sure / sure.sum(1, keepdim=True)
        known = functional.one_hot(batch.labels, net.n_outputs).to(sure)
        wanted = torch.cat([known, sure, sure])
        share = float(rng.beta(settings.mix, settings.mix))
        share = max(share, 1 - share)
        other = torch.from_numpy(rng.permutation(len(wanted))).to(wanted.device)
        logits = forward(share * images + (1 - share) * images[other])
        wanted = share * wanted + (1 - share) * wanted[other]
        loss = functional.cross_entropy(logits[:count], wanted[:count])
        apart = (logits[count:].softmax(1) - wanted[count:]).square().mean()
        return loss + settings.unlabelled * min(1.0, step / total) * apart

    return objective
