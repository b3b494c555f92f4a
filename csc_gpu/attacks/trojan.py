"""TrojanNN (Liu et al. 2018, NDSS): the pattern that excites chosen neurons of a trained net.

A classifier is trained here on the clean corpus. Of the inputs of its last layer those with the
largest summed absolute weights are chosen; under a mask, a square at the lower right, sign steps
on the pixels raise them on images of the corpus until they reach a value. The pattern is added:
x' = clip(x + p). BackdoorBench casts that sum to uint8 before it clips, so that bright pixels wrap
round to dark; here they saturate. It takes 1,000 sign steps of .1 at most, under the outline of an
apple (`apple4.png`); ours are 300, of 4 grey levels at first and falling, on a square.

The fixed form (Fight-Poison-With-Poison's `trojan_square`) trains nothing: a coloured square, at 32
px rows and columns 21 to 28, or a picture, put over the image: x' = x + m (t - x).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from csc_gpu.attacks import learnt
from csc_gpu.attacks.attack import Attack, Learned, Pixels, Tensors
from csc_gpu.attacks.pictures import Floats, mask, over, picture, rounded
from csc_gpu.backend import Backend
from csc_gpu.config import require
from csc_gpu.errors import ConfigError
from csc_gpu.models import MODELS, Net
from csc_gpu.types import Corpus, Log

SIDE, MARGIN = 8 / 32, 3 / 32
"""The square and its distance from the lower and the right edge, as shares of the shorter side."""
CELLS = 8
"""Colours along a side of the fixed square."""
LOOKED_AT = 32
"""Images on which the neurons are raised, drawn once."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the pattern lies, and how it is found."""

    fixed: bool = False
    """Train nothing: a coloured square, or `picture`, in place of what it covers."""
    picture: str = ""
    """Path of the fixed form's picture; empty: colours drawn with pattern_seed."""
    mask: str = ""
    """Path of a picture that is not black where the trigger lies; empty: the square, or where
    `picture` is not black."""
    pattern_seed: int = 0
    """Which colours the fixed square has."""
    neurons: int = 2
    """How many neurons are raised."""
    aim: float = 100.0
    """Mean value of the neurons at which the search ends; a small net may never get there."""
    rounds: int = 300
    """Most sign steps."""
    step: float = 4.0
    """Length of a sign step at the start, in grey levels of 0..255; it falls linearly."""
    model: str = "resnet8"
    """The net that is trained: resnet8 or resnet18."""
    train_steps: int = 600
    """Its optimiser steps, rounded up to whole epochs."""

    def __post_init__(self) -> None:
        require(self, "attack", f"one of {', '.join(MODELS)}", MODELS.__contains__, "model")
        counts = ("neurons", "rounds", "train_steps")
        require(self, "attack", "1 or more", lambda count: count >= 1, *counts)
        require(self, "attack", "above 0", lambda value: value > 0, "aim", "step")
        require(self, "attack", "0 or more", lambda value: value >= 0, "pattern_seed")
        if self.picture and not self.fixed:
            raise ConfigError("a picture is the fixed form's: give --option fixed=true, too")
        if self.mask and self.fixed and not self.picture:
            raise ConfigError("a mask needs the picture of a trigger: give --trigger, too")


def learn(
    corpus: Corpus, target: int, settings: Settings, backend: Backend, seed: int, log: Log
) -> Tensors:
    """pattern (H, W, 3) float32, whole grey levels of 0..255; mask (H, W, 1), 0 or 1; neurons (n,)
    int64, the inputs of the last layer that were raised, and raised (2,), their mean value without
    and with the pattern."""
    del target  # the pattern is that of the net, whatever it is to be taken for
    where = covered(*corpus.image_size, settings)
    net = learnt.surrogate(corpus, settings.model, settings.train_steps, backend, seed, log)
    return excited(net, corpus, where, settings, backend, seed, log) | {
        "mask": torch.from_numpy(where)
    }


