"""The only training loop: a generator that yields after every optimiser step.

Because it yields, the caller decides when to stop or to take features; there are no callbacks.
SGD with momentum and a one-cycle learning rate: a linear warm-up, then a linear decay to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from csc_gpu.backend import Augment, Backend
from csc_gpu.config import require
from csc_gpu.models import MODELS, Net
from csc_gpu.types import Corpus


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the classifier is trained."""

    model: str = ""
    """resnet8 or resnet18; empty: resnet8 with --cpu, resnet18 on a GPU."""
    epochs: int = 0
    """Passes over the corpus; 0: what goes with the model (resnet8 10, resnet18 100)."""
    min_steps: int = 600
    """Fewest optimiser steps: a small corpus gets more epochs than asked for."""
    batch: int = 128
    """Images in one optimiser step."""
    lr: float = 0.05
    """Peak learning rate."""
    momentum: float = 0.9
    """Of SGD, with Nesterov's correction."""
    weight_decay: float = 5e-4
    """Of every weight."""
    warmup: float = 2.0
    """Epochs until the peak learning rate, at most a fifth of all."""
    shift: float = 0.0625
    """Largest random shift, as a share of the image height."""
    flip: bool = False
    """Mirror images at random; for pictures whose mirror image has the same label."""

    def __post_init__(self) -> None:
        models = ("", *MODELS)
        require(self, "train", f"one of {', '.join(MODELS)}", models.__contains__, "model")
        require(self, "train", "4 or more", lambda rows: rows >= 4, "batch")
        require(self, "train", "above 0", lambda value: 0 < value < math.inf, "lr")
        positive = ("epochs", "min_steps", "weight_decay", "warmup")
        require(self, "train", "0 or more", lambda value: 0 <= value < math.inf, *positive)
        require(self, "train", "in [0, 1)", lambda share: 0 <= share < 1, "momentum")
        require(self, "train", "in [0, .5)", lambda share: 0 <= share < 0.5, "shift")


@dataclass(frozen=True)
class Budget:
    """How long training lasts."""

    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Moment:
    """The state of training after one optimiser step."""

    step: int  # 1..budget.steps
    epoch: float  # passes over the corpus so far
    loss: torch.Tensor  # () of this batch, on the device; reading it waits for the device
    lr: float
    budget: Budget


def budget(n_rows: int, settings: Settings) -> Budget:
    """Epochs and steps for so many rows."""
    steps = math.ceil(n_rows / settings.batch)
    epochs = settings.epochs or MODELS[settings.model].epochs
    return Budget(max(epochs, math.ceil(settings.min_steps / steps)), steps)


def train(
    model: Net,
    corpus: Corpus,
    settings: Settings,
    backend: Backend,
    *,
    seed: int,
    rows: NDArray[np.int64] | None = None,
) -> Iterator[Moment]:
    """Train on these rows (all, if None), cross-entropy; yields after every step.

    The model is in train mode whenever a step begins, whatever the caller did in between.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(len(corpus)) if rows is None else rows
    plan = budget(len(rows), settings)
    shift = round(settings.shift * corpus.image_size[0])
    augment = Augment(shift=shift, flip=settings.flip)
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
        fused=backend.fused or None,  # None is torch's own choice
    )
    warmup = min(settings.warmup, 0.2 * plan.epochs) * plan.steps_per_epoch
    step = 0
    for _ in range(plan.epochs):
        order = rng.permutation(rows)
        for batch in backend.batches(corpus, settings.batch, order=order, augment=augment, rng=rng):
            step += 1
            lr = settings.lr * one_cycle(step, warmup, plan.steps)
            optimiser.param_groups[0]["lr"] = lr
            model.train()
            with backend.precision():
                loss = functional.cross_entropy(model(batch.images), batch.labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            yield Moment(step, step / plan.steps_per_epoch, loss.detach(), lr, plan)


def one_cycle(step: int, warmup: float, steps: int) -> float:
    """Share of the peak learning rate at a step: up to 1 over `warmup` steps, then down to 0."""
    if step <= warmup:
        return step / warmup
    return max(0.0, (steps - step + 1) / (steps - warmup + 1))
