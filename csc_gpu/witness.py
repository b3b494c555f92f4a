"""What a finished training can be asked about a suspicion: model, features, images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch

from csc_gpu import segregate, train, trigger
from csc_gpu.backend import Backend
from csc_gpu.checkpoint import NOWHERE, Checkpoints, Record
from csc_gpu.errors import TrainingDiverged
from csc_gpu.features import Settings, are_finite, features, predict
from csc_gpu.models import Net
from csc_gpu.types import Array, Corpus, Log, Mask, Reclassified, Segregation, Transfer, quiet

ORDER = "candidates"
"""In what rank 0 tells the others: train without these rows."""
Clock = Callable[[str], AbstractContextManager[None]]


class Trained:
    """The witness of a run (types.Witness); features are computed once, when first asked for."""

    def __init__(
        self,
        model: Net,
        corpus: Corpus,
        new_model: Callable[[int], Net],
        training: train.Settings,
        segregation: segregate.Settings,
        backend: Backend,
        clock: Clock,
        *,
        seed: int,
        extraction: Settings | None = None,
        log: Log = quiet,
        kept: Checkpoints = NOWHERE,
    ) -> None:
        self._model, self._corpus, self._new_model = model, corpus, new_model
        self._training, self._extraction, self._segregation = training, extraction, segregation
        self._backend, self._clock, self._seed, self._log = backend, clock, seed, log
        self._kept = kept
        self._points: Array | None = None

    def points(self) -> Array:
        """Features of all rows under the trained model. (N, D) on the device"""
        if self._points is None:
            with self._clock("features"):
                how = self._backend, self._extraction, self._log
                self._points = features(self._model, self._corpus, *how)
            if not are_finite(self._points, self._backend.xp):
                raise TrainingDiverged("training diverged: features are not finite; lower train.lr")
        return self._points

    def transfers(self, group: Mask, rest: Mask, label: int) -> Transfer:
        """How many of the other labels' images get `label` once group's pattern is added."""
        with self._clock("verify"):
            return trigger.transfers(self._model, self._corpus, group, rest, label, self._backend)

    def reclassify(self, candidates: Mask) -> Reclassified:
        """Train a fresh model without candidates and controls, and predict all rows.

        As long as the first, or segregate.check_epochs if that is shorter, and train.min_steps.
        """
        self._backend.ranks.from_first(lambda: Record({ORDER: torch.from_numpy(candidates)}, {}))
        return self._trained_without(candidates)

    def hearing(self, judge: Callable[[], Segregation]) -> Segregation:
        """The verdict of rank 0. The others train with it when it asks for that, and are told.

        They do not judge themselves: a rounding would part them for good.
        """
        ranks = self._backend.ranks
        if ranks.world == 1:
            return judge()
        self.points()
        if ranks.is_first:
            verdict = judge()
            return segregate.to_verdict(ranks.from_first(lambda: segregate.of_verdict(verdict)))
        while True:
            told = ranks.from_first(lambda: Record({}, {}))
            if ORDER not in told.tensors:
                return segregate.to_verdict(told)
            self._trained_without(told.tensors[ORDER].numpy())

    def _trained_without(self, candidates: Mask) -> Reclassified:
        corpus, backend, seed = self._corpus, self._backend, self._seed
        epochs = train.budget(len(corpus), self._training).epochs
        short = replace(self._training, epochs=min(epochs, self._segregation.check_epochs))
        rng = np.random.default_rng(seed)
        controls = ~candidates & (rng.random(len(corpus)) < self._segregation.controls)
        rows = np.flatnonzero(~(candidates | controls))
        with self._clock("verify"):
            model = self._new_model(seed + 1)
            for at in train.train(
                model,
                corpus,
                short,
                backend,
                seed=seed + 1,
                rows=rows,
                kept=self._kept,
                name="verify",
            ):
                self._log("step", stage="verify", at=at)
            few = corpus.n_classes < 2**15
            outputs = predict(model, corpus, backend, self._log).astype(
                np.int16 if few else np.int32
            )
            predicted = backend.to_numpy(outputs)
        return Reclassified(candidates, controls, predicted.astype(np.int64))
