"""Batches beside those that the training loop brings, for an objective that needs two sets of rows.

The k-th batch is the same whoever asks for it and whenever, so that a resumed training sees what it
would have seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Augment, Backend, Batch
from csc_gpu.backend.passes import Portion, batches_in
from csc_gpu.types import Corpus


class Stream:
    """Some rows of a corpus (all, if None), pass after shuffled pass, without an end."""

    def __init__(
        self,
        corpus: Corpus,
        size: int,
        backend: Backend,
        *,
        seed: tuple[int, ...],
        rows: NDArray[np.int64] | None = None,
        augment: Augment | None = None,
    ) -> None:
        self._corpus, self._size, self._backend = corpus, size, backend
        self._rows = np.arange(len(corpus)) if rows is None else rows
        self._seed, self._augment = seed, augment
        self._next, self._batches = 0, self._beginning_at(0)

    def __getitem__(self, number: int) -> Batch:
        """The batch of this number, 0..; it belongs to the stream until the next one."""
        if number != self._next:
            self._batches = self._beginning_at(number)
        self._next = number + 1
        return next(self._batches)

    def _beginning_at(self, number: int) -> Iterator[Batch]:
        first, skip = divmod(number, batches_in(len(self._rows), self._size))
        for turn in itertools.count(first):
            rng = np.random.default_rng((*self._seed, turn))
            yield from self._backend.batches(
                self._corpus,
                self._size,
                order=rng.permutation(self._rows),
                augment=self._augment,
                rng=rng,
                portion=Portion(batches=slice(skip, None), rows=self._backend.ranks.share),
            )
            skip = 0
