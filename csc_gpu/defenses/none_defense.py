"""NONE (Wang et al., NeurIPS 2022, arXiv 2202.06382): training with more confidence.

A backdoor lives in compromised neurons: channels that fire far higher for some rows of a class than
they ever do for rows of the others. After ordinary training the channels of each layer are ranked
by that gap, and the most compromised few reset to zero. Rows that fire them most, by Jenks' natural
breaks in two, are marked and left out, and the net is fine-tuned on the rest, batch norm fixed.

The authors' code says how: a channel's activation is the largest value of its convolution (behind
the batch norm in a shortcut), rows of a class are those with more than .9 of the softmax, others
with less than .1, the gap is max - (mean + 3 deviations), and a row's mark is the sum of its
activations of the one worst channel of every layer. As there, layers of the narrowest width stay. A
reset silences the channel alone, where theirs also cuts what reads it; and training lasts as long
as everybody's (theirs: 200 epochs at .1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from csc_gpu import csc
from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.ranks import Forward
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.features import BATCH
from csc_gpu.models import Net, blocks_of
from csc_gpu.train import Method, constant, cross_entropy
from csc_gpu.types import Array, Corpus, DefenderView, Outcome


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """Which channels are compromised, and the fine-tuning without them."""

    weak: float = 0.1
    """Rows whose softmax of a class is below this are not of that class."""
    strong: float = 0.9
    """Rows above this are."""
    deviations: float = 3.0
    """How many deviations above the mean activations of other classes are still ordinary."""
    most: float = 0.03
    """Share of a layer's channels that is reset, rounded up."""
    epochs: int = 20
    """Passes of the fine-tuning over the rows that are left."""
    lr: float = 1e-4
    """Its learning rate."""
    weight_decay: float = 1e-4
    """Then."""

    def __post_init__(self) -> None:
        require(
            self, "none_defense", "in (0, 1)", lambda share: 0 < share < 1, "weak", "strong", "most"
        )
        require(self, "none_defense", "1 or more", lambda count: count >= 1, "epochs")
        require(self, "none_defense", "above 0", lambda value: 0 < value < math.inf, "lr")
        positive = ("deviations", "weight_decay")
        require(self, "none_defense", "0 or more", lambda value: 0 <= value < math.inf, *positive)


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and what is compromised."""

    none_defense: Neurons = field(default_factory=Neurons)


@dataclass(frozen=True)
class Layer:
    """A convolution and the batch norm behind it: channels that can be reset."""

    convolution: nn.Conv2d
    norm: nn.Module  # with weight and bias, one of each a channel
    watched: nn.Module  # whose output is the activation


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, reset the compromised channels, fine-tune without the rows that fire them most."""
    course = Course(view, settings, backend, **how)
    chosen, xp = settings.none_defense, backend.xp
    blocks_of(course.fresh(), "none-defense")  # before an hour is spent
    model = course.trained()
    cured = copy.deepcopy(model)
    with course.clock("judge"):
        fired, share = activations(cured, view.train, backend)
        fires, count = xp.zeros(len(view.train), dtype=xp.float64), 0
        for layer, values in zip(layers(cured), fired, strict=True):
            gaps = np.asarray(backend.to_numpy(compromise(values, share, chosen, xp)), float)
            worst = np.argsort(-gaps, kind="stable")[: math.ceil(chosen.most * len(gaps))]
            fires += values[:, int(worst[0])]
            reset(layer, worst)
            count += len(worst)
        marks = np.asarray(backend.to_numpy(fires), float)
        suspect = marks > jenks(marks)
    found = verdict(suspect, marks, "none-defense", {"channels_reset": count})
    course.trained(
        "fine-tune",
        model=cured,
        rows=np.flatnonzero(~suspect),
        method=Method(objective=fixed_norms(cured), rate=constant),
        again=2,
        epochs=chosen.epochs,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        min_steps=0,
    )
    return course.outcome(cured, model, found)


def layers(model: Net) -> Iterator[Layer]:
    """The convolutions of all blocks, but for those of the narrowest width.

    Raises ConfigError for a net of other blocks.
    """
    blocks = blocks_of(model, "none-defense")
    narrowest = min(block.conv1.out_channels for block in blocks)
    for block in blocks:
        if block.conv1.out_channels == narrowest:
            continue
        yield Layer(block.conv1, block.norm1, block.conv1)
        yield Layer(block.conv2, block.norm2, block.conv2)
        if isinstance(block.shortcut, nn.Sequential):
            convolution, norm = block.shortcut
            assert isinstance(convolution, nn.Conv2d)
            yield Layer(convolution, norm, block.shortcut)


@torch.inference_mode()
def activations(model: Net, corpus: Corpus, backend: Backend) -> tuple[list[Array], Array]:
    """The largest value of every channel, (N, channels) for each layer, and softmax. (N, C)"""
    model.eval()
    watched, xp = list(layers(model)), backend.xp
    seen: list[Tensor] = [torch.empty(0)] * len(watched)

    def watch(place: int) -> Any:
        def keep(module: nn.Module, given: Any, output: Tensor) -> None:
            seen[place] = output.amax((2, 3))

        return keep

    hooks = [layer.watched.register_forward_hook(watch(i)) for i, layer in enumerate(watched)]
    widths = [layer.convolution.out_channels for layer in watched]
    fired = [xp.empty((len(corpus), width), dtype=xp.float32) for width in widths]
    share = xp.empty((len(corpus), corpus.n_classes), dtype=xp.float32)
    for batch in backend.batches(corpus, BATCH):
        rows = backend.array(batch.rows)
        share[rows] = backend.array(model(batch.images).softmax(1))
        for values, found in zip(fired, seen, strict=True):
            values[rows] = backend.array(found)
    for hook in hooks:
        hook.remove()
    return fired, share


def compromise(values: Array, share: Array, settings: Neurons, xp: Any) -> Array:
    """How far each channel (N, channels) fires for a class beyond what it does for others, at most.

    `share` is the softmax (N, C); a class that no row is sure of counts for nothing. (channels,)
    """
    gaps = [xp.zeros(values.shape[1], dtype=xp.float32)]
    for label in range(share.shape[1]):
        ours = values[xp.flatnonzero(share[:, label] > settings.strong)]
        others = values[xp.flatnonzero(share[:, label] < settings.weak)]
        if len(ours) and len(others):
            usual = others.mean(axis=0) + settings.deviations * others.std(axis=0)
            gaps.append(ours.max(axis=0) - usual)
    return xp.stack(gaps).max(axis=0)


@torch.no_grad()
def reset(layer: Layer, channels: NDArray[np.int64]) -> None:
    """Silence these channels: filter, scale and shift are zero."""
    for weight in (layer.convolution.weight, *layer.norm.parameters()):
        weight[torch.from_numpy(channels).to(weight.device)] = 0.0


def jenks(values: NDArray[np.float64]) -> float:
    """The largest value of the lower of two groups, parted so that both vary least (Jenks)."""
    ordered = np.sort(values)
    low = np.arange(1, len(ordered))
    sums = ordered.cumsum()
    between = sums[:-1] ** 2 / low + (sums[-1] - sums[:-1]) ** 2 / low[::-1]
    return float(ordered[between.argmax()]) if len(low) else float(ordered[-1])


def fixed_norms(model: Net) -> Any:
    """Cross-entropy, with batch norm as in use."""

    def objective(forward: Forward, batch: Batch, step: int) -> Tensor:
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return cross_entropy(forward, batch, step)

    return objective
