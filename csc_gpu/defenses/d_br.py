"""D-BR, backdoor removal (Chen, Wu, Wang, NeurIPS 2022): unlearn poison, relearn what is clean.

Rows are told apart by their sensitivity (sensitivity.py). The trained net then climbs the loss of
those taken for poison and descends that of those taken for clean, one pass after the other. The
authors' code keeps the epoch that does best on clean and triggered test images; nobody has those,
so the last epoch is kept here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from csc_gpu import csc
from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course
from csc_gpu.defenses.sensitivity import Sensitivity, tell_apart
from csc_gpu.train import Method, Objective, Order, constant
from csc_gpu.types import DefenderView, Mask, Outcome


@dataclass(frozen=True, kw_only=True)
class Removal:
    """How the backdoor is unlearnt."""

    epochs: int = 20
    """Each a pass over the poison, upwards, and one over the clean rows, downwards."""
    lr: float = 1e-4
    """Learning rate, constant."""
    momentum: float = 0.9
    """With Nesterov's correction."""
    weight_decay: float = 5e-4
    """Of every weight."""

    def __post_init__(self) -> None:
        require(self, "d_br", "1 or more", lambda count: count >= 1, "epochs")
        require(self, "d_br", "above 0", lambda value: 0 < value < 1e6, "lr")
        require(self, "d_br", "in [0, 1)", lambda share: 0 <= share < 1, "momentum")
        require(self, "d_br", "0 or more", lambda value: 0 <= value < 1e6, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, how rows are told apart, and how the backdoor is unlearnt."""

    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    d_br: Removal = field(default_factory=Removal)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, tell rows apart, unlearn the poison and relearn the clean rows."""
    course, chosen = Course(view, settings, backend, **how), settings.d_br
    model = course.trained()
    parted = tell_apart(course, settings.sensitivity)
    poison = torch.from_numpy(parted.poison).to(backend.device)
    net = course.trained(
        "remove",
        model=copy.deepcopy(model),
        rows=np.flatnonzero(parted.poison | parted.clean),
        method=Method(objective=up_and_down(poison), rate=constant, order=first(parted.poison)),
        again=3,
        epochs=chosen.epochs,
        lr=chosen.lr,
        momentum=chosen.momentum,
        weight_decay=chosen.weight_decay,
        min_steps=0,
    )
    return course.outcome(net, model, parted.verdict("d-br"))


def first(poison: Mask) -> Order:
    """A pass over the poison (N,), shuffled, and then one over the other rows."""

    def order(rng: np.random.Generator, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        drawn = rng.permutation(rows)
        return np.concatenate([drawn[poison[drawn]], drawn[~poison[drawn]]])

    return order


def up_and_down(poison: torch.Tensor) -> Objective:
    """Cross-entropy, its sign turned for the rows that are poison (N,)."""

    def objective(forward: Forward, batch: Batch, step: int) -> torch.Tensor:
        del step
        loss = functional.cross_entropy(forward(batch.images), batch.labels, reduction="none")
        return torch.where(poison[batch.rows], -loss, loss).mean()

    return objective
