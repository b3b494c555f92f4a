"""The only training loop: a generator that yields after every optimiser step.

Because it yields, the caller decides when to stop or to take features; there are no callbacks.
SGD with momentum and a one-cycle learning rate: a linear warm-up, then a linear decay to zero. A
defense that trains otherwise says so by a Method: objective, rates, optimiser, order of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from csc_gpu.backend import Augment, Backend, Batch
from csc_gpu.backend.passes import Portion, batches_in
from csc_gpu.backend.ranks import Forward
from csc_gpu.checkpoint import (
    NOWHERE,
    Checkpoints,
    Record,
    damaged,
    fact,
    fingerprint,
    understood,
)
from csc_gpu.config import require
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.models import KNOWN, entry, is_known
from csc_gpu.types import Corpus


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the classifier is trained."""

    model: str = ""
    """resnet8, resnet18, timm:NAME or torchvision:NAME; empty: resnet8 with --cpu, resnet18 on a
    GPU. resnet8-group and resnet18-group have group norm instead of batch norm."""
    init: str = ""
    """Weights to start from (.safetensors): of such a net, its head if it has as many outputs. The
    nets of the check and of --recover start there, too: weights that know the trigger keep it."""
    epochs: int = 0
    """Passes over the corpus; 0: what goes with the model (resnet8 10, all others 100)."""
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
        chosen = f"one of {KNOWN}"
        require(self, "train", chosen, lambda name: not name or is_known(name), "model")
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


FEWEST = 2
"""Images of a batch that every rank needs: BatchNorm has nothing to normalise over one."""


@dataclass(frozen=True)
class Moment:
    """The state of training after one optimiser step."""

    step: int  # 1..budget.steps
    epoch: float  # passes over the corpus so far
    loss: torch.Tensor  # () of this batch, on the device; reading it waits for the device
    lr: float
    budget: Budget
    rows: int = 0  # in a pass; 0: not told
    images: int = 0  # that went forward and back so far: an image seen twice in a step counts twice


def budget(n_rows: int, settings: Settings) -> Budget:
    """Epochs and steps for so many rows."""
    steps = batches_in(n_rows, settings.batch)
    epochs = settings.epochs or entry(settings.model).epochs
    return Budget(max(epochs, math.ceil(settings.min_steps / steps)), steps)


Objective = Callable[[Forward, Batch, int], torch.Tensor]
"""(forward pass, batch, step 1..) -> the loss () to descend. What it draws it draws from its seed
and the step, so that a resumed training draws the same; it may set parts of its net to eval mode.
"""
Rate = Callable[[int, Budget], float]
"""(step 1.., budget) -> share of the peak learning rate."""
Optimiser = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Order = Callable[[np.random.Generator, NDArray[np.int64]], NDArray[np.int64]]
"""(the training's random state, its rows) -> the rows in the order of one pass."""


def cross_entropy(forward: Forward, batch: Batch, step: int) -> torch.Tensor:
    """The usual objective. ()"""
    del step
    return functional.cross_entropy(forward(batch.images), batch.labels)


