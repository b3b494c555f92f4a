"""Features and predictions of every row, in row order: eval mode, no augmentation."""

from __future__ import annotations

import torch

from csc_gpu.backend import Backend
from csc_gpu.backend.passes import Portion
from csc_gpu.models import Net
from csc_gpu.types import Array, Corpus

BATCH = 512
"""Images in one forward pass."""


@torch.inference_mode()
def features(model: Net, corpus: Corpus, backend: Backend) -> Array:
    """The input of the last linear layer, for every row. (N, D) float32, C order, on the device"""
    model.eval()
    out = backend.xp.zeros((len(corpus), model.n_features), dtype=backend.xp.float32)
    for batch in backend.batches(corpus, BATCH, portion=Portion(batches=backend.ranks.share)):
        points = model.features(batch.images)  # (B, D) float32, whatever training computes in
        out[backend.array(batch.rows)] = backend.array(points)
    backend.ranks.add_up(backend.tensor(out))  # a row is zero but with the rank that took it
    return out


@torch.inference_mode()
def predict(model: Net, corpus: Corpus, backend: Backend) -> Array:
    """The most likely output for every row. (N,) int64, 0..C-1, or C for the virtual class"""
    model.eval()
    out = backend.xp.zeros(len(corpus), dtype=backend.xp.int64)
    for batch in backend.batches(corpus, BATCH, portion=Portion(batches=backend.ranks.share)):
        out[backend.array(batch.rows)] = backend.array(model(batch.images).argmax(1))
    backend.ranks.add_up(backend.tensor(out))
    return out
