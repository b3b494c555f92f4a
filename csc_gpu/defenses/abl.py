"""Anti-Backdoor Learning (Li, Lyu, Koren, Lyu, Li, Ma, NeurIPS 2021, arXiv 2110.11571).

Poison is learnt first. Training is held at a loss: rows whose loss falls below it all the same are
poison, and the lowest are isolated. The net is then trained on the others, and unlearns the
isolated rows by gradient ascent. Isolation is meant to be pure, not complete: what it names is a
share of the rows that is set beforehand, clean corpus or not.

The schedule is the paper's for CIFAR-10, 100 epochs; the authors' code isolates for 10 and unlearns
for 5. Added: a least number of steps of ascent, for small corpora. Left out: Cutout in the second
stage, where augmentation is that of every defense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu import csc
from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.train import FEWEST, Method, constant, cross_entropy, falling
from csc_gpu.types import DefenderView, Mask, Outcome

HELD = ("flooding", "lga")


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """The three stages: isolate, tune, unlearn."""

    hold: str = "flooding"
    """How the loss is held up. flooding: |loss - gamma| + gamma, as the authors' code does it.
    lga: sign(loss - gamma) loss, the paper's local gradient ascent."""
    gamma: float = 0.5
    """The loss, of a batch, at which training is held."""
    share: float = 0.01
    """Of all rows, how many are isolated."""
    isolating: int = 20
    """Epochs of the first stage; no augmentation."""
    tuning: int = 60
    """Epochs on the rows that are left."""
    unlearning: int = 20
    """Epochs of ascent on the isolated rows; no augmentation."""
    unlearning_steps: int = 80
    """Fewest steps of the ascent, as many as 500 rows take in 20 epochs: where few rows are
    isolated, it lasts more epochs."""
    lr: float = 0.1
    """Learning rate while isolating and tuning."""
    falls_at: int = 40
    """Epochs of tuning after which it is divided by 10."""
    unlearning_lr: float = 5e-4
    """Learning rate of the ascent."""
    momentum: float = 0.9
    """In every stage, with Nesterov's correction."""
    weight_decay: float = 1e-4
    """In every stage."""

    def __post_init__(self) -> None:
        require(self, "abl", f"one of {', '.join(HELD)}", HELD.__contains__, "hold")
        require(self, "abl", "in (0, 1)", lambda share: 0 < share < 1, "share")
        require(self, "abl", "1 or more", lambda n: n >= 1, "isolating", "tuning", "unlearning")
        above = ("gamma", "lr", "unlearning_lr")
        require(self, "abl", "above 0", lambda value: 0 < value < 1e6, *above)
        none = ("falls_at", "weight_decay", "unlearning_steps")
        require(self, "abl", "0 or more", lambda v: 0 <= v < 1e6, *none)
        require(self, "abl", "in [0, 1)", lambda share: 0 <= share < 1, "momentum")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and those of the three stages."""

    abl: Isolation = field(default_factory=Isolation)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Isolate what is learnt first, train on the rest, unlearn what was isolated."""
    course, chosen = Course(view, settings, backend, **how), settings.abl
    common: dict[str, Any] = {"momentum": chosen.momentum, "weight_decay": chosen.weight_decay}
    common |= {"min_steps": 0}
    still = {**common, "shift": 0.0, "flip": False}
    hold = Held(chosen.hold, chosen.gamma)
    model = course.trained(
        "isolate",
        method=Method(objective=hold, rate=constant),
        epochs=chosen.isolating,
        lr=chosen.lr,
        **still,
    )
    _, losses = course.judged(model, course.features(model))
    isolated = lowest(losses, chosen.share)
    course.trained(
        "tune",
        model=model,
        rows=np.flatnonzero(~isolated),
        method=Method(rate=falling(chosen.falls_at)),
        again=1,
        epochs=chosen.tuning,
        lr=chosen.lr,
        **common,
    )
    course.trained(
        "unlearn",
        model=model,
        rows=np.flatnonzero(isolated),
        method=Method(objective=ascent, rate=constant),
        again=2,
        epochs=chosen.unlearning,
        lr=chosen.unlearning_lr,
        **still | {"min_steps": chosen.unlearning_steps},
    )
    found = verdict(isolated, -losses, "abl", {"hold": chosen.hold, "share": chosen.share})
    return course.outcome(model, None, found)


@dataclass(frozen=True)
class Held:
    """Cross-entropy that is not to fall below gamma; the mean of a batch is held, not each row."""

    how: str
    gamma: float

    def __call__(self, forward: Forward, batch: Batch, step: int) -> torch.Tensor:
        loss = cross_entropy(forward, batch, step)
        if self.how == "lga":
            return torch.sign(loss - self.gamma) * loss
        return (loss - self.gamma).abs() + self.gamma


def ascent(forward: Forward, batch: Batch, step: int) -> torch.Tensor:
    """Cross-entropy, to be increased. ()"""
    return -cross_entropy(forward, batch, step)


def lowest(losses: NDArray[np.float32], share: float) -> Mask:
    """The rows of the lowest losses (N,), as many as batch norm needs at least. (N,)"""
    isolated = np.zeros(len(losses), bool)
    count = max(FEWEST, int(share * len(losses)))
    isolated[np.argsort(losses, kind="stable")[:count]] = True
    return isolated
