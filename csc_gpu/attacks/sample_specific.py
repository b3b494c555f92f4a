"""SSBA, also ISSBA (Li et al. 2021, arXiv 2012.03816): a faint residual, different on every image.

    x' = clip(x + E(x, s))

An encoder E hides the bits s in an image so that a decoder reads them again, in the manner of
StegaStamp (Tancik et al. 2020, arXiv 1904.05343): both are trained here on the corpus, with new
bits for every image; poison then hides the same secret bits in all images. |E| is bounded, and its
square weighs more where the image is flat, as the eye has it; so what is hidden follows the image.
StegaStamp's perceptual and critic losses and its distortions are left out, but for rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from csc_gpu.attacks import learnt
from csc_gpu.attacks.attack import Attack, Learned, Pixels, Tensors
from csc_gpu.attacks.nets import Painter, Reader
from csc_gpu.backend import Backend
from csc_gpu.config import require
from csc_gpu.types import Corpus, Log

TRIED = 512
"""Images on which the bits are read at last, at most."""
SHEET = 8
"""The bits are laid out on a plane of so many places up and across, then stretched."""
FLAT = 0.25
"""Contrast, in the net's units, at which a residual costs half of what it costs on flat places."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is hidden, how strongly, and how the nets are trained."""

    bits: int = 20
    """Length of the secret."""
    strength: float = 24.0
    """Largest change of a pixel, in grey levels of 0..255."""
    faint: float = 4.0
    """Weight of the residual's square against reading the bits. It counts as far as they are read:
    from the start it would silence the encoder before the decoder has heard anything."""
    width: int = 16
    """Channels of the first layer of both nets."""
    train_steps: int = 600
    """Optimiser steps, rounded up to whole epochs."""
    batch: int = 64
    """Images in one step."""
    lr: float = 2e-3
    """Peak learning rate."""

    def __post_init__(self) -> None:
        counts = ("bits", "train_steps", "batch")
        require(self, "attack", "1 or more", lambda count: count >= 1, *counts)
        groups = "a multiple of 4, above 0"
        require(self, "attack", groups, lambda count: count > 0 and count % 4 == 0, "width")
        require(self, "attack", "in (0, 255]", lambda grey: 0 < grey <= 255, "strength")
        require(self, "attack", "0 or more", lambda weight: weight >= 0, "faint")
        require(self, "attack", "above 0", lambda value: value > 0, "lr")


class Encoder(nn.Module):
    """Hides bits. Images are as a classifier sees them, (pixel / 255 - .5) / .25."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.lay_out = nn.Linear(settings.bits, 3 * SHEET * SHEET)
        self.painter = Painter(6, 3, settings.width, shortcuts=True)
        self.reach = settings.strength / 63.75

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        """The residual for images and bits (B, bits) of 0 and 1. (B, 3, H, W)"""
        sheet = self.lay_out(2 * bits - 1).view(-1, 3, SHEET, SHEET)
        sheet = functional.interpolate(sheet, size=images.shape[-2:], mode="nearest")
        painted = self.painter(torch.cat((images, sheet), 1)).float()
        return self.reach * torch.tanh(painted)


def learn(
    corpus: Corpus, target: int, settings: Settings, backend: Backend, seed: int, log: Log
) -> Tensors:
    """The weights by the names encoder and reader; secret (bits,) uint8."""
    del target  # the secret stands for it
    both = built(settings, seed).to(backend.device)
    encoder, reader = both
    adam = torch.optim.Adam(both.parameters(), lr=settings.lr)
    chance = torch.Generator().manual_seed(learnt.derived(seed, learnt.CHANCE))

    def step(images: Tensor, labels: Tensor, share: float) -> Tensor:
        del labels
        bits = torch.randint(0, 2, (len(images), settings.bits), generator=chance).float()
        bits = bits.to(images.device)
        noise = (torch.rand(images.shape, generator=chance) - 0.5) / 63.75  # of rounding
        with backend.precision():
            residual = encoder(images, bits)
            stamped = (images + residual).clamp(-2, 2) + noise.to(images.device)
            read = functional.binary_cross_entropy_with_logits(reader(stamped), bits)
            heard = (1 - read.detach() / math.log(2)).clamp(min=0)  # 0 while the bits are guessed
            loss = read + settings.faint * heard * to_the_eye(images, residual)
        for group in adam.param_groups:
            group["lr"] = settings.lr * share
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        return loss.detach()

    learnt.practise(
        step,
        corpus,
        steps=settings.train_steps,
        batch=settings.batch,
        backend=backend,
        seed=seed,
        stage="encoder",
        log=log,
    )
    drawn = np.random.default_rng(learnt.derived(seed, learnt.SECRET))
    secret = torch.from_numpy(drawn.integers(0, 2, settings.bits, np.uint8))
    tensors = learnt.packed({"encoder": encoder, "reader": reader}) | {"secret": secret}
    trigger = Learned(settings, tensors, 0)
    rows = drawn.choice(len(corpus), min(TRIED, len(corpus)), replace=False)
    tried: Pixels = np.ascontiguousarray(corpus.images[rows])
    found = hidden(stamp(tried, trigger, drawn), trigger)
    log("learnt", bits_right=float((found == secret.numpy()).mean()))
    return tensors


def to_the_eye(images: Tensor, residual: Tensor) -> Tensor:
    """The residual's mean square, flat places weighing more. ()"""
    mean = functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    square = functional.avg_pool2d(images.square(), 3, 1, 1, count_include_pad=False)
    contrast = (square - mean.square()).clamp(min=0).sqrt()
    return (residual.square() * FLAT / (FLAT + contrast)).mean()


def built(settings: Settings, seed: int) -> nn.ModuleList:
    """Encoder and reader, freshly initialised."""

    def both() -> nn.ModuleList:
        return nn.ModuleList((Encoder(settings), Reader(settings.bits, settings.width)))

    return learnt.initialised(both, seed)


@torch.inference_mode()
def stamp(images: Pixels, trigger: Learned, rng: np.random.Generator) -> Pixels:
    """Hide the secret in every image. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    encoder = learnt.unpacked(built(trigger.settings, 0)[0], trigger.tensors, "encoder")
    secret = trigger.tensors["secret"].float()
    out = np.empty_like(images)
    for part in learnt.in_parts(len(images)):
        x = learnt.seen(images[part])
        out[part] = learnt.shown(x + encoder(x, secret.expand(len(x), -1)))
    return out


@torch.inference_mode()
def hidden(images: Pixels, trigger: Learned) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """The bits that the decoder reads in images (B, H, W, 3). (B, bits) bool"""
    reader = learnt.unpacked(built(trigger.settings, 0)[1], trigger.tensors, "reader")
    out = np.empty((len(images), trigger.settings.bits), bool)
    for part in learnt.in_parts(len(images)):
        out[part] = (reader(learnt.seen(images[part])) > 0).numpy()
    return out


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="encoder",
    summary="secret bits hidden in each image",
    source="arXiv 2012.03816",
    learn=learn,
)
