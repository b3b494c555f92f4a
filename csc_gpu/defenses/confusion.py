"""A round of Confusion Training (ct.py): go on fitting the distilled rows, then confuse a copy.

The numbers are those of the authors' code for CIFAR-10. Of other make here: momentum with
Nesterov's correction, and whole passes over the reserve.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from csc_gpu.backend import Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course
from csc_gpu.defenses.streams import Stream
from csc_gpu.models import Net
from csc_gpu.train import Method, Objective, constant
from csc_gpu.types import Corpus


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Round after round, and the test at the end. A tuple has a number for each round."""

    kept: tuple[float, ...] = (1 / 2, 1 / 5, 1 / 25, 1 / 50, 1 / 100)
    """Share of all rows that is distilled by a round; the last round keeps what is fitted."""
    least: tuple[float, ...] = (1 / 50, 1 / 50, 1 / 50, 1 / 50, 1 / 100)
    """Share of its rows that every class keeps at least."""
    epochs: tuple[int, ...] = (100, 100, 40, 40, 40, 40)
    """Passes over the distilled rows before each confusion."""
    iterations: tuple[int, ...] = (6000, 6000, 6000, 6000, 2000, 2000)
    """Steps of each confusion, up to whole passes over the reserve."""
    weight: tuple[float, ...] = (20.0, 20.0, 20.0, 30.0, 30.0, 15.0)
    """Lambda: wrong labels count for all but 1 part in so many."""
    lr: tuple[float, ...] = (0.001, 0.001, 0.001, 0.01, 0.01, 0.01)
    """Learning rate of each confusion."""
    every: tuple[int, ...] = (2, 2, 2, 2, 2, 2)
    """Distilled rows join every so many steps."""
    momentum: float = 0.7
    """Of confusion."""
    fit_lr: float = 0.01
    """Learning rate before each confusion."""
    fit_momentum: float = 0.9
    """Momentum before each confusion."""
    weight_decay: float = 1e-4
    """Of both."""
    batch: int = 32
    """Clean images in one step, and distilled rows in one step."""
    evening: float = 0.001
    """Added to a class's share of the distilled rows; their weight is 1 / root of the sum."""
    ridge: float = 0.001
    """Added to the variances of each Gaussian."""
    surely: float = 2.0
    """A class whose likelihood ratio is above it is poisoned."""
    likely: float = 1.5
    """So is the class of the largest ratio, if that is above it."""

    def __post_init__(self) -> None:
        rounds = len(self.kept) + 1
        told = f"{rounds} numbers above 0, one more than ct.kept has"
        require(
            self,
            "ct",
            told,
            lambda v: len(v) == rounds and min(v) > 0,
            "epochs",
            "iterations",
            "weight",
            "lr",
            "every",
        )
        require(self, "ct", "as long as ct.kept", lambda v: len(v) == len(self.kept), "least")
        shares = "shares in (0, 1]"
        require(self, "ct", shares, lambda v: all(0 < share <= 1 for share in v), "kept", "least")
        above = ("fit_lr", "evening", "ridge", "surely", "likely")
        require(self, "ct", "above 0", lambda value: 0 < value < 1e6, *above)
        require(self, "ct", "in [0, 1)", lambda share: 0 <= share < 1, "momentum", "fit_momentum")
        require(self, "ct", "0 or more", lambda value: 0 <= value < 1e6, "weight_decay")
        require(self, "ct", "4 or more", lambda rows: rows >= 4, "batch")


def fit(base: Net, rows: NDArray[np.int64], course: Course, chosen: Confusion, number: int) -> None:
    """Go on training the base on the distilled rows; in the last round on the reserve as well."""
    is_last = number == len(chosen.kept)
    corpus = with_reserve(course, rows) if is_last else course.corpus
    course.train(
        base,
        f"fit-{number}",
        corpus=corpus,
        rows=None if is_last else rows,
        method=Method(rate=constant),
        again=number,
        epochs=chosen.epochs[number],
        lr=chosen.fit_lr,
        momentum=chosen.fit_momentum,
        **common(chosen),
    )


def confuse(
    base: Net,
    undefended: Net,
    rows: NDArray[np.int64],
    course: Course,
    chosen: Confusion,
    number: int,
) -> Net:
    """A copy of the base, trained on wrong labels of clean images and on the distilled rows.

    Wrong is what the undefended net does not say: the base has learnt no more than distilled rows.
    """
    model, again = copy.deepcopy(base), number + len(chosen.epochs)
    seed = (course.seed, again)
    stream = Stream(course.corpus, chosen.batch, course.backend, seed=seed, rows=rows)
    even = np.ones(course.corpus.n_classes)
    labels = course.corpus.labels[rows]
    weights = even if number == len(chosen.kept) else evened(labels, len(even), chosen.evening)
    objective = confusion(
        undefended.eval(),
        stream,
        torch.from_numpy(weights).float().to(course.backend.device),
        weight=chosen.weight[number],
        every=chosen.every[number],
    )
    course.train(
        model,
        f"confuse-{number}",
        corpus=course.reserve,
        method=Method(objective=objective, rate=constant),
        again=again,
        epochs=1,
        lr=chosen.lr[number],
        momentum=chosen.momentum,
        **common(chosen) | {"min_steps": chosen.iterations[number]},
    )
    return model


def common(chosen: Confusion) -> dict[str, Any]:
    """What both trainings of a round have alike: no augmentation, for one."""
    still = {"min_steps": 0, "shift": 0.0, "flip": False}
    return {"batch": chosen.batch, "weight_decay": chosen.weight_decay, **still}


def confusion(
    undefended: Net, stream: Stream, weights: torch.Tensor, *, weight: float, every: int
) -> Objective:
    """Clean images get a label that the undefended net would not give; every so often distilled
    rows join."""
    n_classes = undefended.n_outputs

    def objective(forward: Forward, batch: Batch, step: int) -> torch.Tensor:
        with torch.no_grad():
            right = undefended(batch.images).argmax(1)
        wrong = (right + 1 + (step - 1) % (n_classes - 1)) % n_classes
        if (step - 1) % every:
            return functional.cross_entropy(forward(batch.images), wrong)
        told = stream[(step - 1) // every]
        logits = forward(torch.cat([batch.images, told.images]))
        confused = functional.cross_entropy(logits[: len(wrong)], wrong)
        fitted = functional.cross_entropy(logits[len(wrong) :], told.labels, weights)
        return ((weight - 1) * confused + fitted) / weight

    return objective


def evened(labels: NDArray[np.int64], n_classes: int, evening: float) -> NDArray[np.float64]:
    """Weight of each class: the less, the more rows it has, by the root. (C,)"""
    share = np.bincount(labels, minlength=n_classes) / max(1, len(labels))
    return 1 / np.sqrt(share + evening)


def with_reserve(course: Course, rows: NDArray[np.int64]) -> Corpus:
    """These rows and all of the reserve, in memory, as one corpus."""
    some, clean = course.corpus.take(rows), course.reserve
    pixels = np.concatenate([course.pixels(some), course.pixels(clean)])
    labels = np.concatenate([some.labels, clean.labels])
    paths = some.paths + clean.paths
    return Corpus(labels, clean.classes, np.arange(len(pixels)), paths, pixels)
