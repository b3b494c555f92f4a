"""The classifiers, each split in .features (the extractor) and .head (the last linear layer).

`resnet18` is He et al. 2016 (arXiv 1512.03385) with its usual stem for large images and a 3x3 one
up to 64 px, 512 features. `resnet8` is a small net of the same blocks for the CPU, 128 features.
`-group` behind a name stands for group norm (Wu and He 2018, arXiv 1803.08494) instead of batch
norm: an image is normalised by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from csc_gpu.errors import ConfigError

SMALL_IMAGE = 64
"""Up to this height ResNet-18 takes the 3x3 stem without pooling, in pixels."""
GROUP = 16
"""Channels that group norm takes together."""
WITH_GROUPS = "-group"


class Net(nn.Module):
    """An extractor and a linear head: images (B, 3, H, W) -> features (B, D) -> logits (B, C)."""

    def __init__(self, features: nn.Module, n_features: int, n_outputs: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(n_features, n_outputs)
        self.name = ""  # in MODELS

    @property
    def n_features(self) -> int:
        """D"""
        return self.head.in_features

    @property
    def n_outputs(self) -> int:
        """C, or C + 1 with a virtual class"""
        return self.head.out_features

    def layer(self, name: str) -> nn.Module:
        """A module of the extractor by its name there; raises ConfigError with those there are."""
        inside = getattr(self.features, "body", self.features)
        found: dict[str, nn.Module] = dict(inside.named_modules())
        if not name or name not in found:
            some = ", ".join(name for name, _ in inside.named_children())
            raise ConfigError(f"the extractor has no layer {name!r}; there are {some}, ...")
        return found[name]

    def forward(self, images: Tensor) -> Tensor:
        """Logits. (B, C)"""
        logits: Tensor = self.head(self.features(images))
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H / stride, W / stride)"""
        inner = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(images))


def resnet8(n_outputs: int, size: int) -> Net:
    """A stem with pooling, and three blocks of 32, 64 and 128 channels."""
    del size  # the same at any size: the last step is a global mean
    # Pooling, not stride, halves the image first: with a stride the 3x3 patch of BadNets, once
    # shifted, is not learnt within ten epochs of 10,000 images; with pooling it is after four.
    stem = [*_stem3x3(16), nn.MaxPool2d(2)]
    return Net(nn.Sequential(*stem, *_blocks((16, 32, 64, 128), (1, 2, 2))), 128, n_outputs)


def resnet18(n_outputs: int, size: int) -> Net:
    """ResNet-18; images above 64 px take the 7x7 stem with pooling."""
    stem = _stem3x3(64) if size <= SMALL_IMAGE else _stem7x7(64)
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    body = _blocks(widths, (1, 1, 2, 1, 2, 1, 2, 1))
    return Net(nn.Sequential(*stem, *body), 512, n_outputs)


@dataclass(frozen=True)
class Entry:
    """A net and the training budget that goes with it."""

    build: Callable[[int, int], Net]  # (outputs, image height in pixels) -> Net
    epochs: int  # passes over the corpus, if train.epochs is 0


def grouped(build: Callable[[int, int], Net]) -> Callable[[int, int], Net]:
    """The same net with group norm for batch norm."""

    def built(n_outputs: int, size: int) -> Net:
        net = build(n_outputs, size)
        for part in list(net.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    width = child.num_features
                    setattr(part, name, nn.GroupNorm(max(1, width // GROUP), width))
        return net

    return built


def with_group_norm(name: str) -> str:
    """The name of the net with group norm; its own, if it has that already.

    Raises ConfigError if there is no such net.
    """
    grouped_name = name.removesuffix(WITH_GROUPS) + WITH_GROUPS
    if grouped_name not in MODELS:
        raise ConfigError(f"there is no {name!r} with group norm; set train.model to resnet18")
    return grouped_name


def blocks_of(model: Net, whose: str) -> list[Block]:
    """The blocks of one of our nets, in order; raises ConfigError for a net of a library."""
    found = [part for part in model.features.modules() if isinstance(part, Block)]
    if not found:
        raise ConfigError(f"{whose} looks into the blocks of resnet8 or resnet18: set train.model")
    return found


MODELS: dict[str, Entry] = {
    "resnet8": Entry(resnet8, epochs=10),
    "resnet18": Entry(resnet18, epochs=100),
    "resnet8-group": Entry(grouped(resnet8), epochs=10),
    "resnet18-group": Entry(grouped(resnet18), epochs=100),
}


KNOWN = ", ".join((*MODELS, "timm:NAME", "torchvision:NAME"))
"""What may stand for a model, in words."""


def new_model(name: str, n_outputs: int, size: int, *, seed: int) -> Net:
    """A freshly initialised net, channels last. The same seed gives the same weights."""
    chosen = entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = chosen.build(n_outputs, size)
    model.name = name
    return model.to(memory_format=torch.channels_last)


def is_known(name: str) -> bool:
    """Whether a net may have this name; of a library's it is not looked up."""
    from csc_gpu import borrowed  # late, for it makes nets of ours

    library, colon, _ = name.partition(":")
    return name in MODELS or bool(colon and library in borrowed.LIBRARIES)


def entry(name: str) -> Entry:
    """The net of this name: one of MODELS, or timm:NAME or torchvision:NAME."""
    from csc_gpu import borrowed

    if not is_known(name):
        raise ConfigError(f"unknown model {name!r}; there are {KNOWN}")
    return MODELS.get(name) or Entry(partial(borrowed.build, name), borrowed.EPOCHS)


def _stem3x3(width: int) -> list[nn.Module]:
    return [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def _stem7x7(width: int) -> list[nn.Module]:
    conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]


def _blocks(widths: tuple[int, ...], strides: tuple[int, ...]) -> list[nn.Module]:
    steps = zip(widths[:-1], widths[1:], strides, strict=True)
    blocks = [Block(n_in, n_out, stride) for n_in, n_out, stride in steps]
    return [*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
