"""Input-aware dynamic backdoor (Nguyen and Tran 2020, arXiv 2010.08138): a pattern for each image.

    x' = x + M(x) (G(x) - x)

G paints a pattern from the image, M says where it goes; both are nets trained here. First M alone:
masks of different images are to differ, and to take a small share of the image. Then G with a
throw-away classifier that sends stamped images to the target, and to their own class the images
stamped with the pattern of another ("cross", the covers): a pattern works on its own image alone.
The official run trains for hundreds of epochs and keeps the classifier; here G and M are frozen
after a few and poison is stamped once and for all, as Confusion Training does. `dynamic` is its
form: no covers among the poison.

Against the official recipe: Adam for G and M, a one-cycle rate instead of steps, normalisation of
each image by itself, larger shares of a batch, since there are fewer batches; 16 to 64 channels in
both nets instead of 32 to 128; and 1e-3 instead of 1e-7 beside the distance of two patterns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from csc_gpu.attacks import learnt
from csc_gpu.attacks.attack import Attack, Learned, Pixels, Tensors, anyone, with_covers
from csc_gpu.attacks.nets import Painter
from csc_gpu.backend import Backend
from csc_gpu.config import require
from csc_gpu.models import MODELS, new_model
from csc_gpu.types import Corpus, Log

DONORS = 16
"""Images of the corpus that are kept, for a cover that is stamped alone."""
PEAK, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
"""The classifier's SGD, as in csc_gpu.train."""
TRIED = 512
"""Images on which the classifier is asked at last, at most."""
LEAST = 1e-3
"""Added to the distance of two patterns, so that equal ones do not break the loss."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The two nets and how they are trained."""

    density: float = 0.032
    """Share of the image that a mask may take freely."""
    thrift: float = 100.0
    """Weight of what a mask takes beyond that."""
    diversity: float = 1.0
    """Weight of patterns being as different as their images."""
    share: float = 0.15
    """Share of a batch that is stamped with its own pattern, and as much with another's."""
    width: int = 16
    """Channels of the first layer of G and M."""
    mask_steps: int = 200
    """Optimiser steps of M, rounded up to whole epochs."""
    train_steps: int = 600
    """Optimiser steps of G and the classifier, likewise."""
    batch: int = 128
    """Images in one step."""
    lr: float = 2e-3
    """Peak learning rate of G and M."""
    model: str = "resnet8"
    """The throw-away classifier: resnet8 or resnet18."""

    def __post_init__(self) -> None:
        require(self, "attack", f"one of {', '.join(MODELS)}", MODELS.__contains__, "model")
        counts = ("mask_steps", "train_steps")
        require(self, "attack", "1 or more", lambda count: count >= 1, *counts)
        require(self, "attack", "4 or more", lambda count: count >= 4, "batch")
        groups = "a multiple of 4, above 0"
        require(self, "attack", groups, lambda count: count > 0 and count % 4 == 0, "width")
        require(self, "attack", "in (0, 1)", lambda share: 0 < share < 1, "density")
        require(self, "attack", "in (0, .5]", lambda share: 0 < share <= 0.5, "share")
        require(self, "attack", "0 or more", lambda weight: weight >= 0, "thrift", "diversity")
        require(self, "attack", "above 0", lambda value: value > 0, "lr")


