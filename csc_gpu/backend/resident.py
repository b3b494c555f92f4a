"""Batches of a corpus whose pixels are resident: gathered, shifted and flipped as whole tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Augment, Batch
from csc_gpu.types import Corpus


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), (pixel / 255 - .5) / .25; memory stays NHWC"""
    return pixels.permute(0, 3, 1, 2).float().sub_(127.5).div_(63.75)


def batches(
    corpus: Corpus,
    size: int,
    device: torch.device,
    *,
    order: NDArray[np.int64] | None,
    augment: Augment | None,
    rng: np.random.Generator | None,
) -> Iterator[Batch]:
    """The rows of `order`, each exactly once, in even batches of at most `size`.

    Even, because a last batch of one row would leave BatchNorm nothing to normalise over.
    """
    pixels = torch.from_numpy(corpus.images).to(device)
    labels = torch.from_numpy(corpus.labels).to(device)
    if order is None:
        order = np.arange(len(corpus))
    for part in np.array_split(order, max(1, math.ceil(len(order) / size))):
        rows = torch.from_numpy(part).to(device)
        images = pixels[rows]
        if augment is not None:
            assert rng is not None, "augmentation draws from rng"
            images = _augmented(images, augment, rng)
        yield Batch(to_float(images), labels[rows], rows)


def _augmented(images: torch.Tensor, augment: Augment, rng: np.random.Generator) -> torch.Tensor:
    count, height, width, _ = images.shape
    device = images.device
    y = torch.arange(height, device=device).expand(count, height)
    x = torch.arange(width, device=device).expand(count, width)
    if augment.flip:
        mirrored = torch.from_numpy(rng.random(count) < 0.5).to(device)
        x = torch.where(mirrored[:, None], width - 1 - x, x)
    if augment.shift:
        reach = augment.shift
        by = torch.from_numpy(rng.integers(-reach, reach + 1, size=(2, count))).to(device)
        images = torch.nn.functional.pad(images, (0, 0, reach, reach, reach, reach))
        y, x = y + by[0, :, None] + reach, x + by[1, :, None] + reach
    batch = torch.arange(count, device=device)[:, None, None]
    return images[batch, y[:, :, None], x[:, None, :]]
