"""Batches of resident pixels: gathered, shifted and flipped as whole tensors on their device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Augment, Batch
from csc_gpu.backend.passes import WHOLE, Portion, draw, even_parts


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), (pixel / 255 - .5) / .25; memory stays NHWC"""
    return pixels.permute(0, 3, 1, 2).float().sub_(127.5).div_(63.75)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """What to_float was given. float32 (B, 3, H, W) -> uint8 (B, H, W, 3)"""
    pixels = images.mul(63.75).add_(127.5).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def batches(
    pixels: torch.Tensor,
    labels: NDArray[np.int64],
    size: int,
    *,
    order: NDArray[np.int64] | None,
    augment: Augment | None,
    rng: np.random.Generator | None,
    portion: Portion = WHOLE,
) -> Iterator[Batch]:
    """The rows of `order` of pixels (N, H, W, 3), each exactly once, in even batches.

    Rows, labels and changes go up to the device once, before the first batch.
    """
    device = pixels.device
    order = np.arange(len(labels)) if order is None else order
    parts = even_parts(order, size)
    changes = draw(augment, rng, parts)
    all_labels = torch.from_numpy(labels).to(device)
    all_rows = torch.from_numpy(order).to(device)
    if changes is not None:
        mirrored = torch.from_numpy(changes.mirrored).to(device)
        by = torch.from_numpy(changes.by).to(device)
    for here in portion.of(parts):
        rows = all_rows[here]
        images = pixels[rows]
        if changes is not None and augment is not None:
            images = changed(images, mirrored[here], by[:, here], augment.shift)
        yield Batch(to_float(images), all_labels[rows], rows)


def changed(
    images: torch.Tensor, mirrored: torch.Tensor, by: torch.Tensor, reach: int
) -> torch.Tensor:
    """Each image mirrored or not and read `by` pixels further on; outside is black."""
    count, height, width, _ = images.shape
    device = images.device
    y = torch.arange(height, device=device).expand(count, height)
    x = torch.arange(width, device=device).expand(count, width)
    x = torch.where(mirrored[:, None], width - 1 - x, x)
    if reach:
        images = torch.nn.functional.pad(images, (0, 0, reach, reach, reach, reach))
        y, x = y + by[0, :, None] + reach, x + by[1, :, None] + reach
    batch = torch.arange(count, device=device)[:, None, None]
    return images[batch, y[:, :, None], x[:, None, :]]