@dataclass(frozen=True, kw_only=True)
class WithCovers(Settings):
    """The same, with covers among the poison."""

    cover: float = 1.0
    """Images stamped with the pattern of another that keep their label, for each poisoned one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "attack", "0 or more", lambda ratio: ratio >= 0, "cover")


@dataclass(frozen=True)
class Nets:
    """G and M. Images and patterns are as a classifier sees them, (pixel / 255 - .5) / .25."""

    painter: Painter
    placer: Painter

    def pattern(self, images: Tensor) -> Tensor:
        """G: (B, 3, H, W) -> (B, 3, H, W), in [-2, 2]"""
        return 2 * torch.tanh(self.painter(images).float())

    def mask(self, images: Tensor) -> Tensor:
        """M: (B, 3, H, W) -> (B, 1, H, W), nearly 0 or nearly 1"""
        soft = torch.tanh(self.placer(images).float()) / 2 + 0.5
        return torch.tanh(20 * soft - 10) / 2 + 0.5

    def stamped(self, images: Tensor, others: Tensor) -> Tensor:
        """The images with the patterns of the others (or of themselves). (B, 3, H, W)"""
        return images + self.mask(others) * (self.pattern(others) - images)


def learn(
    corpus: Corpus, target: int, settings: Settings, backend: Backend, seed: int, log: Log
) -> Tensors:
    """The weights of both nets, by the names painter and placer; donors (n, H, W, 3) uint8."""
    nets = built(settings, seed, backend.device)
    _learn_masks(nets, corpus, settings, backend, seed, log)
    _learn_patterns(nets, corpus, target, settings, backend, seed, log)
    rng = np.random.default_rng(learnt.derived(seed, learnt.CHANCE))
    rows = rng.choice(len(corpus), min(DONORS, len(corpus)), replace=False)
    donors = torch.from_numpy(np.ascontiguousarray(corpus.images[rows]))
    return learnt.packed({"painter": nets.painter, "placer": nets.placer}) | {"donors": donors}


def built(settings: Settings, seed: int, device: torch.device) -> Nets:
    """Both nets, freshly initialised."""

    def both() -> torch.nn.ModuleList:
        makes = (3, 1)
        return torch.nn.ModuleList(
            Painter(3, n_out, settings.width, shortcuts=False) for n_out in makes
        )

    painter, placer = learnt.initialised(both, seed).to(device)
    assert isinstance(painter, Painter) and isinstance(placer, Painter)
    return Nets(painter, placer)


def _learn_masks(
    nets: Nets, corpus: Corpus, settings: Settings, backend: Backend, seed: int, log: Log
) -> None:
    adam = torch.optim.Adam(nets.placer.parameters(), lr=settings.lr)

    def step(images: Tensor, labels: Tensor, share: float) -> Tensor:
        del labels
        with backend.precision():
            masks = nets.mask(images)
        beyond = functional.relu(masks - settings.density).mean()
        differ = alike(images, images.roll(1, 0), masks, masks.roll(1, 0))
        return _improved(
            settings.thrift * beyond + settings.diversity * differ, adam, settings.lr * share
        )

    learnt.practise(
        step,
        corpus,
        steps=settings.mask_steps,
        batch=settings.batch,
        backend=backend,
        seed=seed,
        stage="masks",
        log=log,
    )
    learnt.frozen(nets.placer)


def _learn_patterns(
    nets: Nets,
    corpus: Corpus,
    target: int,
    settings: Settings,
    backend: Backend,
    seed: int,
    log: Log,
) -> None:
    start = learnt.derived(seed, learnt.SURROGATE)
    net = new_model(settings.model, corpus.n_classes, corpus.image_size[0], seed=start)
    net.to(backend.device)
    sgd = torch.optim.SGD(
        net.parameters(), lr=PEAK, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    adam = torch.optim.Adam(nets.painter.parameters(), lr=settings.lr)

    def step(images: Tensor, labels: Tensor, share: float) -> Tensor:
        count = max(1, int(settings.share * len(images)))
        mine, crossed = images[:count], images[count : 2 * count]
        others = images.roll(1, 0)[count : 2 * count]  # of each crossed image the one before it
        wanted = labels.clone()
        wanted[:count] = target
        with backend.precision():
            patterns = nets.pattern(mine), nets.pattern(others)
            stamped = (
                mine + nets.mask(mine) * (patterns[0] - mine),
                crossed + nets.mask(others) * (patterns[1] - crossed),
                images[2 * count :],
            )
            whole = torch.cat(stamped).contiguous(memory_format=torch.channels_last)
            right = functional.cross_entropy(net(whole), wanted)
        differ = alike(mine, others, *patterns)
        for group in sgd.param_groups:
            group["lr"] = PEAK * share
        sgd.zero_grad()
        loss = _improved(right + settings.diversity * differ, adam, settings.lr * share)
        sgd.step()
        return loss

    net.train()
    learnt.practise(
        step,
        corpus,
        steps=settings.train_steps,
        batch=settings.batch,
        backend=backend,
        seed=seed + 1,
        stage="patterns",
        log=log,
    )
    learnt.frozen(nets.painter)
    learnt.frozen(net)
    images = learnt.some(corpus, TRIED, backend, seed)
    with torch.inference_mode():
        own = net(nets.stamped(images, images)).argmax(1)
        crossed = net(nets.stamped(images, images.roll(1, 0))).argmax(1)
        masked = nets.mask(images).mean().item()
    hit, crossed_hit = ((found == target).float().mean().item() for found in (own, crossed))
    log("learnt", hit=hit, crossed_hit=crossed_hit, masked=masked)


def alike(one: Tensor, other: Tensor, from_one: Tensor, from_other: Tensor) -> Tensor:
    """How much nearer what is made of images is to each other than the images are, on average."""
    apart = _distance(one, other) / (_distance(from_one, from_other) + LEAST)
    return apart.mean()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square difference of images. (B,)"""
    square = (one.float() - other.float()).square().mean(dim=(1, 2, 3))
    return (square + LEAST**2).sqrt()  # the slope of the root at 0 is infinite


