"""Somebody else's net as one of ours: an extractor, and the last linear layer as its head.

`timm:NAME` and `torchvision:NAME` build an untrained net of that library; weights come from a file
of the user's (train.init), never by download and never by pickle. `split` takes any module whose
last step is a linear layer. Their nets see images scaled as their library does it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.models import Net

LIBRARIES = ("timm", "torchvision")
"""Whose nets can be named, as timm:resnet18."""
EPOCHS = 100
"""Passes over the corpus for such a net, if train.epochs is 0; a trained start needs fewer."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of each colour, 0..1, as torchvision's nets are fed."""
UNSCALED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""Images as torchvision's ToTensor gives them, 0..1."""
Scale = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each colour, 0..1."""


class Borrowed(nn.Module):
    """An extractor that sees our images as it is used to: (x - mean) / std, of x in 0..1."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, scale: Scale) -> None:
        super().__init__()
        self.body = body
        for name, values in zip(("mean", "std"), scale, strict=True):
            # not persistent, so that the weights are the library's alone
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), (pixel / 255 - .5) / .25 -> (B, D)"""
        points: Tensor = self.body(((images * 0.25 + 0.5) - self.mean) / self.std)
        return points


def split(model: nn.Module, head: str, scale: Scale = UNSCALED) -> Net:
    """A copy of somebody's model as a Net; `head` names its last linear layer, as `fc`.

    Raises ConfigError if the model has no such layer.
    """
    last = head_of(model, head)
    body = copy.deepcopy(model)
    body.set_submodule(head, nn.Identity())
    net = Net(Borrowed(body, scale), last.in_features, last.out_features)
    net.head = copy.deepcopy(last)
    return net


def head_of(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name; raises ConfigError with those there are."""
    layers = linear_layers(model)
    if name not in layers:
        there = ", ".join(layers) or "none"
        raise ConfigError(f"the model has no linear layer {name!r}; there are: {there}")
    return layers[name]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer inside a model by its name, the last one last."""
    named = model.named_modules()
    return {name: layer for name, layer in named if name and isinstance(layer, nn.Linear)}


def build(name: str, n_outputs: int, size: int) -> Net:
    """An untrained net of a library, `timm:NAME` or `torchvision:NAME`, for images of this height.

    Raises ConfigError if the library is not there, has no such net, or it cannot take the images.
    """
    library, _, model = name.partition(":")
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"train.model={name} needs {library}, which is not installed: pip install {library}"
        )
    try:
        body, scale = _timm(model) if library == "timm" else _torchvision(model)
    except (RuntimeError, ValueError, KeyError) as fault:
        said = " ".join(str(fault).split())
        raise ConfigError(f"{library} builds no net {model!r}: {said}") from fault
    features = Borrowed(body, scale)
    return Net(features, _width(features, name, size), n_outputs)


def _timm(name: str) -> tuple[nn.Module, Scale]:
    timm = importlib.import_module("timm")
    body: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    told = getattr(body, "pretrained_cfg", {})
    mean, std = told.get("mean", IMAGENET[0]), told.get("std", IMAGENET[1])
    return body, (tuple(mean), tuple(std))


def _torchvision(name: str) -> tuple[nn.Module, Scale]:
    models = importlib.import_module("torchvision.models")
    body: nn.Module = models.get_model(name, weights=None)
    layers = linear_layers(body)
    if not layers or getattr(body, "aux_logits", False):
        raise ConfigError(f"torchvision:{name} does not end in one linear layer; take another net")
    body.set_submodule(list(layers)[-1], nn.Identity())
    return body, IMAGENET


@torch.no_grad()
def _width(features: nn.Module, name: str, size: int) -> int:
    """How many features an image gets."""
    try:
        points = features.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as fault:
        said = " ".join(str(fault).split())[:160]
        raise ConfigError(
            f"{name} does not take images of {size}x{size} pixels ({said}); see data.size"
        ) from fault
    if points.ndim != 2:
        raise ConfigError(f"{name} gives features of shape {tuple(points.shape)}, not (B, D)")
    features.train()
    return int(points.shape[1])


def start_from(net: Net, path: Path) -> None:
    """Put weights from a safetensors file into a net: ours, or the library's own for its nets.

    A head of as many outputs is taken, too, another left as it is. Raises CorpusError for a file
    that cannot be read, or whose extractor is another.
    """
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise CorpusError(f"cannot read the weights {path} (safetensors): {fault}") from fault
    ours = net.state_dict()
    prefixes = ("", "features.", "features.body.")
    prefix = max(prefixes, key=lambda before: sum(before + name in ours for name in given))
    placed = {prefix + name: value for name, value in given.items()}
    heads = {name for name in ours if name.startswith("head.")}
    for name in sorted(ours.keys() - heads - placed.keys()):
        if not name.endswith("num_batches_tracked"):
            raise CorpusError(f"{path} does not fit the net: it lacks {name.removeprefix(prefix)}")
    same = {name for name in ours.keys() & placed.keys() if ours[name].shape == placed[name].shape}
    for name in sorted((ours.keys() & placed.keys()) - same - heads):
        raise CorpusError(
            f"{path} does not fit the net: {name.removeprefix(prefix)} has shape "
            f"{tuple(placed[name].shape)} there, {tuple(ours[name].shape)} here"
        )
    strange = {name.rpartition(".")[0] for name in placed.keys() - ours.keys()}
    if len(strange) > 1:  # one is the classifier that the file's own net ended in
        raise CorpusError(
            f"{path} does not fit the net: it also holds {', '.join(sorted(strange)[:3])}"
        )
    if not heads <= same:
        same -= heads
    net.load_state_dict({name: placed[name] for name in same}, strict=False)
