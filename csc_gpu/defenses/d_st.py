"""D-ST, secure training (Chen, Wu, Wang, NeurIPS 2022): contrast first, then a head for the clean.

Rows are told apart by their sensitivity (sensitivity.py). A fresh extractor learns by
semi-supervised contrast: two views of a row taken for clean are drawn to all rows of its label,
two views of any other row to each other alone, so that its label teaches nothing. The head then
learns the labels of the rows taken for clean, and unlearns, a thousandth as strongly, those of the
rows taken for poison.

As in the authors' code: rows of the label draw a clean row whether or not they are clean
themselves. The last epoch of the head is kept, not that which does best on test images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from csc_gpu import csc
from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course
from csc_gpu.defenses.sensitivity import Sensitivity, tell_apart
from csc_gpu.defenses.views import Seen, Views, seeing
from csc_gpu.models import Net
from csc_gpu.train import Budget, Method, Objective, Rate, constant
from csc_gpu.types import DefenderView, Outcome


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The two stages: the extractor, and its head."""

    epochs: int = 200
    """Of the extractor."""
    lr: float = 0.5
    """Its learning rate: up for `warmup` epochs, then down along a cosine to a thousandth."""
    warmup: int = 10
    """Epochs."""
    batch: int = 512
    """Rows in one step, of both stages; two views of each in the first."""
    temperature: float = 0.1
    """By which cosines are divided."""
    base_temperature: float = 0.07
    """The loss is multiplied by temperature / base_temperature, as in SupContrast."""
    projection: int = 128
    """Dimensions in which views are compared."""
    weight_decay: float = 1e-4
    """Of the extractor."""
    head_epochs: int = 10
    """Of the head."""
    head_lr: float = 5.0
    """Its learning rate, constant."""
    unlearning: float = 0.001
    """Weight of the loss of poison, which is climbed."""
    momentum: float = 0.9
    """Of both stages, with Nesterov's correction."""

    def __post_init__(self) -> None:
        require(self, "d_st", "1 or more", lambda n: n >= 1, "epochs", "head_epochs", "projection")
        above = ("lr", "temperature", "base_temperature", "head_lr")
        require(self, "d_st", "above 0", lambda value: 0 < value < 1e6, *above)
        none = ("warmup", "weight_decay", "unlearning")
        require(self, "d_st", "0 or more", lambda value: 0 <= value < 1e6, *none)
        require(self, "d_st", "4 or more", lambda rows: rows >= 4, "batch")
        require(self, "d_st", "in [0, 1)", lambda share: 0 <= share < 1, "momentum")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, how rows are told apart, the two stages, and the views."""

    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    d_st: Contrast = field(default_factory=Contrast)
    views: Views = field(default_factory=Views)


class Projected(nn.Module):
    """An extractor and the small net behind it in which views are compared."""

    def __init__(self, net: Net, dimensions: int, seed: int) -> None:
        super().__init__()
        self.features, width = net.features, net.n_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dimensions)
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Points on the sphere. (B, dimensions)"""
        return functional.normalize(self.projector(self.features(images)), dim=1)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Tell rows apart, train an extractor by contrast, and a head on the rows taken for clean."""
    course, chosen = Course(view, settings, backend, **how), settings.d_st
    parted = tell_apart(course, settings.sensitivity)
    net = course.fresh(4)
    both: dict[str, Any] = {"batch": chosen.batch, "momentum": chosen.momentum, "min_steps": 0}
    plain = {**both, "shift": 0.0, "flip": False}  # the views are the augmentation
    seen = seeing(settings.views, course.seed, flip=settings.train.flip)
    clean, poison = (
        torch.from_numpy(rows).to(backend.device) for rows in (parted.clean, parted.poison)
    )
    course.train(
        Projected(net, chosen.projection, course.seed).to(backend.device),
        "contrast",
        method=Method(objective=contrast(clean, seen, chosen), rate=cosine(chosen.warmup)),
        again=4,
        epochs=chosen.epochs,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        **plain,
    )
    net.features.requires_grad_(False)
    course.trained(
        "head",
        model=net,
        rows=np.flatnonzero(parted.clean | parted.poison),
        method=Method(objective=mixed(poison, seen, net, chosen.unlearning), rate=constant),
        again=5,
        epochs=chosen.head_epochs,
        lr=chosen.head_lr,
        weight_decay=0.0,
        **plain,
    )
    net.features.requires_grad_(True)
    return course.outcome(net, None, parted.verdict("d-st"))


def contrast(clean: torch.Tensor, seen: Seen, chosen: Contrast) -> Objective:
    """The semi-supervised contrastive loss of two views of each row, given who is clean (N,)."""

    def objective(forward: Forward, batch: Batch, step: int) -> torch.Tensor:
        points = forward(torch.cat([seen(batch, step, which) for which in (1, 2)])).float()
        drawn = to_each_other(batch.labels, clean[batch.rows])
        loss = contrastive(points, drawn.repeat(2, 2), chosen.temperature)
        return loss * (chosen.temperature / chosen.base_temperature)

    return objective


def to_each_other(labels: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Which rows (B,) a row is drawn to: if clean to its label, else to itself alone. (B, B)"""
    alone = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return alone | (clean[:, None] & (labels[:, None] == labels))


def contrastive(points: torch.Tensor, drawn: torch.Tensor, temperature: float) -> torch.Tensor:
    """Khosla et al. 2020, L_out: unit points (n, d), whom each is drawn to (n, n), itself aside. ()

    Every point must be drawn to one other at least.
    """
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    logits = (points @ points.T / temperature).masked_fill(itself, -math.inf)
    told = logits.log_softmax(dim=1).masked_fill(itself | ~drawn, 0.0)
    loss: torch.Tensor = -(told.sum(1) / (drawn & ~itself).sum(1)).mean()
    return loss


def mixed(poison: torch.Tensor, seen: Seen, net: Net, unlearning: float) -> Objective:
    """Cross-entropy of clean rows, less a little of that of poison (N,), of the head alone."""

    def objective(forward: Forward, batch: Batch, step: int) -> torch.Tensor:
        net.features.eval()
        logits = forward(seen(batch, step, 0))
        loss = functional.cross_entropy(logits, batch.labels, reduction="none")
        bad = poison[batch.rows].to(loss.dtype)
        down = (loss * (1 - bad)).sum() / (1 - bad).sum().clamp(min=1)
        up: torch.Tensor = (loss * bad).sum() / bad.sum().clamp(min=1)
        return down - unlearning * up

    return objective


def cosine(warmup: int, last: float = 0.001) -> Rate:
    """A rate that rises for `warmup` epochs and falls along half a cosine, to `last` at the end."""

    def fallen(step: int, budget: Budget) -> float:
        return last + (1 - last) * (1 + math.cos(math.pi * step / budget.steps)) / 2

    def rate(step: int, budget: Budget) -> float:
        until = warmup * budget.steps_per_epoch
        rising = step / until if step < until else 1.0
        return rising * fallen(step, budget)

    return rate
