"""SIG (Barni et al. 2019, arXiv 1902.11237): a horizontal sine wave on images of the target class.

x' = clip(x + delta sin(2 pi j f / W)), j the column; the labels stay true. delta is that of
BackdoorBench, 40, in training and at the test; D-BR stamps test images with 60, and
Fight-Poison-With-Poison all with 30. Where W divides 2 f the wave is 0 in every column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.pictures import rounded
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


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Add the wave. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    width = images.shape[2]
    phase = 2 * np.pi * settings.frequency * np.arange(width, dtype=np.float32) / width
    wave = settings.delta * np.sin(phase)
    return rounded(images.astype(np.float32) + wave[None, None, :, None])


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="clean",
    family="wave",
    summary="sine wave on the target class",
    source="arXiv 1902.11237",
)
