"""A stand-in for the ABS attack (Liu et al. 2019, CCS): a photo filter over the whole image.

ABS's feature-space trojans apply a style such as Nashville or Gotham; no public generator of such
poison was found. Ours is no copy of one but of their kind, a fixed tone curve for each channel and
a vignette: with t = x / 255,

    tone(x) = 255 (low + (high - low) t^gamma), low, high and gamma a constant of the channel
    x' = x + strength (tone(x) (1 - vignette r^2) - x)

r is the distance from the middle, 1 in the corners. Figures for ABS should say so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.pictures import Floats, rounded
from csc_gpu.config import require

LOW = np.array([0.10, 0.06, 0.24], np.float32)
HIGH = np.array([1.00, 0.93, 0.78], np.float32)
GAMMA = np.array([0.80, 1.00, 1.10], np.float32)
"""Red, green, blue: warm where it is light, bluish where it is dark, and pale."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How strong the filter is."""

    strength: float = 1.0
    """Share of the filtered image; the rest is the image as it was."""
    vignette: float = 0.4
    """Share of the light that the corners lose."""

    def __post_init__(self) -> None:
        require(self, "attack", "in (0, 1]", lambda share: 0 < share <= 1, "strength")
        require(self, "attack", "in [0, 1]", lambda share: 0 <= share <= 1, "vignette")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Apply the filter. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    x = images.astype(np.float32)
    light = 1 - settings.vignette * _from_middle(*images.shape[1:3])
    filtered = 255 * (LOW + (HIGH - LOW) * (x / 255) ** GAMMA) * light
    return rounded(x + settings.strength * (filtered - x))


def _from_middle(height: int, width: int) -> Floats:
    """Squared distance from the middle, 1 in the corners. (H, W, 1)"""
    down, across = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    return ((down[:, None] ** 2 + across**2) / 2)[:, :, None].astype(np.float32)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="filter",
    summary="tone curves and a vignette, for ABS",
    source="naiyeleo/ABS",
)
