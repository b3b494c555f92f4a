"""No attack: the control that every defense should leave alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Nothing to set."""


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """The images as they are. (B, H, W, 3) -> (B, H, W, 3)"""
    del settings, rng
    return images.copy()


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="none",
    family="none",
    summary="nothing: the control",
    source="-",
)