def shuffled(rng: np.random.Generator, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The usual order."""
    return rng.permutation(rows)


def constant(step: int, budget: Budget) -> float:
    """A rate that stays."""
    del step, budget
    return 1.0


def falling(*epochs: int, by: float = 0.1) -> Rate:
    """A rate that is multiplied by `by` when each of these epochs has ended."""

    def rate(step: int, budget: Budget) -> float:
        return by ** sum(step > epoch * budget.steps_per_epoch for epoch in epochs)

    return rate


class Counted:
    """A forward pass that counts the images a loss goes back through; other looks cost less."""

    def __init__(self, forward: Forward, images: int) -> None:
        self._forward, self.images = forward, images

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        self.images += len(images) if torch.is_grad_enabled() else 0
        return self._forward(images)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a training differs from the ordinary one; parameters that need no gradient stay."""

    objective: Objective = cross_entropy
    rate: Rate | None = None  # None: one cycle, as the settings say
    optimiser: Optimiser | None = None  # None: SGD, as the settings say; its lr is settings.lr
    order: Order = shuffled


ORDINARY = Method()


def train(
    model: nn.Module,
    corpus: Corpus,
    settings: Settings,
    backend: Backend,
    *,
    seed: int,
    method: Method = ORDINARY,
    rows: NDArray[np.int64] | None = None,
    kept: Checkpoints = NOWHERE,
    name: str = "train",
    keep_at: Container[int] = (),
) -> Iterator[Moment]:
    """Train on these rows (all, if None) by the method; yields after every step.

    The model is in train mode whenever a step begins, whatever the caller did in between. The state
    is kept under `name`, for these rows alone, after every epoch, after the steps in keep_at and
    when `kept` says so. Training goes on from what was kept before: it begins with that moment, so
    that what was to be done there can be done again.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(len(corpus)) if rows is None else rows
    require_enough(len(rows), model, name)
    name = f"{name}-{fingerprint(rows)}"
    plan = budget(len(rows), settings)
    require_shared(plan, len(rows), backend.ranks.world)
    shift = round(settings.shift * corpus.image_size[0])
    augment = Augment(shift=shift, flip=settings.flip)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = (method.optimiser or usual_optimiser(settings, backend))(learning)
    rate = method.rate or usual_rate(settings)
    step, images, before = 0, 0, kept.load(name)
    if before is not None:
        restore(before, model, optimiser, rng)
        step, lr, loss = (
            fact(before, "step", int),
            fact(before, "lr", float),
            before.tensors["loss"],
        )
        if not 0 < step <= plan.steps or loss.ndim:
            raise damaged(f"step {step} of {plan.steps}, loss of shape {tuple(loss.shape)}")
        images = round(step * len(rows) / plan.steps_per_epoch)
        images = fact(before, "images", int) if "images" in before.facts else images
        yield Moment(step, step / plan.steps_per_epoch, loss, lr, plan, len(rows), images)
    ranks, forward = backend.ranks, Counted(backend.ranks.parallel(model), images)
    first, done = divmod(step, plan.steps_per_epoch)
    for epoch in range(first, plan.epochs):
        drawn_from = rng.bit_generator.state
        order, skip = method.order(rng, rows), done if epoch == first else 0
        ours = Portion(batches=slice(skip, None), rows=ranks.share)
        for batch in backend.batches(
            corpus, settings.batch, order=order, augment=augment, rng=rng, portion=ours
        ):
            step += 1
            lr = settings.lr * rate(step, plan)
            optimiser.param_groups[0]["lr"] = lr
            model.train()
            with backend.precision():
                loss = method.objective(forward, batch, step)
            images = max(forward.images, images + len(batch.rows))  # some have a pass of their own
            forward.images = images
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            ended = step % plan.steps_per_epoch == 0
            if ended or step in keep_at or kept.is_due():
                state = rng.bit_generator.state if ended else drawn_from
                facts = {"step": step, "lr": lr, "random": state, "images": images}
                kept.save(name, partial(record, model, optimiser, loss.detach(), facts))
            now = step / plan.steps_per_epoch
            yield Moment(step, now, loss.detach(), lr, plan, len(rows), images)


def require_enough(n_rows: int, model: nn.Module, name: str) -> None:
    """Raises CorpusError if so few rows are left that the model cannot learn from them."""
    has_norm = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    if n_rows < (FEWEST if has_norm else 1):
        raise CorpusError(f"{name}: {n_rows} rows are too few to train on; {FEWEST} are needed")


def require_shared(budget: Budget, n_rows: int, world: int) -> None:
    """Raises ConfigError if a batch would leave a rank too few images to learn from."""
    smallest = n_rows // budget.steps_per_epoch
    if world > 1 and smallest < FEWEST * world:
        raise ConfigError(
            f"batches of {smallest} images are too small for {world} ranks, each of which needs "
            f"{FEWEST}; raise train.batch, or start fewer"
        )


def usual_optimiser(settings: Settings, backend: Backend) -> Optimiser:
    """SGD with momentum, as the settings say."""

    def sgd(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            weights,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
            fused=backend.fused or None,  # None is torch's own choice
        )

    return sgd


def usual_rate(settings: Settings) -> Rate:
    """One cycle, as the settings say."""

    def rate(step: int, budget: Budget) -> float:
        warmup = min(settings.warmup, 0.2 * budget.epochs) * budget.steps_per_epoch
        return one_cycle(step, warmup, budget.steps)

    return rate


def record(
    model: nn.Module, optimiser: torch.optim.Optimizer, loss: torch.Tensor, facts: Mapping[str, Any]
) -> Record:
    """The state of a training: weights and running statistics, the optimiser's, where it is."""
    weights = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    held = {
        f"optimiser.{number}.{name}": value
        for number, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    return Record({**weights, **held, "loss": loss}, facts)


def restore(
    kept: Record, model: nn.Module, optimiser: torch.optim.Optimizer, rng: np.random.Generator
) -> None:
    """Put a training's state back. Raises CorpusError if it is that of another net."""
    weights, held = dict[str, torch.Tensor](), dict[int, dict[str, torch.Tensor]]()
    with understood():
        for key, value in kept.tensors.items():
            what, _, name = key.partition(".")
            if what == "model":
                weights[name] = value
            elif what == "optimiser":
                number, _, name = name.partition(".")
                held.setdefault(int(number), {})[name] = value
    try:
        model.load_state_dict(weights)
    except RuntimeError as fault:
        raise CorpusError(
            "the checkpoint is of another net; resume with the settings of then, or begin anew "
            "with --force"
        ) from fault
    with understood():
        optimiser.load_state_dict({**optimiser.state_dict(), "state": held})
        rng.bit_generator.state = kept.facts["random"]


def one_cycle(step: int, warmup: float, steps: int) -> float:
    """Share of the peak learning rate at a step: up to 1 over `warmup` steps, then down to 0."""
    if step <= warmup:
        return step / warmup
    return max(0.0, (steps - step + 1) / (steps - warmup + 1))
