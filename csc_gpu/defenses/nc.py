"""Neural Cleanse (Wang et al., IEEE S&P 2019): trigger reverse engineering, then unlearning.

For every class a mask and a pattern are sought that send the clean images to it while the mask
stays small. A backdoor makes that easy for its target: a class whose mask is far smaller than the
median, by the median absolute deviation, is a target. The net then unlearns: it is fine-tuned on
the clean images, a fifth of which carry such a trigger and their true label. If no class stands out
the net stays as it was. Rows are not judged.

Search as published (the weight of the mask's size adapts); its settings and those of the unlearning
are BackdoorBench's, where the paper unlearns for one epoch on a tenth of the data. It searches to
the end, without early stop, and of several targets unlearns all at once.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from csc_gpu import csc
from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course
from csc_gpu.defenses.outlying import deviations
from csc_gpu.models import Net
from csc_gpu.train import Method, Objective, constant
from csc_gpu.trigger import RANGE
from csc_gpu.types import DefenderView, Outcome

EASE = 1.5
"""The mask's weight falls by its factor to this power, where it rises by the factor."""


@dataclass(frozen=True, kw_only=True)
class Cleanse:
    """How triggers are sought, and unlearnt."""

    epochs: int = 80
    """Passes over the clean images for each class."""
    lr: float = 0.1
    """Of Adam, in the search."""
    batch: int = 32
    """Images in one optimiser step of the search."""
    cost: float = 1e-3
    """First weight of the mask's size, in losses a pixel, once the trigger works."""
    factor: float = 2.0
    """What that weight is multiplied by, and (to the power 1.5) divided by."""
    patience: int = 5
    """Epochs in a row with, or without, success before the weight changes."""
    success: float = 0.98
    """Share of the images that a trigger which works sends to its class."""
    index: float = 2.0
    """Anomaly index above which a small mask makes its class a target."""
    unlearn_epochs: int = 100
    """Passes over the clean images while the triggers are unlearnt."""
    unlearn_lr: float = 0.01
    """Peak learning rate then."""
    unlearn_share: float = 0.2
    """Share of the clean images that carry a trigger then."""

    def __post_init__(self) -> None:
        counts = ("epochs", "batch", "patience", "unlearn_epochs")
        require(self, "nc", "1 or more", lambda count: count >= 1, *counts)
        rates = ("lr", "cost", "index", "unlearn_lr")
        require(self, "nc", "above 0", lambda value: 0 < value < math.inf, *rates)
        require(self, "nc", "above 1", lambda value: 1 < value < math.inf, "factor")
        shares = ("success", "unlearn_share")
        require(self, "nc", "in (0, 1]", lambda share: 0 < share <= 1, *shares)


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and how triggers are sought and unlearnt."""

    nc: Cleanse = field(default_factory=Cleanse)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, seek a trigger for every class, unlearn those of the classes that stand out."""
    course = Course(view, settings, backend, **how)
    chosen, reserve = settings.nc, course.reserve
    model = course.trained()
    triggers = [sought(course, model, label, chosen) for label in range(view.train.n_classes)]
    norms = np.array([float(trigger.found()[0].sum()) for trigger in triggers])
    index = deviations(-norms)  # masks far smaller than the others'
    targets = np.flatnonzero(index > chosen.index)
    course.log("triggers", norms=norms.tolist(), index=index.tolist(), targets=targets.tolist())
    if not len(targets):
        return course.outcome(model, model)
    rng = np.random.default_rng(course.seed)
    carried = rng.choice(targets, len(reserve))
    carried[rng.random(len(reserve)) >= chosen.unlearn_share] = len(triggers)
    cured = course.trained(
        "unlearn",
        model=copy.deepcopy(model),
        corpus=reserve,
        method=Method(objective=unlearning(triggers, carried, backend)),
        again=2,
        epochs=chosen.unlearn_epochs,
        lr=chosen.unlearn_lr,
        min_steps=0,
    )
    return course.outcome(cured, model)


