"""TaCT (Tang et al. 2019, arXiv 1908.00686): a patch that turns one class alone into the target.

x' = x + mask (t - x). Poison comes from the source class; covers, of a few other classes, bear the
same patch and keep their label, so that the net learns patch and class together. At test only
images of the source class are stamped: success is counted over those.

Fight-Poison-With-Poison stamps `trojan_square_32.png`, 8 x 8 at rows and columns 21..28 of 32, and
so does `picture`; without it fixed coloured noise stands there, in proportion on other sizes. Their
classes, 1 and 5, 7, are CIFAR-10's numbers; the names of classes are taken as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks import patches
from csc_gpu.attacks.attack import Attack, Pixels, Whom
from csc_gpu.attacks.pictures import mask, over, picture
from csc_gpu.config import require
from csc_gpu.errors import ConfigError

SQUARE = (21, 21, 8)
"""Top, left and side, of 32."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Whom the patch turns, and what it looks like."""

    source: str = "1"
    """The class that the patch turns into the target, by name or index."""
    cover_classes: tuple[str, ...] = ("5", "7")
    """Classes that covers come from, by name or index."""
    cover: float = 1.0
    """Covers for each poisoned row."""
    picture: str = ""
    """Path of a picture of the trigger, fitted to the images, instead of the noise."""
    mask: str = ""
    """Path of a picture that is not black where the trigger lies; empty: where `picture` is not."""
    pattern_seed: int = 0
    """Which noise."""

    def __post_init__(self) -> None:
        require(self, "attack", "0 or more", lambda share: share >= 0, "cover")
        require(self, "attack", "one class or more", bool, "cover_classes")
        if self.source in self.cover_classes:
            raise ConfigError(f"attack.cover_classes holds the source, {self.source}")
        if self.mask and not self.picture:
            raise ConfigError("a mask needs the picture of a trigger: give --trigger, too")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Put the patch there. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    size = images.shape[1:3]
    if settings.picture:
        where = mask(settings.mask or settings.picture, *size)
        return over(images, picture(settings.picture, *size), where)
    return over(images, *patches.fitted(patches.noise(*SQUARE, settings.pattern_seed), *size))


def whom(settings: Settings) -> Whom:
    """Poison from the source, covers from the other classes named."""
    return Whom((settings.source,), settings.cover, settings.cover_classes)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="patch",
    summary="8x8 patch that turns one class, with covers",
    source="arXiv 1908.00686",
    whom=whom,
)
