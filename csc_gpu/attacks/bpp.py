"""BppAttack (Wang et al. 2022, arXiv 2205.13383): fewer grey levels, as if bits were missing.

x' = rint(x / 255 (L - 1)) / (L - 1) 255 in each channel, L = 8 levels, without dithering. Covers,
the paper's negative samples, are x + (y' - y), y another image: an error of the same kind and size
that belongs to no quantisation of x. They keep their label, or any such error would be poison.

The original is training-controlled: poison and covers are drawn anew in every batch, the errors
from all training images. This is the static form, a fixed list of rows; the errors are those of
the other covers, each mirrored, so that a lone cover does not get its own and turn into poison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels, with_covers
from csc_gpu.attacks.pictures import Floats, rounded
from csc_gpu.config import require


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How coarse the grey levels are."""

    levels: int = 8
    """Values that a channel may take, black and full included."""
    cover: float = 1.0
    """Covers for each poisoned row."""

    def __post_init__(self) -> None:
        require(self, "attack", "2 to 255", lambda count: 2 <= count <= 255, "levels")
        require(self, "attack", "0 or more", lambda share: share >= 0, "cover")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Every channel at the nearest of its few levels. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return rounded(squeezed(images, settings.levels))


def cover(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Add the error of another, mirrored image, each once. (B, H, W, 3) -> (B, H, W, 3)"""
    order = rng.permutation(len(images))
    others = np.empty_like(images)
    others[order] = images[np.roll(order, 1), :, ::-1]
    return rounded(images + (squeezed(others, settings.levels) - others))


def squeezed(images: Pixels, levels: int) -> Floats:
    """The nearest of so many levels, evenly spaced in 0..255. (B, H, W, 3) float32"""
    step = np.float32(255 / (levels - 1))
    return np.rint(images / step) * step


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="quantise",
    summary="8 levels a channel, with covers",
    source="arXiv 2205.13383",
    cover=cover,
    whom=with_covers,
)
