"""Random views of images as contrastive learning has them (SimCLR, Chen et al. 2020, 2002.05709).

A crop of random size and shape is stretched to the image; most are then changed in brightness,
contrast, saturation and hue, some made grey. Each image is changed by a draw of its own, all of a
batch at once. Of other make than torchvision's: crops may not leave the image, but their place is
drawn before their size is fitted; colours change in that order, hue by a rotation in YIQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from csc_gpu.backend import Batch
from csc_gpu.config import require

GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the lightness."""
YIQ = (GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True, kw_only=True)
class Views:
    """How far a view may be from the image."""

    smallest: float = 0.2
    """Smallest crop, as a share of the area."""
    stretch: float = 4 / 3
    """A crop is at most so many times wider than high, or higher than wide."""
    jittered: float = 0.8
    """Share of views whose colours change."""
    jitter: float = 0.4
    """Brightness, contrast and saturation are multiplied by 1 - this to 1 + this."""
    hue: float = 0.1
    """Largest turn of the hue either way, as a share of the circle."""
    grey: float = 0.2
    """Share of views without colours."""

    def __post_init__(self) -> None:
        require(self, "views", "in (0, 1]", lambda share: 0 < share <= 1, "smallest")
        require(self, "views", "1 or more", lambda value: 1 <= value < math.inf, "stretch")
        shares = ("jittered", "jitter", "hue", "grey")
        require(self, "views", "in [0, 1]", lambda share: 0 <= share <= 1, *shares)


Seen = Callable[[Batch, int, int], torch.Tensor]
"""(batch, step, which) -> a view of each of its images. (B, 3, H, W)"""


def seeing(how: Views, seed: int, *, flip: bool) -> Seen:
    """Views drawn from the seed, the step and which of them it is."""

    def seen(batch: Batch, step: int, which: int) -> torch.Tensor:
        start = np.random.SeedSequence((seed, step, which)).generate_state(1)[0]
        chance = torch.Generator().manual_seed(int(start))
        return view(batch.images, how, chance, flip=flip)

    return seen


def view(images: torch.Tensor, how: Views, chance: torch.Generator, *, flip: bool) -> torch.Tensor:
    """A view of each image, (pixel / 255 - .5) / .25 as it is. (B, 3, H, W) -> (B, 3, H, W)

    Numbers are drawn on the host, so that a seed gives the same views on every machine.
    """
    device = images.device
    cut = cropped(images, crops(len(images), how, chance, flip=flip).to(device))
    maps, contrast = (drawn.to(device) for drawn in colours(len(images), how, chance))
    light = (cut / 4 + 0.5).clamp(0, 1)  # of full light
    # products by hand: autocast would round a matrix product's colours to bfloat16
    mixed = (maps[..., None, None] * light[:, None]).sum(2)
    grey = mixed.mean(dim=(1, 2, 3), keepdim=True)
    seen = grey + contrast[:, None, None, None] * (mixed - grey)
    return (seen.clamp(0, 1) - 0.5) * 4


def crops(count: int, how: Views, chance: torch.Generator, *, flip: bool) -> torch.Tensor:
    """Where the pixels of each view come from, -1..1 from edge to edge. (count, 2, 3)"""
    drawn = torch.rand(count, 5, generator=chance)
    area = how.smallest + (1 - how.smallest) * drawn[:, 0]
    shape = ((2 * drawn[:, 1] - 1) * math.log(how.stretch)).exp()
    width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    across, down = (1 - width) * (2 * drawn[:, 2] - 1), (1 - height) * (2 * drawn[:, 3] - 1)
    side = torch.where(drawn[:, 4] < 0.5 * flip, -1.0, 1.0)
    nothing = torch.zeros(count)
    rows = [side * width, nothing, across, nothing, height, down]
    return torch.stack(rows, dim=1).reshape(count, 2, 3)


def cropped(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Each image (B, 3, H, W) read along its map (B, 2, 3), the rim repeated."""
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def colours(count: int, how: Views, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What is done to red, green and blue, and the contrast. (count, 3, 3), (count,)"""
    drawn = torch.rand(count, 6, generator=chance)
    factor = 1 + how.jitter * (2 * drawn[:, :3] - 1)
    turn = 2 * math.pi * how.hue * (2 * drawn[:, 3] - 1)
    changes = drawn[:, 4] < how.jittered
    factor = torch.where(changes[:, None], factor, 1.0)
    turn = torch.where(changes, turn, 0.0)
    light = torch.tensor(GREY).expand(3, 3)
    saturation = torch.where(drawn[:, 5] < how.grey, 0.0, factor[:, 2])[:, None, None]
    to_yiq = torch.tensor(YIQ)
    turned = torch.eye(3).repeat(count, 1, 1)
    turned[:, 1, 1] = turned[:, 2, 2] = turn.cos()
    turned[:, 1, 2], turned[:, 2, 1] = -turn.sin(), turn.sin()
    hue = torch.linalg.inv(to_yiq) @ turned @ to_yiq
    mixed = saturation * torch.eye(3) + (1 - saturation) * light
    return factor[:, 0, None, None] * (mixed @ hue), factor[:, 1]
