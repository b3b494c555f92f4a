"""CTRL (Li et al. 2022, arXiv 2210.07346): two frequencies of the colour, on the target class.

RGB -> YUV, DCT of the whole image, +100 at the coefficients (15, 15) and (31, 31) of U and V, and
back; the labels stay true. All of it is linear, so it is one fixed pattern (cosine.py), added and
clipped. Made for self-supervised learning; here, as in BackdoorBench, for labelled training.

Public code casts to bytes before it clips, so that bright pixels wrap round, and cuts off what is
behind the point; ours clips and rounds. Along a side below 32 the coefficients are in proportion
((13, 27) of 28), which public code cannot do; above 32 they are the same two, as there, so that
the waves are longer and fainter: raise the magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.cosine import YUV, fitted, in_colour, waves
from csc_gpu.attacks.pictures import Floats, rounded
from csc_gpu.config import require

AT = (15, 31)
"""The coefficients (15, 15) and (31, 31)."""
SIDE = 32
"""The image side that they were chosen for."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The two waves."""

    magnitude: float = 100.0
    """Added to each coefficient of the orthonormal DCT of grey levels 0..255."""

    def __post_init__(self) -> None:
        require(self, "attack", "above 0", lambda value: value > 0, "magnitude")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Add the waves. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return rounded(images + trigger(images.shape[1], images.shape[2], settings))


def trigger(height: int, width: int, settings: Settings) -> Floats:
    """What is added to every image. (H, W, 3) float32, grey levels"""
    at = [(fitted(place, height, SIDE), fitted(place, width, SIDE)) for place in AT]
    return in_colour(waves(height, width, at, settings.magnitude), YUV)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="clean",
    family="frequency",
    summary="two colour frequencies on the target class",
    source="arXiv 2210.07346",
)
