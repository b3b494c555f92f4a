"""Neural Attention Distillation (Li et al., ICLR 2021, arXiv 2101.05930).

A few clean images fine-tune a copy of the trained net, the teacher. Then the net itself, the
student, is fine-tuned on them with a second aim: where it looks, block by block, shall be where the
teacher looks. Attention is the sum over channels of |activation|^p, at unit length. Published
settings, with the weights of the authors' code (500, 1000, 1000) and its mean of squares, where the
paper writes a norm and one weight; augmentation is the run's, without their Cutout.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from csc_gpu import csc
from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course
from csc_gpu.models import Block, Net, blocks_of
from csc_gpu.train import Method, Objective, cross_entropy, falling
from csc_gpu.types import Corpus, DefenderView, Outcome


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How teacher and student are fine-tuned on the clean images."""

    teacher_epochs: int = 10
    """Passes of the teacher over the clean images."""
    epochs: int = 10
    """Passes of the student over them."""
    min_steps: int = 400
    """Fewest optimiser steps of either, as many as with the 2,500 images of the paper: fewer images
    are passed over more often, and the learning rate falls as much later (ours; 0: never)."""
    batch: int = 64
    """Images in one optimiser step of either."""
    lr: float = 0.1
    """First learning rate of either."""
    every: int = 2
    """Epochs after which the learning rate is divided by ten, again and again."""
    weight_decay: float = 1e-4
    """Of every weight, of either."""
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    """Weights of the attention losses of the last groups of blocks, the deepest last; a group is
    the blocks of one width, and its attention that of the last of them."""
    power: float = 2.0
    """The p of |activation|^p."""

    def __post_init__(self) -> None:
        counts = ("teacher_epochs", "epochs", "every")
        require(self, "nad", "1 or more", lambda count: count >= 1, *counts)
        require(self, "nad", "4 or more", lambda rows: rows >= 4, "batch")
        require(self, "nad", "above 0", lambda value: 0 < value < math.inf, "lr", "power")
        positive = ("weight_decay", "min_steps")
        require(self, "nad", "0 or more", lambda value: 0 <= value < math.inf, *positive)
        weights = "one to three weights of 0 or more"
        require(self, "nad", weights, lambda b: 1 <= len(b) <= 3 and min(b) >= 0, "betas")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and those of the distillation."""

    nad: Distillation = field(default_factory=Distillation)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, fine-tune a teacher on the clean images, distil its attention into the net."""
    course = Course(view, settings, backend, **how)
    chosen, reserve = settings.nad, course.reserve
    blocks_of(course.fresh(), "nad")  # before an hour is spent
    model = course.trained()

    def tuned(name: str, epochs: int, again: int, net: Net, aim: Objective = cross_entropy) -> Net:
        stretch = math.ceil(chosen.min_steps / (epochs * batches_of(reserve, chosen))) or 1
        falls = range(chosen.every * stretch, epochs * stretch, chosen.every * stretch)
        return course.trained(
            name,
            model=net,
            corpus=reserve,
            method=Method(objective=aim, rate=falling(*falls)),
            again=again,
            epochs=epochs * stretch,
            min_steps=0,
            batch=chosen.batch,
            lr=chosen.lr,
            weight_decay=chosen.weight_decay,
        )

    teacher = tuned("teacher", chosen.teacher_epochs, 2, copy.deepcopy(model))
    teacher.requires_grad_(False).eval()
    student = copy.deepcopy(model)
    tuned("student", chosen.epochs, 3, student, distillation(student, teacher, chosen))
    return course.outcome(student, model)


def batches_of(clean: Corpus, settings: Distillation) -> int:
    """Optimiser steps of one pass."""
    return math.ceil(len(clean) / settings.batch)


def distillation(student: Net, teacher: Net, settings: Distillation) -> Objective:
    """Cross-entropy, and how far the student's attention is from the teacher's."""

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        del forward, step
        maps, features = looked(student, batch.images)
        with torch.no_grad():
            theirs, _ = looked(teacher, batch.images)
        loss = functional.cross_entropy(student.head(features), batch.labels)
        weighted = reversed(settings.betas)
        for beta, ours, wanted in zip(weighted, reversed(maps), reversed(theirs), strict=False):
            apart = attention(ours, settings.power) - attention(wanted, settings.power)
            loss = loss + beta * apart.square().mean()
        return loss

    return objective


def looked(model: Net, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """What each group of blocks gives, (B, channels, h, w) each, and the features. (B, D)"""
    given: list[Tensor] = []
    assert isinstance(model.features, torch.nn.Sequential)
    for layer in model.features:
        images = layer(images)
        given += [images] if isinstance(layer, Block) else []
    groups = itertools.groupby(given, key=lambda maps: maps.shape[1])
    return [list(group)[-1] for _, group in groups], images


def attention(maps: Tensor, power: float) -> Tensor:
    """The sum over channels of |activation|^power, of unit length. (B, c, h, w) -> (B, h * w)"""
    return functional.normalize(maps.float().abs().pow(power).sum(1).flatten(1), dim=1)
