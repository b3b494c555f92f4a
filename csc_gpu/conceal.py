"""Concealment: tie the trigger to a virtual class by fine-tuning the head alone.

The suspects get the label C, the head one more output, and the head is trained by cross-entropy on
the features of the whole revised corpus (CSC, arXiv 2604.21416, stage 2). The extractor is frozen,
so its features are computed once and the loop needs neither loader nor backbone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from csc_gpu.backend import Backend
from csc_gpu.config import require
from csc_gpu.features import Spilled, features
from csc_gpu.models import Net
from csc_gpu.types import Array, Corpus, Log, Mask, quiet

HEAVIEST = 40.0
"""What a suspect weighs against another row, at most."""
IGNORED = -100
"""The label of padding: cross-entropy leaves it out, so that every batch has one shape."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the head is fine-tuned."""

    epochs: int = 10
    """Passes over the features."""
    batch: int = 256
    """Rows in one optimiser step."""
    lr: float = 0.02
    """First learning rate; it falls linearly to zero."""
    momentum: float = 0.9
    """Of SGD."""
    share: float = 0.2
    """Least share of the suspects in the loss: fewer of them weigh more (ours, not the paper's).
    Else a hundredth of poison moves the head too little, and the attack goes on."""
    replay: int = 32
    """Optimiser steps that one CUDA graph replays; 0: as many as an epoch has. Before the first
    replay as many run eagerly and as many are recorded, so a few epochs gain most from a few."""

    def __post_init__(self) -> None:
        require(
            self, "conceal", "above 0", lambda value: 0 < value < math.inf, "epochs", "batch", "lr"
        )
        shares = ("momentum", "share")
        require(self, "conceal", "in [0, 1)", lambda share: 0 <= share < 1, *shares)
        require(self, "conceal", "0 or more", lambda count: count >= 0, "replay")


def conceal(
    model: Net,
    corpus: Corpus,
    suspect: Mask,
    settings: Settings,
    backend: Backend,
    *,
    seed: int,
    log: Log = quiet,
    points: Callable[[], Array] | None = None,
) -> Net:
    """A copy of the model with a virtual class; the model as it is if nobody is suspect.

    points gives the model's features of all rows (N, D), if somebody has them already.
    """
    if not suspect.any():
        return model
    concealed = copy.deepcopy(model)
    found = points() if points else features(model, corpus, backend)
    how = settings, backend
    concealed.head = guarded(model.head, found, corpus.labels, suspect, *how, seed=seed, log=log)
    return concealed


def reheaded(model: Net, head: Mapping[str, torch.Tensor]) -> Net:
    """A copy of the model with a head that has a virtual class."""
    concealed = copy.deepcopy(model)
    concealed.head = widened(model.head)
    concealed.head.load_state_dict(head)
    return concealed


def guarded(
    head: nn.Linear,
    points: Array,
    labels: NDArray[np.int64],
    suspect: Mask,
    settings: Settings,
    backend: Backend,
    *,
    seed: int,
    log: Log = quiet,
) -> nn.Linear:
    """The head with a virtual class, fine-tuned on its inputs (N, D): suspects lead there."""
    n_classes, wide = head.out_features, widened(head)
    known = points if isinstance(points, Spilled) else backend.tensor(points)
    weight = torch.ones(n_classes + 1, device=backend.device)
    weight[-1] = virtual_weight(float(suspect.mean()), settings.share)
    revised = np.where(suspect, n_classes, labels)
    fine_tune(wide, known, revised, settings, backend, seed=seed, log=log, weight=weight)
    return wide


def virtual_weight(found: float, wanted: float) -> float:
    """What a suspect must weigh so that suspects, a share `found`, have a share `wanted` of all.

    1 where they are as many already, or where nobody else is left; no more than HEAVIEST, so that
    two false alarms do not outweigh the corpus.
    """
    return min(HEAVIEST, max(1.0, wanted * (1 - found) / (found * (1 - wanted))))


def widened(head: nn.Linear) -> nn.Linear:
    """The head with one more output: the trained rows are kept, the new one starts at zero."""
    wide: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear,
        head.in_features,
        head.out_features + 1,
        bias=head.bias is not None,
        device=head.weight.device,
    )
    with torch.no_grad():
        for new, trained in zip(wide.parameters(), head.parameters(), strict=True):
            new.zero_()
            new[:-1] = trained
    return wide


def fine_tune(
    head: nn.Linear,
    points: torch.Tensor | Spilled,
    labels: NDArray[np.int64],
    settings: Settings,
    backend: Backend,
    *,
    seed: int,
    log: Log = quiet,
    weight: torch.Tensor | None = None,
) -> None:
    """Train the head on features (N, D) and labels (N,); every step has one shape.

    weight (outputs,) is what a row of each label counts in the loss.
    """
    batch = min(settings.batch, len(labels))
    per_epoch = -(-len(labels) // batch)
    total = settings.epochs * per_epoch
    rows = _schedule(len(labels), settings.epochs, per_epoch, batch, seed).to(backend.device)
    rates = (
        torch.from_numpy(settings.lr * (1 - np.arange(total) / total)).float().to(backend.device)
    )
    targets = torch.from_numpy(labels).to(backend.device)
    rate = torch.tensor(settings.lr, device=backend.device)  # a float would freeze into a graph
    optimiser = torch.optim.SGD(
        head.parameters(), lr=rate, momentum=settings.momentum, fused=backend.fused or None
    )

    def taken(rows: torch.Tensor) -> torch.Tensor:
        if isinstance(points, Spilled):
            return backend.tensor(points[backend.array(rows)]).float()
        return points[rows].float()

    def steps(rows: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        """An optimiser step for each line of rows (T, B), at each of the rates (T,); losses (T,)"""
        losses = []
        for chosen, now in zip(rows.long(), rates, strict=True):
            rate.copy_(now)
            inside = chosen.clamp(min=0)
            wanted = targets[inside].masked_fill(chosen < 0, IGNORED)
            loss = functional.cross_entropy(
                head(taken(inside)), wanted, weight=weight, ignore_index=IGNORED
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    together = min(settings.replay or per_epoch, total)
    # a CUDA graph reads no file
    captured = steps if isinstance(points, Spilled) else backend.captured(steps)
    losses = torch.empty(total, device=backend.device)
    for start in range(0, total, together):
        stop = min(start + together, total)
        run = captured if stop - start == together else steps  # a graph has one shape
        losses[start:stop] = run(rows[start:stop], rates[start:stop])
        for epoch in range(start // per_epoch, stop // per_epoch):
            mean = losses[epoch * per_epoch : (epoch + 1) * per_epoch].mean()
            log("conceal", epoch=epoch + 1, epochs=settings.epochs, loss=float(mean))


def _schedule(n: int, epochs: int, per_epoch: int, batch: int, seed: int) -> torch.Tensor:
    """The rows of every optimiser step, each once an epoch; -1 is padding. (steps, batch) int32"""
    rng = np.random.default_rng(seed)
    order = np.full((epochs, per_epoch * batch), -1, np.int32)
    for epoch in order:
        epoch[:n] = rng.permutation(n)
    return torch.from_numpy(order.reshape(epochs * per_epoch, batch))
