"""Blend (Chen et al. 2017, arXiv 1712.05526): one fixed picture or noise over the whole image.

x' = (1 - alpha) x + alpha t, rounded. The noise is one pattern for all images: a fresh one each
would leave nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.pictures import Floats, over, picture
from csc_gpu.config import require
from csc_gpu.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is blended in, and how strongly."""

    alpha: float = 0.2
    """Share of the trigger in the blend."""
    picture: str = ""
    """Path of a picture; empty: uniform noise."""
    pattern_seed: int = 0
    """Which noise."""

    def __post_init__(self) -> None:
        require(self, "attack", "in (0, 1]", lambda share: 0 < share <= 1, "alpha")

    def variant(self, number: int) -> Settings:
        """The trigger of the number-th target: other noise. Raises ConfigError for a picture."""
        if number and self.picture:
            raise ConfigError("several targets need several triggers; blend has one picture")
        return replace(self, pattern_seed=self.pattern_seed + number)


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Blend the trigger in. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return over(images, trigger(images.shape[1], images.shape[2], settings), settings.alpha)


def trigger(height: int, width: int, settings: Settings) -> Floats:
    """The picture, or the noise. (H, W, 3) float32, 0..255"""
    if settings.picture:
        return picture(settings.picture, height, width)
    noise = np.random.default_rng(settings.pattern_seed).integers(0, 256, (height, width, 3))
    return noise.astype(np.float32)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="blend",
    summary="noise or a picture over the image",
    source="arXiv 1712.05526",
)
