"""The verb `batches`, which both machines have alike but for where resident pixels lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Augment, Batch, Decoder, loader, resident
from csc_gpu.backend.passes import WHOLE, Portion
from csc_gpu.backend.ranks import ALONE, Ranks
from csc_gpu.types import Array, Corpus


class Batches(ABC):
    """What a backend inherits; it says where it decodes and places pixels."""

    decoder: Decoder
    ranks: Ranks = ALONE

    @abstractmethod
    def _placed(self, pixels: Array) -> torch.Tensor:
        """The pixels (N, H, W, 3) where batches are made of them."""

    def batches(
        self,
        corpus: Corpus,
        size: int,
        *,
        order: NDArray[np.int64] | None = None,
        augment: Augment | None = None,
        rng: np.random.Generator | None = None,
        portion: Portion | None = None,
    ) -> Iterator[Batch]:
        """See Backend.batches."""
        how: dict[str, Any] = {
            "order": order,
            "augment": augment,
            "rng": rng,
            "portion": portion or WHOLE,
        }
        if corpus.pixels is None:
            return loader.stream(corpus, size, self.decoder, **how)
        return resident.batches(self._placed(corpus.pixels), corpus.labels, size, **how)
