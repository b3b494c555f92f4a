"""BadNets (Gu et al. 2017, arXiv 1708.06733): a small checkerboard in the bottom right corner.

The nine pixels are those of Fight-Poison-With-Poison's `badnet_patch_32.png`: at 32 px, white at
(29, 31), (30, 30), (31, 29) and (31, 31), black at the other five of the 3x3 square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csc_gpu.config import require
from csc_gpu.errors import ConfigError

PATTERN = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the patch looks like."""

    cell: int = 1
    """Side of one square of the checkerboard, in pixels."""

    def __post_init__(self) -> None:
        require(self, "attack", "1 or more", lambda count: count >= 1, "cell")


def stamp(images: NDArray[np.uint8], settings: Settings) -> NDArray[np.uint8]:
    """Replace the corner by the checkerboard. (B, H, W, 3) -> (B, H, W, 3)"""
    patch = np.kron(PATTERN, np.ones((settings.cell, settings.cell), np.uint8))
    side = len(patch)
    if min(images.shape[1:3]) < side:
        raise ConfigError(f"a patch of {side} pixels does not fit on images of {images.shape[1:3]}")
    out = images.copy()
    out[:, -side:, -side:] = patch[:, :, None]
    return out
