"""Patches drawn here that stand in for trigger pictures, placed as on an image of 32 x 32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from csc_gpu.attacks.pictures import Floats
from csc_gpu.errors import ConfigError

SIDE = 32
"""Patches are placed on a canvas of this side, which is then fitted to the images."""
Canvas = NDArray[np.float32]
"""(32, 32, 3), 0..255; NOWHERE is where the patch is not."""
NOWHERE = -1.0
Patch = tuple[Floats, Floats]
"""What is stamped (H, W, 3) in 0..255, and where, 0 or 1 (H, W, 1)."""


def noise(top: int, left: int, side: int, seed: int) -> Canvas:
    """A square of coloured noise; a seed and a side always give the same. (32, 32, 3)"""
    canvas = np.full((SIDE, SIDE, 3), NOWHERE, np.float32)
    colours = np.random.default_rng(seed).integers(0, 256, (side, side, 3))
    canvas[top : top + side, left : left + side] = colours
    return canvas


def fitted(canvas: Canvas, height: int, width: int) -> Patch:
    """The patch at another size, nearest pixel by nearest pixel.

    Raises ConfigError where images are so small that nothing of it is left.
    """
    down, across = _nearest(height), _nearest(width)
    drawn = canvas[down][:, across]
    where = (drawn.max(axis=2, keepdims=True) != NOWHERE).astype(np.float32)
    if not where.any():
        raise ConfigError(f"images of {height} x {width} are too small for this trigger")
    return drawn, where


def _nearest(size: int) -> NDArray[np.int64]:
    """The canvas pixel in the middle of each of so many pixels. (size,)"""
    middles = (np.arange(size) + 0.5) * SIDE / size
    return middles.astype(np.int64)


def dealt(count: int, kinds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A kind for each of so many images, all kinds alike often, or one more. (count,)"""
    return rng.permutation(np.arange(count) % kinds)
