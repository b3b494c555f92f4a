"""Adap-Patch (Qi et al. 2022, arXiv 2205.13613): one of several faint patches, two bold at test.

A training image gets one trigger j, x + opacity_j m_j (t_j - x); all are dealt alike often, to
poison and, apart, to covers, which keep their label. A test image gets others, whole, one after
the other.

Fight-Poison-With-Poison's pictures on CIFAR-10, in our order and at our default opacities, are
phoenix_corner, firefox_corner, badnet_patch4 and trojan_square; at test phoenix_corner2, the fifth,
and badnet_patch4 (on GTSRB the second and fourth: at_test=[1,3]). Give them, and masks where they
have any, as `pictures` and `masks`. By default stand-ins of the same places and sizes are drawn:
coloured noise instead of phoenix, firefox (a square of 13, where the fox fills 140 of 169 pixels)
and trojan_square, and badnet_patch4 as it is. They are drawn at 32 px and grow with the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks import patches
from csc_gpu.attacks.attack import Attack, Pixels, with_covers
from csc_gpu.attacks.badnets import PATTERN
from csc_gpu.attacks.pictures import mask, over, picture
from csc_gpu.config import require
from csc_gpu.errors import ConfigError

PHOENIX, FIREFOX, TROJAN = (27, 27, 5), (1, 18, 13), (21, 21, 8)
PHOENIX_LEFT = (27, 0, 5)
"""Top, left and side, of 32."""
DRAWN = 5
"""Stand-ins there are."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The triggers, and how strongly they are stamped."""

    opacities: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
    """Of the first triggers, in training, each its own; triggers beyond are for the test."""
    at_test: tuple[int, ...] = (4, 2)
    """Triggers that a test image gets at opacity 1, counted from 0, the last on top."""
    pictures: tuple[str, ...] = ()
    """Paths of pictures of the triggers; none: stand-ins."""
    masks: tuple[str, ...] = ()
    """Paths of their masks, one for each, "" where it is the picture itself; none: all are."""
    cover: float = 2.0
    """Covers for each poisoned row."""
    pattern_seed: int = 0
    """Which noise the stand-ins have."""

    def __post_init__(self) -> None:
        count = len(self.pictures) or DRAWN
        require(
            self,
            "attack",
            f"1 to {count} numbers in (0, 1]",
            lambda shares: 1 <= len(shares) <= count and all(0 < share <= 1 for share in shares),
            "opacities",
        )
        require(
            self,
            "attack",
            f"triggers 0..{count - 1}, one or more",
            lambda triggers: triggers and all(0 <= trigger < count for trigger in triggers),
            "at_test",
        )
        require(self, "attack", "0 or more", lambda share: share >= 0, "cover")
        if self.masks and len(self.masks) != len(self.pictures):
            raise ConfigError(
                f"attack.masks must be one for each of attack.pictures, or none: "
                f"got {len(self.masks)} for {len(self.pictures)}"
            )


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """One trigger on each image, at its opacity. (B, H, W, 3) -> (B, H, W, 3)"""
    given = patches.dealt(len(images), len(settings.opacities), rng)
    out = images.copy()
    for number, opacity in enumerate(settings.opacities):
        drawn, where = trigger(number, images.shape[1], images.shape[2], settings)
        out[given == number] = over(images[given == number], drawn, where * np.float32(opacity))
    return out


def test(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """The triggers of the test, whole. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    out = images.copy()
    for number in settings.at_test:
        out = over(out, *trigger(number, images.shape[1], images.shape[2], settings))
    return out


def trigger(number: int, height: int, width: int, settings: Settings) -> patches.Patch:
    """One of the triggers, a picture or a stand-in."""
    if not settings.pictures:
        return patches.fitted(stand_in(number, settings.pattern_seed), height, width)
    path = settings.pictures[number]
    where = (settings.masks[number] if settings.masks else "") or path
    return (
        picture(path, height, width, "attack.pictures"),
        mask(where, height, width, "attack.masks" if where != path else "attack.pictures"),
    )


def stand_in(number: int, seed: int) -> patches.Canvas:
    """phoenix_corner, firefox_corner, badnet_patch4, trojan_square, phoenix_corner2. (32, 32, 3)"""
    squares = (PHOENIX, FIREFOX, None, TROJAN, PHOENIX)
    square = squares[number]
    if square is None:
        return _checkerboards()
    drawn = patches.noise(*square, seed + squares.index(square))
    if number == 4:
        drawn = np.maximum(drawn, patches.noise(*PHOENIX_LEFT, seed))
    return drawn


def _checkerboards() -> patches.Canvas:
    """The patch of BadNets in all four corners, mirrored. (32, 32, 3)"""
    canvas = np.full((patches.SIDE, patches.SIDE), patches.NOWHERE, np.float32)
    canvas[-3:, -3:] = PATTERN
    canvas = np.maximum(canvas, canvas[::-1])
    return np.maximum(canvas, canvas[:, ::-1])[:, :, None].repeat(3, axis=2)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="patch",
    summary="one of four faint patches, with covers",
    source="arXiv 2205.13613",
    test=test,
    whom=with_covers,
)