def excited(
    net: Net,
    corpus: Corpus,
    where: Floats,
    settings: Settings,
    backend: Backend,
    seed: int,
    log: Log,
) -> dict[str, torch.Tensor]:
    """The pattern that raises the neurons of the net, and how far it does. See learn."""
    images = learnt.some(corpus, LOOKED_AT, backend, seed)
    chosen = heaviest(net, settings.neurons)
    place = torch.from_numpy(where).to(images.device).permute(2, 0, 1)  # (1, H, W)
    rng = np.random.default_rng(learnt.derived(seed, learnt.NETS))
    start = rng.uniform(0, 2, (3, *corpus.image_size)).astype(np.float32)  # half of the range
    pattern = place * torch.from_numpy(start).to(images.device)

    def value(pattern: torch.Tensor) -> torch.Tensor:
        """Mean of the neurons on the images with the pattern."""
        stamped = (images + pattern).clamp(-2, 2)
        stamped = stamped.contiguous(memory_format=torch.channels_last)
        mean: torch.Tensor = net.features(stamped)[:, chosen].mean()
        return mean

    with torch.no_grad():
        before = value(torch.zeros_like(pattern))
    for done in range(settings.rounds):
        pattern.requires_grad_(True)
        now = value(pattern)
        (slope,) = torch.autograd.grad(now, pattern)
        if now.item() >= settings.aim:
            break
        length = settings.step / 63.75 * (1 - done / settings.rounds)
        pattern = (pattern.detach() + length * place * slope.sign()).clamp(0, 4)
        log("trojan", done=done + 1, total=settings.rounds)
    grey = (pattern.detach() * 63.75).round()
    with torch.no_grad():
        after = value(grey / 63.75)
    return {
        "pattern": grey.permute(1, 2, 0).contiguous().cpu(),
        "neurons": chosen.cpu(),
        "raised": torch.stack((before, after)).cpu(),
    }


def heaviest(net: Net, count: int) -> torch.Tensor:
    """The inputs of the head with the largest summed absolute weights. (n,) int64"""
    weights = net.head.weight.detach().abs().sum(0)
    return weights.topk(min(count, len(weights))).indices


def covered(height: int, width: int, settings: Settings) -> Floats:
    """Where the trigger lies. (H, W, 1) float32, 0 or 1"""
    if settings.mask or settings.picture:
        return mask(settings.mask or settings.picture, height, width)
    shorter = min(height, width)
    side, margin = max(1, round(SIDE * shorter)), round(MARGIN * shorter)
    where = np.zeros((height, width, 1), np.float32)
    where[height - margin - side : height - margin, width - margin - side : width - margin] = 1
    return where


def colours(where: Floats, settings: Settings) -> Floats:
    """The fixed form's picture, or 8x8 colours on the square; black elsewhere. (H, W, 3)"""
    height, width = where.shape[:2]
    if settings.picture:
        return where * picture(settings.picture, height, width)
    drawn = np.random.default_rng(settings.pattern_seed).integers(1, 256, (CELLS, CELLS, 3))
    rows, columns = (np.flatnonzero(where.any(axis=(2, axis))) for axis in (1, 0))
    up, across = (np.arange(len(line)) * CELLS // len(line) for line in (rows, columns))
    out = np.zeros((height, width, 3), np.float32)
    out[np.ix_(rows, columns)] = drawn[np.ix_(up, across)]
    return out


def stamp(images: Pixels, trigger: Learned | Settings, rng: np.random.Generator) -> Pixels:
    """Add the pattern, or put the fixed one there. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    if isinstance(trigger, Settings):
        where = covered(images.shape[1], images.shape[2], trigger)
        return over(images, colours(where, trigger), where)
    pattern: Floats = trigger.tensors["pattern"].numpy()
    if images.shape[1:3] != pattern.shape[:2]:
        raise ConfigError(
            f"the pattern was learnt for images of {pattern.shape[:2]}, these are "
            f"{images.shape[1:3]}"
        )
    return rounded(images.astype(np.float32) + pattern)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="trojan",
    summary="pattern that excites neurons of a net",
    source="NDSS 2018 (TrojanNN)",
    learn=learn,
    fixed=lambda settings: bool(settings.fixed),
)
