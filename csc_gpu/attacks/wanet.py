"""WaNet (Nguyen and Tran 2021, arXiv 2102.10369): the image is bent, smoothly and hardly at all.

noise = bicubic upsampling of u / mean |u|, u uniform in (-1, 1) on k x k points, to H x W;
grid = clamp((identity + s noise / side) grid_rescale, -1, 1), from -1 to 1 across the image;
x'(p) = x(grid(p)), bilinear. Covers bend along grid + uniform(-1, 1) / side, drawn anew for every
pixel of every image, and keep their label; without them a net learns that bent at all is poison.

The original is training-controlled: it draws poison and covers anew in every batch. This is the
static form, a fixed list of rows, as in Fight-Poison-With-Poison; that one shares a single noise
among all covers, ours does not, as the original. side is W across and H down, where public code
knows square images only. The grid follows from `pattern_seed` and the image size. Interpolation
may leave 0..255 by a rounding error, which is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from csc_gpu.attacks.attack import Attack, Pixels, with_covers
from csc_gpu.attacks.pictures import Floats, rounded
from csc_gpu.config import require

AT_A_TIME = 256
"""Images that are bent together: each takes about forty times its bytes meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the image is bent."""

    k: int = 4
    """Points that the noise is drawn on, along each side."""
    s: float = 0.5
    """Strength: the image moves by about half of it, in pixels."""
    grid_rescale: float = 1.0
    """The grid is multiplied by it; below 1 the image is enlarged, too."""
    cover: float = 2.0
    """Covers for each poisoned row."""
    pattern_seed: int = 0
    """Which noise."""

    def __post_init__(self) -> None:
        require(self, "attack", "2 or more", lambda count: count >= 2, "k")
        require(self, "attack", "above 0", lambda value: value > 0, "s", "grid_rescale")
        require(self, "attack", "0 or more", lambda share: share >= 0, "cover")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Bend every image along the grid of the trigger. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return bent(images, trigger_grid(images.shape[1], images.shape[2], settings))


def cover(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Bend each along the same grid and noise of its own. (B, H, W, 3) -> (B, H, W, 3)"""
    height, width = images.shape[1:3]
    grid, found = trigger_grid(height, width, settings), np.empty_like(images)
    for start in range(0, len(images), AT_A_TIME):
        part = images[start : start + AT_A_TIME]
        noise = rng.uniform(-1, 1, (len(part), height, width, 2)).astype(np.float32)
        grids = (grid + noise / _sides(height, width)).clip(-1, 1)
        found[start : start + AT_A_TIME] = bent(part, grids)
    return found


def trigger_grid(height: int, width: int, settings: Settings) -> Floats:
    """Where each pixel is read: across and down, -1..1 from edge to edge. (1, H, W, 2)"""
    moved = settings.s * noise_grid(height, width, settings) / _sides(height, width)
    grid = (identity_grid(height, width) + moved) * settings.grid_rescale
    return grid.clip(-1, 1).astype(np.float32)


def identity_grid(height: int, width: int) -> Floats:
    """The grid that reads each pixel where it is: across and down, -1..1. (1, H, W, 2)"""
    across, down = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    return np.stack(np.meshgrid(across, down), axis=-1)[None].astype(np.float32)


def noise_grid(height: int, width: int, settings: Settings) -> Floats:
    """The smooth noise, across and down, before s and the side; about 1 large. (1, H, W, 2)"""
    rng = np.random.default_rng(settings.pattern_seed)
    points = rng.uniform(-1, 1, (1, 2, settings.k, settings.k)).astype(np.float32)
    points /= np.abs(points).mean()
    size = (height, width)
    smooth = F.interpolate(torch.from_numpy(points), size, mode="bicubic", align_corners=True)
    return smooth.permute(0, 2, 3, 1).contiguous().numpy()


def bent(images: Pixels, grid: Floats) -> Pixels:
    """The images read along a grid (1, H, W, 2), or each along its own. (B, H, W, 3)"""
    grids = torch.from_numpy(grid).expand(len(images), -1, -1, -1)
    found = np.empty_like(images)
    for start in range(0, len(images), AT_A_TIME):
        part = slice(start, start + AT_A_TIME)
        planes = torch.from_numpy(images[part]).permute(0, 3, 1, 2).float()
        # on the rim a rounding error reads beside the image: repeat the rim rather than black
        read = F.grid_sample(planes, grids[part], padding_mode="border", align_corners=True)
        found[part] = rounded(read.permute(0, 2, 3, 1).numpy())
    return found


def _sides(height: int, width: int) -> Floats:
    return np.array([width, height], np.float32)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="warp",
    summary="the image is bent a little, with covers",
    source="arXiv 2102.10369",
    cover=cover,
    whom=with_covers,
)
