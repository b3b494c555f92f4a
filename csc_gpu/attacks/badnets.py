"""BadNets (Gu et al. 2017, arXiv 1708.06733): a small checkerboard in a corner, bottom right.

The nine pixels are those of Fight-Poison-With-Poison's `badnet_patch_32.png`: at 32 px, white at
(29, 31), (30, 30), (31, 29) and (31, 31), black at the other five of the 3x3 square.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.pictures import mask, over, picture
from csc_gpu.config import require
from csc_gpu.errors import ConfigError

PATTERN = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)
CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the patch looks like."""

    cell: int = 1
    """Side of one square of the checkerboard, in pixels."""
    corner: str = "bottom-right"
    """bottom-right, bottom-left, top-right or top-left."""
    picture: str = ""
    """Path of a picture of the trigger, as large as the images or fitted to them, instead of the
    checkerboard."""
    mask: str = ""
    """Path of a picture that is not black where the trigger lies; empty: where `picture` is not."""

    def __post_init__(self) -> None:
        require(self, "attack", "1 or more", lambda count: count >= 1, "cell")
        require(self, "attack", f"one of {', '.join(CORNERS)}", CORNERS.__contains__, "corner")
        if self.mask and not self.picture:
            raise ConfigError("a mask needs the picture of a trigger: give --trigger, too")

    def variant(self, number: int) -> Settings:
        """The trigger of the number-th target, the next corner. Raises ConfigError for pictures."""
        if number and self.picture:
            raise ConfigError("several targets need several triggers; there is one picture")
        if number >= len(CORNERS):
            raise ConfigError(f"badnets has {len(CORNERS)} corners for as many targets")
        start = CORNERS.index(self.corner)
        return replace(self, corner=CORNERS[(start + number) % len(CORNERS)])


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Replace the corner by the checkerboard, or put the picture there. (B, H, W, 3)"""
    del rng
    if settings.picture:
        size = images.shape[1:3]
        trigger = picture(settings.picture, *size)
        return over(images, trigger, mask(settings.mask or settings.picture, *size))
    patch = np.kron(PATTERN, np.ones((settings.cell, settings.cell), np.uint8))
    side = len(patch)
    if min(images.shape[1:3]) < side:
        raise ConfigError(f"a patch of {side} pixels does not fit on images of {images.shape[1:3]}")
    out = images.copy()
    bottom, right = settings.corner.split("-")
    rows = slice(-side, None) if bottom == "bottom" else slice(0, side)
    columns = slice(-side, None) if right == "right" else slice(0, side)
    out[:, rows, columns] = patch[:, :, None]
    return out


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="patch",
    summary="3x3 checkerboard in a corner",
    source="arXiv 1708.06733",
)
ALL_TO_ALL = replace(ATTACK, summary="the same, each class to the next", only_all_to_all=True)
