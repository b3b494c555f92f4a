"""Adap-k-way (Unispac/Fight-Poison-With-Poison, vtu81/backdoor-toolbox): one of four pixels.

A training image gets one of four pixels of a dark colour; all are dealt alike often, to poison
and, apart, to covers, which keep their label. A test image gets all four. Places and colours are
theirs, of 32 x 32 images; on others a pixel is a 32nd of the side, at least one pixel. How many
covers is a setting there, too; ours are as many as poison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from csc_gpu.attacks.attack import Attack, Pixels, with_covers
from csc_gpu.attacks.patches import SIDE, dealt
from csc_gpu.config import require

PIXELS = {
    (16, 11): (92, 0, 24),
    (27, 5): (88, 112, 110),
    (7, 30): (0, 32, 46),
    (22, 22): (11, 49, 95),
}
"""Row and column of 32: red, green, blue."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How many covers; the pixels are given."""

    cover: float = 1.0
    """Covers for each poisoned row."""

    def __post_init__(self) -> None:
        require(self, "attack", "0 or more", lambda share: share >= 0, "cover")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """One of the pixels on each image. (B, H, W, 3) -> (B, H, W, 3)"""
    del settings
    given = dealt(len(images), len(PIXELS), rng)
    out = images.copy()
    for number, ((row, column), colour) in enumerate(PIXELS.items()):
        rows, columns = _cell(row, images.shape[1]), _cell(column, images.shape[2])
        out[given == number, rows, columns] = colour
    return out


def test(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """All of the pixels on each image. (B, H, W, 3) -> (B, H, W, 3)"""
    del settings, rng
    out = images.copy()
    for (row, column), colour in PIXELS.items():
        out[:, _cell(row, images.shape[1]), _cell(column, images.shape[2])] = colour
    return out


def _cell(place: int, size: int) -> slice:
    start = place * size // SIDE
    return slice(start, max((place + 1) * size // SIDE, start + 1))


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="patch",
    summary="one of four pixels, with covers",
    source="vtu81/backdoor-toolbox",
    test=test,
    whom=with_covers,
)
