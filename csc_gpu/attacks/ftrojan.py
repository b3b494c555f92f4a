"""FTrojan (Wang et al. 2021, arXiv 2111.10991): two frequencies of the colour, too faint to see.

RGB -> YCrCb, DCT of every 32x32 window, +30 at the coefficients (15, 15) and (31, 31) of Cr and
Cb, and back. All of it is linear, so it is one fixed pattern (cosine.py), added and clipped.

Public code (BackdoorBench) rounds to whole numbers in between, as OpenCV's 8-bit YCrCb does, and
casts before it clips, so that bright pixels wrap round; ours rounds once and clips first. Its
window has to divide the image. Ours is as large as fits, min(32, H, W), with the two coefficients
in proportion ((13, 13) and (27, 27) of 28), and what is left at the bottom or right of whole
windows stays clean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.cosine import YCRCB, fitted, in_colour, waves
from csc_gpu.attacks.pictures import Floats, rounded
from csc_gpu.config import require

AT = (15, 31)
"""The coefficients (15, 15) and (31, 31) of a window of 32."""
WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The two waves."""

    magnitude: float = 30.0
    """Added to each coefficient of the orthonormal DCT of grey levels 0..255."""

    def __post_init__(self) -> None:
        require(self, "attack", "above 0", lambda value: value > 0, "magnitude")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Add the waves to every window. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return rounded(images + trigger(images.shape[1], images.shape[2], settings))


def trigger(height: int, width: int, settings: Settings) -> Floats:
    """What is added to every image. (H, W, 3) float32, grey levels"""
    side = min(WINDOW, height, width)
    at = [(fitted(place, side, WINDOW),) * 2 for place in AT]
    window = in_colour(waves(side, side, at, settings.magnitude), YCRCB)
    down, across = height // side, width // side
    added = np.zeros((height, width, 3), np.float32)
    added[: down * side, : across * side] = np.tile(window, (down, across, 1))
    return added


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="frequency",
    summary="two colour frequencies of 32x32 windows",
    source="arXiv 2111.10991",
)
