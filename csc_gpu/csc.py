"""Cluster Segregation Concealment, the whole defense: start reading here.

Shi, Guo, Chen, Zhu, Liu, Zhou: arXiv 2604.21416. Train as usual. In the first epochs poisoned rows
form clusters of their own in feature space: look at the features of early snapshots, and name the
suspects. Then give the suspects a virtual class and fine-tune the head, so that the trigger leads
there and not to the attacker's class.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import backend as backends
from csc_gpu import checkpoint, conceal, data, recover, segregate, train
from csc_gpu.backend import Backend
from csc_gpu.borrowed import start_from
from csc_gpu.checkpoint import NOWHERE, Checkpoints, Record, understood
from csc_gpu.config import require
from csc_gpu.errors import ConfigError, TrainingDiverged
from csc_gpu.features import Settings as FeatureSettings
from csc_gpu.features import are_finite, features, fitted
from csc_gpu.models import Net, new_model
from csc_gpu.types import (
    Array,
    Corpus,
    DefenderView,
    Log,
    Mask,
    Outcome,
    Segregation,
    Sighting,
    quiet,
)
from csc_gpu.witness import Trained


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Which snapshots are looked at."""

    epochs: float = 10.0
    """Watch the first so many passes over the corpus."""
    every: float = 1.0
    """Passes between two snapshots; less than 1 for data that are learnt within an epoch."""
    keep: bool = False
    """Keep the features of all snapshots, for features.npz (the option --save-features)."""

    def __post_init__(self) -> None:
        require(self, "watch", "above 0", lambda value: 0 < value < math.inf, "epochs", "every")

    def steps(self, budget: train.Budget) -> set[int]:
        """The optimiser steps after which a snapshot is taken; ConfigError if there is none."""
        count = int(min(self.epochs, budget.epochs) / self.every + 1e-9)
        if not count:
            raise ConfigError(
                f"no snapshot falls into the first {self.epochs} epochs at one every "
                f"{self.every}; lower watch.every or raise watch.epochs"
            )
        at = (max(1, round((i + 1) * self.every * budget.steps_per_epoch)) for i in range(count))
        return {min(step, budget.steps) for step in at}


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every defense lets be set: the corpus, the training, the machine."""

    data: data.Settings = field(default_factory=data.Settings)
    train: train.Settings = field(default_factory=train.Settings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    gpu: backends.Settings = field(default_factory=backends.Settings)
    checkpoint: checkpoint.Settings = field(default_factory=checkpoint.Settings)


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    """Every setting of a run, stage by stage."""

    watch: Watch = field(default_factory=Watch)
    segregate: segregate.Settings = field(default_factory=segregate.Settings)
    conceal: conceal.Settings = field(default_factory=conceal.Settings)
    recover: recover.Settings = field(default_factory=recover.Settings)


def defend(
    view: DefenderView,
    settings: Settings,
    backend: Backend,
    *,
    seed: int,
    log: Log = quiet,
    kept: Checkpoints = NOWHERE,
) -> Outcome:
    """Train on a possibly poisoned corpus; a model that ignores the trigger, and the suspects.

    What `kept` holds of an earlier start with the same arguments is not done again.
    """
    clock = Stopwatch(backend)
    learnt = learn(view.train, settings, backend, clock, seed=seed, log=log, kept=kept)
    corpus = view.train.sound()
    return conclude(learnt, corpus, settings, backend, clock, seed=seed, log=log, kept=kept)


@dataclass(frozen=True)
class Learnt:
    """What ordinary training leaves: the model, and what was seen on the way."""

    model: Net
    sightings: tuple[Sighting, ...]
    kept: tuple[tuple[float, NDArray[Any]], ...] = ()  # epoch and features (N, D), if to be kept


def learn(
    corpus: Corpus,
    settings: Settings,
    backend: Backend,
    clock: Stopwatch,
    *,
    seed: int,
    log: Log = quiet,
    kept: Checkpoints = NOWHERE,
) -> Learnt:
    """Stage 1, training: look at the features after each watched epoch, and cluster them."""
    model = fresh_model(corpus, settings, backend, seed=seed)
    plan = train.budget(len(corpus), settings.train)
    watched = settings.watch.steps(plan)
    scales = segregate.looked_at(sorted(watched), settings.segregate)
    recall_broken(corpus, kept)
    seen: dict[int, Sighting] = {}
    stored: dict[int, NDArray[Any]] = {}  # features on the host: not needed on the device again
    for step in sorted(watched):
        known = kept.load(f"snapshot-{step}")
        if known is not None:
            with understood():
                seen[step] = segregate.to_sighting(known, backend)
                stored |= {step: known.tensors["features"].numpy()} if settings.watch.keep else {}
    with clock("train"):
        for at in train.train(
            model, corpus, settings.train, backend, seed=seed, kept=kept, keep_at=watched
        ):
            log("step", stage="train", at=at)
            if at.step not in watched or at.step in seen:
                continue
            with clock("features"):
                sound, points = looked_at(model, corpus, settings, backend, kept, log)  # (N, D)
                check_finite(points, at, settings, backend)
            with clock("cluster"):
                observe = partial(segregate.observe, scales=scales[at.step])
                how = points, sound.labels, at.epoch, settings.segregate, backend
                seen[at.step] = segregate.shared(partial(observe, *how), backend)
            is_input = not settings.features.layer  # of the head, which can then be asked
            accuracy = fitted(model, points, sound.labels, backend) if is_input else None
            log("snapshot", sighting=seen[at.step], accuracy=accuracy)
            stored |= {at.step: backend.to_numpy(points[:])} if settings.watch.keep else {}
            del points  # or it would live beside the next
            told = partial(segregate.of_sighting, seen[at.step], stored.get(at.step), backend)
            kept.save(f"snapshot-{at.step}", told)
    sightings = tuple(seen[step] for step in sorted(seen))
    features_of = [(seen[step].epoch, points) for step, points in sorted(stored.items())]
    return Learnt(model, sightings, tuple(features_of))


def looked_at(
    model: Net, corpus: Corpus, settings: Settings, backend: Backend, kept: Checkpoints, log: Log
) -> tuple[Corpus, Array]:
    """The rows that decode, and their features (N, D); with the first of them that is settled."""
    while True:
        sound = corpus.sound()
        points = features(model, sound, backend, settings.features, log)
        if sound.is_sound.all():
            break
    tolerance = corpus.tolerance
    if tolerance is not None and not tolerance.settled:
        tolerance.settle(tolerance.broken)
        broken = [(row, *told) for row, told in tolerance.broken.items()]
        kept.save("broken", partial(Record, {}, {"broken": broken}))
    return sound, points


def recall_broken(corpus: Corpus, kept: Checkpoints) -> None:
    """Settle who is broken, if an earlier start of the run has read all images."""
    before = kept.load("broken")
    if before is not None and corpus.tolerance is not None:
        with understood():
            told = {int(row): (path, reason) for row, path, reason in before.facts["broken"]}
        corpus.tolerance.settle(told)


def conclude(
    learnt: Learnt,
    corpus: Corpus,
    settings: Settings,
    backend: Backend,
    clock: Stopwatch,
    *,
    seed: int,
    log: Log = quiet,
    kept: Checkpoints = NOWHERE,
) -> Outcome:
    """Segregate the suspects, conceal the trigger and, if asked for, recover the true classes."""

    def untrained(seed: int) -> Net:
        return fresh_model(corpus, settings, backend, seed=seed)

    model = learnt.model
    how = settings.train, settings.segregate, backend, clock
    witness = Trained(
        model,
        corpus,
        untrained,
        *how,
        seed=seed,
        extraction=replace(settings.features, layer=""),  # what the head sees
        log=log,
        kept=kept,
    )
    verdict = judged(learnt, corpus, settings, backend, witness, clock, kept)
    suspect = verdict.suspect
    log("verdict", suspects=int(suspect.sum()), rows=len(corpus), **verdict.notes)
    with clock("conceal"):
        concealed = with_virtual_class(
            model, corpus, suspect, settings, backend, witness, kept, seed=seed, log=log
        )
    recovered = None
    if settings.recover.on and suspect.any():
        with clock("recover"):
            recovered = recover.recover(
                corpus,
                recover.left_out(verdict, corpus.labels, settings.recover),
                untrained,
                settings.train,
                backend,
                seed=seed,
                log=log,
                kept=kept,
            )
    return Outcome(
        concealed,
        model,
        corpus.n_classes,
        verdict,
        snapshots(learnt, verdict, witness, backend),
        clock.seconds,
        recovered,
        segregate.drawing(learnt.sightings, suspect, settings.segregate, backend),
        corpus.paths,
        clock.cpu_seconds,
    )


def judged(
    learnt: Learnt,
    corpus: Corpus,
    settings: Settings,
    backend: Backend,
    witness: Trained,
    clock: Stopwatch,
    kept: Checkpoints,
) -> Segregation:
    """The verdict on what was seen, once all witnesses are heard; one that was kept stands."""
    known = kept.load("verdict")
    if known is not None:
        with understood():
            return segregate.to_verdict(known)
    with clock("segregate"):
        what = learnt.sightings, corpus.labels, settings.segregate, backend, witness
        verdict = witness.hearing(lambda: segregate.segregate(*what))
    kept.save("verdict", lambda: segregate.of_verdict(verdict))
    return verdict


def with_virtual_class(
    model: Net,
    corpus: Corpus,
    suspect: Mask,
    settings: Settings,
    backend: Backend,
    witness: Trained,
    kept: Checkpoints,
    *,
    seed: int,
    log: Log,
) -> Net:
    """The model with the trigger concealed; a head that was kept stands."""
    known = kept.load("concealed")
    if known is not None:
        with understood():
            return conceal.reheaded(model, known.tensors)
    how = settings.conceal, backend
    concealed = conceal.conceal(
        model, corpus, suspect, *how, seed=seed, log=log, points=witness.points
    )
    if concealed is not model:
        kept.save("concealed", lambda: Record(dict(concealed.head.state_dict()), {}))
    return concealed


def snapshots(
    learnt: Learnt, verdict: Segregation, witness: Trained, backend: Backend
) -> dict[str, NDArray[Any]]:
    """features (S, N, D) and epoch (S,), if they were kept; final (N, D) if a witness was heard."""
    if not learnt.kept:
        return {}
    epoch, points = zip(*learnt.kept, strict=True)
    found = {"features": np.stack(points), "epoch": np.array(epoch)}
    if verdict.transfers or verdict.checks:
        found["final"] = backend.to_numpy(witness.points()[:])
    return found


def check_finite(points: Array, at: train.Moment, settings: Settings, backend: Backend) -> None:
    """Raises TrainingDiverged if a feature is NaN or infinite."""
    if not are_finite(points, backend.xp):
        raise TrainingDiverged(
            f"training diverged by epoch {at.epoch:.2f}: features are not finite; "
            f"lower train.lr, now {settings.train.lr}"
        )


def fresh_model(corpus: Corpus, settings: Common, backend: Backend, *, seed: int) -> Net:
    """A net with one output a class, untrained or as train.init has it, on the device."""
    height, _ = corpus.image_size
    model = new_model(settings.train.model, corpus.n_classes, height, seed=seed)
    if settings.train.init:
        start_from(model, Path(settings.train.init))
    return model.to(backend.device)


class Stopwatch:
    """Wall and processor seconds of each stage; a stage in another counts for itself only."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}  # of no stage where the backend knows none
        self._open: list[str] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, used = time.perf_counter(), self._backend.cpu_seconds()
        self._open.append(stage)
        try:
            with self._backend.stage(stage):
                yield
        finally:
            took, now = time.perf_counter() - start, self._backend.cpu_seconds()
            self._open.pop()
            self._book(self.seconds, stage, took)
            if used is not None and now is not None:
                self._book(self.cpu_seconds, stage, now - used)

    def _book(self, seconds: dict[str, float], stage: str, took: float) -> None:
        seconds[stage] = seconds.get(stage, 0.0) + took
        if self._open:
            outer = self._open[-1]
            seconds[outer] = seconds.get(outer, 0.0) - took