class Trigger(nn.Module):
    """A mask and a pattern; what the search remembers is in buffers, so that it can be resumed."""

    cost: Tensor  # () weight of the mask's size
    above: Tensor  # () epochs in a row with success
    below: Tensor  # () and without
    hits: Tensor  # () images of this epoch that it sent to its class
    smallest: Tensor  # () size of the smallest mask that worked, in pixels
    best: Tensor  # (4, H, W) that mask, and its pattern

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        super().__init__()
        inside = rng.uniform(-0.98, 0.98, (4, *size))  # tanh of what is learnt
        start = torch.from_numpy(np.arctanh(inside)).float()
        self.hidden_mask, self.hidden_pattern = nn.Parameter(start[0]), nn.Parameter(start[1:])
        for name in ("cost", "above", "below", "hits"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("smallest", torch.tensor(math.inf))
        self.register_buffer("best", torch.zeros(4, *size))

    def mask(self) -> Tensor:
        """How much of each pixel is replaced. (H, W) 0..1"""
        return (self.hidden_mask.tanh() + 1) / 2

    def pattern(self) -> Tensor:
        """By what, as the net sees it. (3, H, W)"""
        return RANGE * self.hidden_pattern.tanh()

    def forward(self, images: Tensor) -> Tensor:
        """The images (B, 3, H, W) with the trigger."""
        return stamped(images, self.mask(), self.pattern())

    @torch.no_grad()
    def judge(self, images: int, settings: Cleanse) -> None:
        """An epoch has ended: keep the smallest mask that works, and change its weight."""
        works = self.hits / images >= settings.success
        size = self.mask().sum()
        better = works & (size < self.smallest)
        now = torch.cat([self.mask()[None], self.pattern()])
        self.smallest = torch.where(better, size, self.smallest)
        self.best = torch.where(better, now, self.best)
        self.above = torch.where(works, self.above + 1, 0)
        self.below = torch.where(works, 0, self.below + 1)
        up, down = self.above >= settings.patience, self.below >= settings.patience
        raised = torch.where(self.cost > 0, self.cost * settings.factor, settings.cost)
        eased = torch.where(down, self.cost / settings.factor**EASE, self.cost)
        self.cost = torch.where(up, raised, eased)
        self.above, self.below = torch.where(up, 0, self.above), torch.where(down, 0, self.below)
        self.hits = torch.zeros_like(self.hits)

    @torch.no_grad()
    def found(self) -> tuple[Tensor, Tensor]:
        """The smallest mask (H, W) that worked, or else the last, and its pattern (3, H, W)."""
        if torch.isfinite(self.smallest):
            return self.best[0], self.best[1:]
        return self.mask(), self.pattern()


def stamped(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Images (B, 3, H, W) that show the pattern (3, H, W) as far as the mask (H, W) says."""
    return images * (1 - mask) + pattern * mask


def sought(course: Course, model: Net, label: int, settings: Cleanse) -> Trigger:
    """The smallest trigger that sends the clean images to this class."""
    clean = course.reserve
    trigger = Trigger(clean.image_size, np.random.default_rng((course.seed, label)))
    model.requires_grad_(False)
    course.train(
        trigger.to(course.backend.device),
        f"trigger-{label}",
        corpus=clean,
        method=Method(
            objective=search(trigger, model, label, len(clean), settings),
            rate=constant,
            optimiser=lambda weights: torch.optim.Adam(weights, settings.lr, betas=(0.5, 0.9)),
        ),
        epochs=settings.epochs,
        batch=settings.batch,
        lr=settings.lr,
        min_steps=0,
        shift=0.0,  # a trigger has its place
        flip=False,
    )
    model.requires_grad_(True)
    return trigger


def search(trigger: Trigger, model: Net, label: int, images: int, settings: Cleanse) -> Objective:
    """Cross-entropy towards the class, and the weighted size of the mask; watched every epoch."""
    per_epoch = math.ceil(images / settings.batch)

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        model.eval()
        logits = model(forward(batch.images))
        wanted = torch.full_like(batch.labels, label)
        loss = functional.cross_entropy(logits, wanted) + trigger.cost * trigger.mask().sum()
        trigger.hits = trigger.hits + (logits.argmax(1) == wanted).sum()
        if step % per_epoch == 0:
            trigger.judge(images, settings)
        return loss

    return objective


def unlearning(triggers: list[Trigger], carried: NDArray[np.int64], backend: Backend) -> Objective:
    """Cross-entropy by the true labels; row n shows trigger carried[n], none if there is no such.

    carried is (rows of the corpus,), 0..C.
    """
    found = [trigger.found() for trigger in triggers]
    masks = torch.stack([*(mask for mask, _ in found), torch.zeros_like(found[0][0])])[:, None]
    patterns = torch.stack([*(shown for _, shown in found), torch.zeros_like(found[0][1])])
    which = torch.from_numpy(carried).to(backend.device)

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        del step
        shown = which[batch.rows]
        images = stamped(batch.images, masks[shown], patterns[shown])
        return functional.cross_entropy(forward(images), batch.labels)

    return objective