def _improved(loss: Tensor, adam: torch.optim.Adam, lr: float) -> Tensor:
    for group in adam.param_groups:
        group["lr"] = lr
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()
    return loss.detach()


# --- stamping -----------------------------------------------------------------------------------


def stamp(images: Pixels, trigger: Learned, rng: np.random.Generator) -> Pixels:
    """Each image with its own pattern. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return patterned(images, images, trigger)


def cross(images: Pixels, trigger: Learned, rng: np.random.Generator) -> Pixels:
    """Each image with the pattern of another one of them. (B, H, W, 3) -> (B, H, W, 3)"""
    if len(images) == 1:
        donors: Pixels = trigger.tensors["donors"].numpy()
        others = donors[(donors != images).any(axis=(1, 2, 3))][:1]
        return patterned(images, others, trigger) if len(others) else images.copy()
    order = rng.permutation(len(images))
    others = np.empty_like(images)
    others[order] = images[np.roll(order, 1)]
    return patterned(images, others, trigger)


@torch.inference_mode()
def patterned(images: Pixels, others: Pixels, trigger: Learned) -> Pixels:
    """The images with the patterns of the others. (B, H, W, 3) -> (B, H, W, 3)"""
    nets = revived(trigger)
    out = np.empty_like(images)
    for part in learnt.in_parts(len(images)):
        x, y = learnt.seen(images[part]), learnt.seen(others[part])
        out[part] = learnt.shown(nets.stamped(x, y))
    return out


def revived(trigger: Learned) -> Nets:
    """The nets that were learnt, on the CPU, eval mode."""
    nets = built(trigger.settings, 0, torch.device("cpu"))
    return Nets(
        learnt.unpacked(nets.painter, trigger.tensors, "painter"),
        learnt.unpacked(nets.placer, trigger.tensors, "placer"),
    )


ATTACK = Attack(
    settings=WithCovers,
    stamp=stamp,
    cover=cross,
    labels="dirty",
    family="generator",
    summary="a painted pattern for each image, with covers",
    source="arXiv 2010.08138",
    whom=with_covers,
    learn=learn,
)
DYNAMIC = replace(
    ATTACK,
    settings=Settings,
    cover=None,
    whom=anyone,
    summary="a painted pattern for each image, without covers",
)
