"""Ordinary training, no defense: the control of every comparison."""

from __future__ import annotations

from csc_gpu import csc
from csc_gpu.backend import Backend
from csc_gpu.checkpoint import NOWHERE, Checkpoints
from csc_gpu.train import train
from csc_gpu.types import DefenderView, Log, Outcome, quiet


def defend(
    view: DefenderView,
    settings: csc.Settings,
    backend: Backend,
    *,
    seed: int,
    log: Log = quiet,
    kept: Checkpoints = NOWHERE,
) -> Outcome:
    """Train as CSC does, and look at nothing."""
    clock = csc.Stopwatch(backend)
    model = csc.fresh_model(view.train, settings, backend, seed=seed)
    with clock("train"):
        for at in train(model, view.train, settings.train, backend, seed=seed, kept=kept):
            log("step", stage="train", at=at)
    return Outcome(model, model, view.train.n_classes, None, {}, clock.seconds)
