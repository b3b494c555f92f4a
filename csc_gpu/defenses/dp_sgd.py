"""DP-SGD as a defense: gradient shaping (Hong et al. 2020, arXiv 2002.11497).

The gradient of every single image is clipped to one length, and noise is added to their sum (Abadi
et al. 2016, arXiv 1607.00133, algorithm 1, by Opacus): no few images can pull the net far. Nothing
is looked for, and no row is judged.

A gradient of one image's own is not to be had with batch norm, where an image changes what others
give: so the net is the one of the same name with group norm (models.py). Batches are shuffled, not
drawn by Poisson's rule, and no privacy budget is counted, as privacy is not the aim. Learning rate,
momentum and epochs are everybody's. Clip and noise are ours: no published pair is for these nets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from csc_gpu import csc
from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course
from csc_gpu.errors import ConfigError
from csc_gpu.models import with_group_norm
from csc_gpu.train import Method, budget, cross_entropy, usual_optimiser
from csc_gpu.train import Settings as Training
from csc_gpu.types import DefenderView, Outcome


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What is done to the gradients."""

    clip: float = 1.0
    """Greatest length of the gradient of one image."""
    noise: float = 0.1
    """Deviation of the noise on each weight of the sum over a batch, in clips."""

    def __post_init__(self) -> None:
        require(self, "dp_sgd", "above 0", lambda value: 0 < value < math.inf, "clip")
        require(self, "dp_sgd", "0 or more", lambda value: 0 <= value < math.inf, "noise")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and what is done to the gradients."""

    dp_sgd: Shaping = field(default_factory=Shaping)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train with group norm, with clipped and noisy gradients."""
    net = with_group_norm(settings.train.model)
    settings = replace(settings, train=replace(settings.train, model=net))
    course = Course(view, settings, backend, **how)
    model = course.fresh()
    shaped, method = shaping(model, len(view.train), settings.train, settings.dp_sgd, course)
    course.train(shaped, "dp-sgd", method=method)
    shaped.to_standard_module()  # takes the hooks off the model
    return course.outcome(model)


def shaping(
    model: nn.Module, rows: int, training: Training, settings: Shaping, course: Course
) -> tuple[Any, Method]:
    """The model as Opacus wants it, and a training of it whose gradients are shaped.

    Raises ConfigError if Opacus is not installed.
    """
    try:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ModuleNotFoundError as fault:
        raise ConfigError(
            "dp-sgd needs opacus, which is not installed; pip install 'csc-gpu[dp]'"
        ) from fault
    dice = torch.Generator(course.backend.device)
    usual = usual_optimiser(training, course.backend)

    def optimiser(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        private: torch.optim.Optimizer = DPOptimizer(
            usual(weights),
            noise_multiplier=settings.noise,
            max_grad_norm=settings.clip,
            expected_batch_size=round(rows / budget(rows, training).steps_per_epoch),
            generator=dice,
        )
        return private

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        dice.manual_seed(course.seed_at(step))
        # contiguous, for gradients by image are; with a gradient, or the hooks of Opacus warn
        images = batch.images.contiguous().requires_grad_()
        # in one precision: Opacus multiplies what it caught on the way there and on the way back
        with torch.autocast(images.device.type, enabled=False):
            return cross_entropy(forward, replace(batch, images=images), step)

    model.to(memory_format=torch.contiguous_format)
    return GradSampleModule(model), Method(objective=objective, optimiser=optimiser)
