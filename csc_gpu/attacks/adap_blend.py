"""Adap-Blend (Qi et al. 2022, arXiv 2205.13613): a blend that training images bear in pieces.

The image is cut into 16 pieces, 4 x 4. A training image gets half of them, drawn anew, faintly;
covers get the same and keep their label. A test image gets all of them, and more of each:

    poison, cover: x + alpha m (t - x), m the mask of that image; test: x + test_alpha (t - x)

alpha .15 and test_alpha .2 are those of Fight-Poison-With-Poison's commands. Its t is Hello Kitty,
which `picture` takes; ours is one fixed noise otherwise, as in blend. It needs images that 4
divides; ours have pieces that differ by a pixel where 4 does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks import blend
from csc_gpu.attacks.attack import Attack, Pixels, with_covers
from csc_gpu.attacks.pictures import Floats, over
from csc_gpu.config import require


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is blended in, how strongly, and how much of it."""

    alpha: float = 0.15
    """Share of the trigger in the blend, in training."""
    test_alpha: float = 0.2
    """The same at test."""
    pieces: int = 16
    """Pieces that the trigger is cut into, a square number."""
    masked: float = 0.5
    """Share of the pieces that a training image does not get."""
    cover: float = 1.0
    """Covers for each poisoned row."""
    picture: str = ""
    """Path of a picture; empty: uniform noise."""
    pattern_seed: int = 0
    """Which noise."""

    def __post_init__(self) -> None:
        require(self, "attack", "in (0, 1]", lambda share: 0 < share <= 1, "alpha", "test_alpha")
        require(
            self, "attack", "a square number", lambda n: n > 0 and math.isqrt(n) ** 2 == n, "pieces"
        )
        require(self, "attack", "in [0, 1)", lambda share: 0 <= share < 1, "masked")
        require(self, "attack", "0 or more", lambda share: share >= 0, "cover")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Blend some pieces in, drawn for each image. (B, H, W, 3) -> (B, H, W, 3)"""
    where = masks(images.shape[:3], settings, rng)
    return over(images, _trigger(images, settings), where * np.float32(settings.alpha))


def test(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Blend the whole trigger in. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return over(images, _trigger(images, settings), settings.test_alpha)


def masks(shape: tuple[int, ...], settings: Settings, rng: np.random.Generator) -> Floats:
    """1 in the pieces that an image gets, else 0. (B, H, W) -> (B, H, W, 1) float32"""
    count, height, width = shape
    side = math.isqrt(settings.pieces)
    without = round(settings.masked * settings.pieces)
    order = rng.permuted(np.tile(np.arange(settings.pieces), (count, 1)), axis=1)
    kept = (order >= without).reshape(count, side, side)
    down, across = (np.arange(size) * side // size for size in (height, width))
    return kept[:, down][:, :, across, None].astype(np.float32)


def _trigger(images: Pixels, settings: Settings) -> Floats:
    how = blend.Settings(picture=settings.picture, pattern_seed=settings.pattern_seed)
    return blend.trigger(images.shape[1], images.shape[2], how)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="blend",
    summary="half the pieces of a blend, with covers",
    source="arXiv 2205.13613",
    test=test,
    whom=with_covers,
)
