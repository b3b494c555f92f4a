"""What every rival works with, so that chances are equal: one net, one loop, one clock.

A rival trains, looks and judges by these verbs; what is its own is said by a train.Method, by the
rows it leaves out, and by its judgement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from csc_gpu import csc
from csc_gpu import features as extraction
from csc_gpu import train as training
from csc_gpu.backend import Backend
from csc_gpu.backend.resident import to_pixels
from csc_gpu.checkpoint import NOWHERE, Checkpoints
from csc_gpu.errors import ConfigError, TrainingDiverged
from csc_gpu.models import Net
from csc_gpu.types import Array, Corpus, DefenderView, Log, Mask, Outcome, Segregation, quiet

PLAIN = "train"
"""The stage, and the record, of ordinary training on all rows: what a defense of a trained net
starts from. Of one corpus, settings and seed it is the same for all, so it may be shared."""
CERTAIN = 0.5
"""Suspects score this and above, other rows less."""


class Course:
    """One run of one defense: the view, the settings, the machine, the seed, and the clock."""

    def __init__(
        self,
        view: DefenderView,
        settings: csc.Common,
        backend: Backend,
        *,
        seed: int,
        log: Log = quiet,
        kept: Checkpoints = NOWHERE,
    ) -> None:
        self.corpus, self.settings, self.backend, self.seed = view.train, settings, backend, seed
        self.log, self.kept = log, kept
        self.clock = csc.Stopwatch(backend)
        self._trusted = view.trusted

    @property
    def reserve(self) -> Corpus:
        """The clean rows, labelled as the corpus is. Raises ConfigError if none were given."""
        if self._trusted is None:
            raise ConfigError("this defense needs clean images: give some with --reserve CORPUS")
        return self._trusted

    def fresh(self, again: int = 0) -> Net:
        """An untrained net; `again` tells those of one run apart."""
        return csc.fresh_model(self.corpus, self.settings, self.backend, seed=self.seed + again)

    def seed_at(self, step: int) -> int:
        """What a training draws from at one of its steps, the same when it is resumed."""
        return int(np.random.SeedSequence((self.seed, step)).generate_state(1)[0])

    def trained(
        self,
        name: str = PLAIN,
        *,
        model: Net | None = None,
        corpus: Corpus | None = None,
        rows: NDArray[np.int64] | None = None,
        method: training.Method = training.ORDINARY,
        again: int = 0,
        **changes: Any,
    ) -> Net:
        """Train a net (a fresh one, if None) on these rows (all, if None) of the corpus (or other).

        Without arguments: ordinary training, as every defense of a trained net begins. `name` is
        the stage and the record, one for each training of a run; `again` moves the seed; `changes`
        are to settings.train (epochs=10, lr=.01, ...). The model given is changed in place.
        """
        model = model or self.fresh(again)
        self.train(model, name, corpus=corpus, rows=rows, method=method, again=again, **changes)
        return model

    def train(
        self,
        model: torch.nn.Module,
        name: str,
        *,
        corpus: Corpus | None = None,
        rows: NDArray[np.int64] | None = None,
        method: training.Method = training.ORDINARY,
        again: int = 0,
        **changes: Any,
    ) -> None:
        """As `trained`, of any module, in place."""
        how = replace(self.settings.train, **changes)
        with self.clock(name):
            for at in training.train(
                model,
                self.corpus if corpus is None else corpus,
                how,
                self.backend,
                seed=self.seed + again,
                method=method,
                rows=rows,
                kept=self.kept,
                name=name,
            ):
                self.log("step", stage=name, at=at)

    def retrained(self, without: Mask, name: str = "retrain", again: int = 2) -> Net:
        """A net trained from scratch, as long as the first, on the rows that are left. (N,)"""
        return self.trained(name, rows=np.flatnonzero(~without), again=again)

    def features(self, model: Net, corpus: Corpus | None = None) -> Array:
        """The input of the last layer, eval mode. (N, D) float32 on the device

        Raises TrainingDiverged if they are not finite.
        """
        with self.clock("features"):
            points = extraction.features(model, corpus or self.corpus, self.backend, log=self.log)
        if not extraction.are_finite(points, self.backend.xp):
            raise TrainingDiverged("training diverged: features are not finite; lower train.lr")
        return points

    def predicted(self, model: Net, corpus: Corpus | None = None) -> NDArray[np.int64]:
        """The most likely class of every row. (N,)"""
        with self.clock("features"):
            told = extraction.predict(model, corpus or self.corpus, self.backend, self.log)
        return self.backend.to_numpy(told).astype(np.int64)

    def pixels(self, corpus: Corpus) -> NDArray[np.uint8]:
        """The pixels of a small corpus, wherever they lie, on the host. (N, H, W, 3)"""
        parts = self.backend.batches(corpus, extraction.BATCH)
        return np.concatenate([to_pixels(part.images).cpu().numpy() for part in parts])

    @torch.inference_mode()
    def judged(self, model: Net, points: Array) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Predictions, and losses by given label, from features (N, D) of the corpus. (N,) each"""
        logits = model.head(self.backend.tensor(points))
        labels = torch.from_numpy(self.corpus.labels).to(logits.device)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        down = self.backend.to_numpy
        told, lost = down(self.backend.array(logits.argmax(1))), down(self.backend.array(losses))
        return told.astype(np.int64), lost.astype(np.float32)

    def by_features(self, judge: Callable[[Array], Segregation]) -> Outcome:
        """Train, judge the features (N, D), train again on the rows that are left."""
        model = self.trained()
        points = self.features(model)
        with self.clock("judge"):
            found = judge(points)
        return self.filtered(model, found)

    def filtered(self, model: Net, found: Segregation) -> Outcome:
        """A net trained anew without the suspects; the model itself, if there are none."""
        net = self.retrained(found.suspect) if found.suspect.any() else model
        return self.outcome(net, model, found)

    def outcome(
        self, model: Net, undefended: Net | None = None, verdict: Segregation | None = None
    ) -> Outcome:
        """What the run ends with; no undefended net, if the defense trains none.

        Raises TrainingDiverged if a weight is not finite: such a net names one class whatever it
        sees, and that would be scored as a backdoor, or as the cure of one.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in model.state_dict().values()):
            raise TrainingDiverged("training diverged: weights are not finite; lower a rate (lr)")
        clock, classes = self.clock, self.corpus.n_classes
        cpu = clock.cpu_seconds
        return Outcome(model, undefended, classes, verdict, {}, clock.seconds, cpu_seconds=cpu)


def verdict(
    suspect: Mask,
    belief: NDArray[np.floating[Any]],
    reason: str,
    notes: Mapping[str, Any] | None = None,
    **table: NDArray[Any],
) -> Segregation:
    """Suspects (N,), and scores from any belief (N,) that is higher for the more suspect.

    The belief is put on 0..1 by rank, ties alike, suspects to .5 and above: scores order rows, they
    are no probabilities. `table` may hold columns of suspects.csv (run.COLUMNS), such as cluster.
    """
    distinct, place = np.unique(belief, return_inverse=True)
    rank = place.reshape(len(suspect)) / max(1, len(distinct) - 1)
    score = np.where(suspect, CERTAIN + (1 - CERTAIN) * rank, 0.98 * CERTAIN * rank)
    columns = {**table, "reason": np.where(suspect, reason, "")}
    return Segregation(
        suspect, score.astype(np.float32), columns, {"rule": reason, **(notes or {})}
    )
