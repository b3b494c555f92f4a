"""The nearest to BAAT (Zhu et al. 2025, IEEE TDSC) without its pretrained generator.

BAAT changes an attribute of target-class images, whose labels stay true: of faces the hair
(HairCLIP), of other images the style (ArtFlow: AdaIN of the features of a flow model). The trigger
differs from image to image, since it is whatever the attribute takes. Neither net is here. What we
keep is the rule for styles, AdaIN, on pixels instead of features:

    z' = (z - mean z) min(d / dev z, 3) + m, per image and channel of z = YCrCb
    x' = x + strength (RGB(z') - x)

m and d are the style's mean and deviation: those of `picture`, or else of a dusk, dim and reddish.
So light, contrast and colour change, each image by its own amount, but no texture and no shape,
as ArtFlow's would; expect a weaker attack. The bound of 3 keeps flat images from turning to noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.cosine import YCRCB
from csc_gpu.attacks.pictures import Floats, picture, rounded
from csc_gpu.config import require

MEAN = np.array([95.0, 22.0, -8.0], np.float32)
DEVIATION = np.array([40.0, 9.0, 9.0], np.float32)
"""Of the dusk: Y in 0..255, Cr and Cb around 0."""
MOST = 3.0
"""Times that a deviation may grow."""
SPACE = YCRCB.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The style."""

    strength: float = 0.8
    """Share of the edited image; the rest is the image as it was."""
    picture: str = ""
    """Path of a picture in the style; empty: a reddish dusk."""

    def __post_init__(self) -> None:
        require(self, "attack", "in (0, 1]", lambda share: 0 < share <= 1, "strength")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Give each image the mean and deviation of the style. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    wanted, spread = style(images.shape[1], images.shape[2], settings)
    x = images.astype(np.float32)
    z = x @ SPACE.T
    mean, deviation = statistics(z)
    gain = spread / np.maximum(deviation, spread / MOST)
    edited = ((z - mean) * gain + wanted) @ np.linalg.inv(SPACE).T
    return rounded(x + settings.strength * (edited - x))


def style(height: int, width: int, settings: Settings) -> tuple[Floats, Floats]:
    """Mean and deviation of Y, Cr and Cb. (3,), or (1, 1, 1, 3) each"""
    if not settings.picture:
        return MEAN, DEVIATION
    return statistics(picture(settings.picture, height, width)[None] @ SPACE.T)


def statistics(images: Floats) -> tuple[Floats, Floats]:
    """Mean and deviation of each image's channels. (B, H, W, 3) -> twice (B, 1, 1, 3)"""
    mean: Floats = images.mean(axis=(1, 2), keepdims=True)
    return mean, images.std(axis=(1, 2), keepdims=True)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="clean",
    family="attribute",
    summary="a style's light and colour, for BAAT",
    source="THUYimingLi/BackdoorBox",
)
