"""Label-consistent (Turner et al. 2019, arXiv 1912.02771): images made hard to learn, then patched.

Images of the target class are pushed away from it by projected gradient descent (Madry et al. 2018,
arXiv 1706.06083; L-infinity) on a surrogate that is trained here on the clean corpus, so that the
patch in the four corners is the easier thing to learn. The labels stay true. Held-out images get
the patch alone. The patch is that of Fight-Poison-With-Poison's `badnet_patch4_dup_32.png`.

The surrogate is trained plainly, as in D-ST; the authors and BackdoorBench train it against
perturbed images, after which the same bound changes what an image looks like more. Ours takes 20
steps of 1.5 within 8 grey levels, BackdoorBench 100 of the same, D-ST 4 of 2; Fight-Poison takes
images of the authors', `two_600`, which were moved by 600 in L2 instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from csc_gpu.attacks import learnt
from csc_gpu.attacks.attack import Attack, Learned, Pixels, Tensors
from csc_gpu.attacks.badnets import PATTERN
from csc_gpu.attacks.pictures import rounded
from csc_gpu.backend import Backend
from csc_gpu.config import require
from csc_gpu.errors import ConfigError
from csc_gpu.models import MODELS, Net, new_model
from csc_gpu.types import Corpus, Log


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The perturbation, the patches and the surrogate."""

    eps: float = 8.0
    """Largest change of a pixel by the perturbation, in grey levels of 0..255."""
    step: float = 1.5
    """Length of one step, in grey levels."""
    steps: int = 20
    """Steps of the perturbation."""
    amplitude: float = 255.0
    """What the patches add to their white pixels and take from their black ones, in grey levels;
    255 replaces the image there."""
    cell: int = 1
    """Side of one square of a patch's checkerboard, in pixels."""
    model: str = "resnet8"
    """The surrogate: resnet8 or resnet18."""
    train_steps: int = 600
    """Its optimiser steps, rounded up to whole epochs."""

    def __post_init__(self) -> None:
        require(self, "attack", f"one of {', '.join(MODELS)}", MODELS.__contains__, "model")
        counts = ("steps", "cell", "train_steps")
        require(self, "attack", "1 or more", lambda count: count >= 1, *counts)
        require(self, "attack", "in [1, 255]", lambda grey: 1 <= grey <= 255, "eps", "amplitude")
        require(self, "attack", "above 0", lambda grey: grey > 0, "step")


def learn(
    corpus: Corpus, target: int, settings: Settings, backend: Backend, seed: int, log: Log
) -> Tensors:
    """The weights of the surrogate, by the name surrogate."""
    del target
    net = learnt.surrogate(corpus, settings.model, settings.train_steps, backend, seed, log)
    return learnt.packed({"surrogate": net})


def stamp(images: Pixels, trigger: Learned, rng: np.random.Generator) -> Pixels:
    """Push the images away from the target class, then patch them. (B, H, W, 3)"""
    net = surrogate(trigger, images.shape[1])
    out = np.empty_like(images)
    for part in learnt.in_parts(len(images)):
        out[part] = pushed(net, images[part], trigger.target, trigger.settings)
    return patched(out, trigger, rng)


def pushed(net: Net, images: Pixels, label: int, settings: Settings) -> Pixels:
    """The images, changed by eps at most so that the net finds the label unlikely. (B, H, W, 3)"""
    x = learnt.seen(images)
    bound, step = settings.eps / 63.75, settings.step / 63.75
    labels = torch.full((len(x),), label)
    changed = x.clone()
    for _ in range(settings.steps):
        changed.requires_grad_(True)
        loss = functional.cross_entropy(
            net(changed.contiguous(memory_format=torch.channels_last)), labels, reduction="sum"
        )
        (slope,) = torch.autograd.grad(loss, changed)
        changed = changed.detach() + step * slope.sign()
        changed = torch.clamp(changed, x - bound, x + bound).clamp(-2, 2)
    most = int(settings.eps)  # whole grey levels: rounding must not go past the bound
    change = learnt.shown(changed).astype(np.int16) - images
    return rounded((images + change.clip(-most, most)).astype(np.float32))


def patched(images: Pixels, trigger: Learned, rng: np.random.Generator) -> Pixels:
    """The checkerboard in all four corners. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    settings: Settings = trigger.settings
    sign = np.kron(PATTERN.astype(np.float32) / 127.5 - 1, np.ones((settings.cell, settings.cell)))
    side, size = len(sign), images.shape[1:3]
    if 2 * side > min(size):
        raise ConfigError(
            f"patches of {side} pixels in four corners do not fit on images of {size}"
        )
    change = np.zeros((*size, 1), np.float32)
    for rows in (slice(0, side), slice(-side, None)):
        for columns in (slice(0, side), slice(-side, None)):
            change[rows, columns, 0] = settings.amplitude * sign
    return rounded(images.astype(np.float32) + change)


def surrogate(trigger: Learned, height: int) -> Net:
    """The classifier that was trained, on the CPU, eval mode."""
    n_outputs = len(trigger.tensors["surrogate.head.bias"])
    net = new_model(trigger.settings.model, n_outputs, height, seed=0)
    return learnt.unpacked(net, trigger.tensors, "surrogate")


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    test=patched,
    labels="clean",
    family="adversarial",
    summary="perturbed target class, four corner patches",
    source="arXiv 1912.02771",
    learn=learn,
)
