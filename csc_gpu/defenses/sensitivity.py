"""What D-BR and D-ST begin with (Chen, Wu, Wang, NeurIPS 2022, "Effective Backdoor Defense by
Exploiting Sensitivity of Poisoned Samples"): rows told apart by how their features bear a change.

A net is trained for a few epochs without augmentation, when it knows little but the trigger, and
then its classes are driven apart. FCT(x) = |f(x) - f(t(x))|^2 / D, where t turns and moves the
image at random, is large for poison: the trigger does not bear t, and the row falls back among its
true class. The lowest are taken for clean, the highest for poison, the others are left open. How
many there are of each is set beforehand, clean corpus or not.

As in the authors' code, f(x) is compared with one changed copy, and the loss that drives classes
apart is the mean cosine between the feature means of the classes in a batch. Turn and move are one
resampling here, two there; the learning rate is constant, not the beginning of a cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from csc_gpu.backend import Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.features import BATCH
from csc_gpu.models import Net
from csc_gpu.train import Method, Objective, constant
from csc_gpu.types import Mask, Segregation

BLACK = -2.0
"""A black pixel as the net sees it."""
CHANGES = 101
"""Which draw of the seed the changed copies are."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How rows are told apart."""

    epochs: int = 2
    """Of ordinary training, without augmentation."""
    apart_epochs: int = 10
    """In which the classes are driven apart."""
    lr: float = 0.01
    """Learning rate of both."""
    momentum: float = 0.9
    """Of both, with Nesterov's correction."""
    weight_decay: float = 5e-4
    """Of both."""
    turn: float = 180.0
    """Largest turn of an image either way, in degrees."""
    move: float = 0.2
    """Largest move, as a share of the side."""
    clean: float = 0.2
    """Share of all rows that are taken for clean."""
    poison: float = 0.05
    """Share of all rows that are taken for poison."""

    def __post_init__(self) -> None:
        require(self, "sensitivity", "1 or more", lambda n: n >= 1, "epochs", "apart_epochs")
        require(self, "sensitivity", "above 0", lambda value: 0 < value < 1e6, "lr")
        require(self, "sensitivity", "0 or more", lambda v: 0 <= v < 1e6, "weight_decay", "turn")
        require(self, "sensitivity", "in [0, 1)", lambda v: 0 <= v < 1, "momentum", "move")
        require(self, "sensitivity", "in (0, .5]", lambda v: 0 < v <= 0.5, "clean", "poison")


@dataclass(frozen=True)
class Parted:
    """The rows told apart; those that are neither are left open."""

    clean: Mask  # (N,)
    poison: Mask  # (N,)
    fct: NDArray[np.float32]  # (N,) higher is more sensitive

    def verdict(self, name: str) -> Segregation:
        """Those taken for poison are the suspects."""
        return verdict(self.poison, self.fct, name, {"taken_for_clean": int(self.clean.sum())})


def tell_apart(course: Course, chosen: Sensitivity) -> Parted:
    """Train shortly, drive the classes apart, and sort the rows by FCT."""
    still: dict[str, Any] = {"min_steps": 0, "shift": 0.0, "flip": False, "lr": chosen.lr}
    still |= {"momentum": chosen.momentum, "weight_decay": chosen.weight_decay}
    short = Method(rate=constant)
    model = course.trained("short", method=short, again=11, epochs=chosen.epochs, **still)
    apart = Method(objective=drive_apart(course.corpus.n_classes), rate=constant)
    course.train(
        model.features, "apart", method=apart, again=12, epochs=chosen.apart_epochs, **still
    )
    with course.clock("judge"):
        return part(sensitivities(course, model, chosen), chosen)


def drive_apart(n_classes: int) -> Objective:
    """The mean cosine between the feature means of the classes of a batch, their own left at 0."""

    def objective(forward: Forward, batch: Batch, step: int) -> torch.Tensor:
        del step
        points = forward(batch.images)  # (B, D)
        member = functional.one_hot(batch.labels, n_classes).to(points.dtype)  # (B, C)
        means = functional.normalize(member.T @ points, dim=1)  # a class that is absent stays 0
        present = (member.sum(0) > 0).sum()
        cosine = means @ means.T
        return (cosine.sum() - cosine.diagonal().sum()) / present**2

    return objective


@torch.inference_mode()
def sensitivities(course: Course, model: Net, chosen: Sensitivity) -> NDArray[np.float32]:
    """FCT of every row, each changed by a draw of its own. (N,)"""
    backend, count = course.backend, len(course.corpus)
    rng = np.random.default_rng((course.seed, CHANGES))
    turns = rng.uniform(-1, 1, count) * math.radians(chosen.turn)
    moves = rng.uniform(-1, 1, (count, 2)) * 2 * chosen.move  # a side is 2 long
    maps = torch.from_numpy(inverse_maps(turns, moves)).to(backend.device)
    out = np.empty(count, np.float32)
    model.eval()
    for batch in backend.batches(course.corpus, BATCH):
        there = model.features(changed(batch.images, maps[batch.rows]))
        fct = (model.features(batch.images) - there).square().mean(1)
        out[batch.rows.cpu().numpy()] = fct.float().cpu().numpy()
    return out


def inverse_maps(turns: NDArray[np.float64], moves: NDArray[np.float64]) -> NDArray[np.float32]:
    """Where pixels come from if images are turned, then moved. (N,), (N, 2) -> (N, 2, 3)"""
    turned = np.stack([np.cos(turns), np.sin(turns), -np.sin(turns), np.cos(turns)], axis=1)
    back = turned.reshape(-1, 2, 2)
    return np.concatenate([back, -back @ moves[:, :, None]], axis=2).astype(np.float32)


def changed(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Each image (B, 3, H, W) read along its map (B, 2, 3); outside is black."""
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images - BLACK, grid, mode="nearest", align_corners=False)
    return moved + BLACK


def part(fct: NDArray[np.float32], chosen: Sensitivity) -> Parted:
    """The lowest for clean, the highest for poison, at least one row of each."""
    order = np.argsort(fct, kind="stable")
    clean, poison = np.zeros(len(fct), bool), np.zeros(len(fct), bool)
    clean[order[: max(1, int(chosen.clean * len(fct)))]] = True
    poison[order[-max(1, int(chosen.poison * len(fct))) :]] = True
    return Parted(clean, poison, fct)
