"""SIG (Barni et al. 2019, arXiv 1902.11237): a horizontal sine wave on images of the target class.

x' = clip(x + delta sin(2 pi j f / W)), j the column; the labels stay true.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csc_gpu.config import require


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The wave."""

    delta: float = 40.0
    """Amplitude, in grey levels of 0..255."""
    frequency: float = 6.0
    """Periods across the image."""

    def __post_init__(self) -> None:
        require(self, "attack", "above 0", lambda value: value > 0, "delta")


def stamp(images: NDArray[np.uint8], settings: Settings) -> NDArray[np.uint8]:
    """Add the wave. (B, H, W, 3) -> (B, H, W, 3)"""
    width = images.shape[2]
    phase = 2 * np.pi * settings.frequency * np.arange(width, dtype=np.float32) / width
    wave = settings.delta * np.sin(phase)
    waved = images.astype(np.float32) + wave[None, None, :, None]
    stamped: NDArray[np.uint8] = np.rint(waved).clip(0, 255).astype(np.uint8)
    return stamped
