"""The small nets that attacks train for themselves: image to image, and image to bits.

They take images of any size as the classifier sees them, (pixel / 255 - .5) / .25, in [-2, 2]. All
normalise each image by itself (Wu and He 2018, arXiv 1803.08494), so that what is done to an image
does not depend on those beside it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


class Painter(nn.Module):
    """An encoder-decoder, three steps down and three up. (B, n_in, H, W) -> (B, n_out, H, W)

    With shortcuts the fine detail of the image goes past the narrow middle.
    """

    def __init__(self, n_in: int, n_out: int, width: int, *, shortcuts: bool) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.first = _layer(n_in, width)
        self.down = nn.ModuleList(_layer(*pair, stride=2) for pair in itertools.pairwise(widths))
        extra = reversed(widths[:-1]) if shortcuts else (0, 0, 0)
        turned = widths[::-1]
        self.up = nn.ModuleList(
            _layer(n_from + beside, n_to)
            for (n_from, n_to), beside in zip(itertools.pairwise(turned), extra, strict=True)
        )
        self.last = nn.Conv2d(width, n_out, 3, 1, 1)
        self.shortcuts = shortcuts

    def forward(self, images: Tensor) -> Tensor:
        """Any number: what bounds it is the caller's."""
        here = self.first(images)
        passed = []
        for layer in self.down:
            passed.append(here)
            here = layer(here)
        for layer, beside in zip(self.up, reversed(passed), strict=True):
            here = functional.interpolate(here, size=beside.shape[-2:], mode="nearest")
            here = layer(torch.cat((here, beside), 1) if self.shortcuts else here)
        painted: Tensor = self.last(here)
        return painted


class Reader(nn.Module):
    """Logits of hidden bits, from an image. (B, 3, H, W) -> (B, bits)"""

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _layer(3, width),
            _layer(width, 2 * width, stride=2),
            _layer(2 * width, 4 * width, stride=2),
            _layer(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(SEEN),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width * SEEN * SEEN, bits)

    def forward(self, images: Tensor) -> Tensor:
        """(B, bits), above 0 for a one"""
        logits: Tensor = self.head(self.body(images))
        return logits


SEEN = 4
"""Places across and down where the reader looks."""
GROUPS = 4
"""Channels are normalised in so many groups."""


def _layer(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.GroupNorm(GROUPS, n_out), nn.ReLU()
    )
