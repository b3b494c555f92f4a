"""What a run will take of a device's memory, stage by stage, before any work begins.

The sizes of arrays are exact. What training keeps for its backward pass is counted on a net without
memory (torch's meta device); what libraries take besides is covered by a margin. No GPU has been
compared with it yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from csc_gpu import csc, train
from csc_gpu.backend.gpu import MARGIN, asked_together
from csc_gpu.backend.reader import SHARE_OF_MEMORY
from csc_gpu.backend.workspace import Workspace, needed, workspace
from csc_gpu.errors import DeviceTooSmall
from csc_gpu.features import BATCH
from csc_gpu.models import Net, new_model
from csc_gpu.segregate import looked_at
from csc_gpu.segregate.clusters import BLOCK, least_neighbours

FLOAT, INDEX = 4, 8  # bytes
ESTIMATED = ("activations", "graph")
"""Parts that are no arrays of known size; a run is not refused for them."""


@dataclass(frozen=True)
class Shape:
    """A corpus as far as memory is concerned."""

    rows: int
    height: int  # pixels
    width: int
    classes: int
    held_out: int = 0  # rows that are resident as well


@dataclass(frozen=True)
class Plan:
    """Bytes by stage and purpose, against what there is."""

    shape: Shape
    held: Mapping[str, int]  # from the first stage to the last
    stages: Mapping[str, Mapping[str, int]]  # what each holds besides
    clustering: Workspace | None  # what DBSCAN gets of the rest; None if not even a row fits
    streamed: bool  # the pixels would take too much, so files are read in every epoch
    memory: int

    def peak(self, stage: str) -> int:
        """Bytes in use in a stage."""
        return sum(self.held.values()) + sum(self.stages[stage].values())

    @property
    def largest(self) -> str:
        """The stage that takes most."""
        return max(self.stages, key=self.peak)

    def certain(self, stage: str) -> int:
        """Bytes in use in a stage by arrays alone, without what is estimated."""
        parts = {**self.held, **self.stages[stage]}
        return sum(size for name, size in parts.items() if name not in ESTIMATED)

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return self.clustering is not None and self.peak(self.largest) <= self.memory

    @property
    def cannot_fit(self) -> str:
        """The first stage whose arrays alone are too large; empty if there is none."""
        if self.clustering is None:
            return "cluster"
        return next((s for s in self.stages if self.certain(s) > self.memory), "")


def plan(
    shape: Shape, settings: csc.Settings, memory: int, *, streamed: bool | None = None
) -> Plan:
    """What each stage of csc.defend takes on a device with so many bytes to use.

    settings.train.model must name a net. `streamed` says whether the pixels stay on disk; None: if
    they would take too much, as backend.reader decides for files.
    """
    with torch.device("meta"):
        model = new_model(settings.train.model, shape.classes, shape.height, seed=0)
    pixels = 3 * shape.height * shape.width * (shape.rows + shape.held_out)
    if streamed is None:
        streamed = pixels > SHARE_OF_MEMORY * memory
    held = {
        "pixels": 0 if streamed else pixels,
        "labels and order": 3 * INDEX * shape.rows,
        "weights, gradients, momentum": 3 * _weights(model),
        "libraries": MARGIN,
    }
    stages = _stages(shape, settings, model)
    rest = memory - sum(held.values()) - sum(stages["cluster"].values())
    space = _clustering(shape.rows, _dims(settings, model), rest)
    stages["cluster"]["DBSCAN, at least"] = 1_000_000 * needed(shape.rows, 1, "int32")
    return Plan(shape, held, stages, space, streamed, memory)


def _stages(shape: Shape, settings: csc.Settings, model: Net) -> dict[str, dict[str, int]]:
    """Bytes that each stage holds beside what is always held, without DBSCAN's."""
    n, chosen, d = shape.rows, settings.segregate, model.n_features
    image = FLOAT * 3 * shape.height * shape.width
    watched = sorted(settings.watch.steps(train.budget(n, settings.train)))
    clustered = sum(map(len, looked_at(watched, chosen).values()))
    seen = {
        "clusters of every snapshot and scale": clustered * FLOAT * n,
        "strays of every snapshot": len(watched) * n,
    }
    features = {"features": FLOAT * n * d}
    activations = {"activations": _kept_for_backward(model, settings, shape)}
    dims, k = _dims(settings, model), min(n, least_neighbours(n, chosen))
    asked = min(asked_together(k, dims), chosen.k_rows, n)
    models = {"check's, concealed and recovered model": 5 * _weights(model)}
    recover = {"recover": {**activations, **features, **seen, **models}}
    return (recover if settings.recover.on else {}) | {
        "train": {**activations, **seen, "batch": image * settings.train.batch},
        "verify": {**activations, **features, **seen, "second model": 3 * _weights(model)},
        "features": {
            **features,
            **seen,
            "activations": _widest(model, shape) * FLOAT * BATCH * 3,
            "batch": image * BATCH,
            "which are finite": n * d,
        },
        "cluster": {
            **features,
            **seen,
            "order of its own": 4 * INDEX * n,
            "embedded rows": FLOAT * n * dims,
            "blocks": 3 * FLOAT * min(BLOCK, n) * d,
            "principal components": 4 * INDEX * d**2,
            "neighbours": (2 * FLOAT * dims + INDEX) * k * asked,
        },
        "conceal": {
            **features,
            "second model": _weights(model),
            "schedule": FLOAT * n * settings.conceal.epochs,
            "graph": FLOAT * settings.conceal.batch * (d + 4 * shape.classes) * 4
            + 16 * (shape.classes + 1) * d * FLOAT,
        },
    }


def _clustering(n: int, dims: int, rest: int) -> Workspace | None:
    """What DBSCAN makes of the rest; None if it is too little for a row."""
    try:
        return workspace(n, dims, max(0, rest))
    except DeviceTooSmall:
        return None


def _weights(model: Net) -> int:
    """Bytes of a net's weights and running statistics."""
    numbers: int = sum(value.numel() for value in model.state_dict().values())
    return FLOAT * numbers


def _dims(settings: csc.Settings, model: Net) -> int:
    """Dimensions in which rows are clustered."""
    asked = settings.segregate.pca
    return asked if 0 < asked < model.n_features else model.n_features


REMEDIES = {
    "pixels": "a smaller --set data.size, or an image folder, which can be streamed",
    "embedded rows": "--set segregate.pca=16",
    "weights, gradients, momentum": "--set train.model=resnet8",
    "second model": "--set train.model=resnet8",
}
"""What makes the largest part of a stage smaller."""


def refuse_too_small(found: Plan) -> None:
    """Raises DeviceTooSmall if the arrays of a stage cannot fit: which, and what would help."""
    stage = found.cannot_fit
    if not stage:
        return
    parts = {**found.held, **found.stages[stage]}
    what = max(parts, key=lambda name: parts[name])
    remedy = f"{REMEDIES[what]}, " if what in REMEDIES else ""
    raise DeviceTooSmall(
        f"{stage} needs {gigabytes(found.peak(stage))} of device memory, most of it for {what} "
        f"({gigabytes(parts[what])}), and {gigabytes(found.memory)} can be used; "
        f"try {remedy}fewer rows, a GPU with more memory, or pass --cpu"
    )


def told(found: Plan, model: str) -> list[str]:
    """The plan as lines of text."""
    shape = found.shape
    lines = [
        f"{shape.rows} rows of {shape.classes} classes at {shape.height}x{shape.width}, {model}; "
        f"pixels {'streamed from disk' if found.streamed else 'resident'}",
        f"{'always':10s} {gigabytes(sum(found.held.values())):>10s}   {_parts(found.held)}",
    ]
    lines += [
        f"{stage:10s} {gigabytes(found.peak(stage)):>10s}   {_parts(parts)}"
        for stage, parts in found.stages.items()
    ]
    space = found.clustering
    if space is not None:
        lines.append(
            f"DBSCAN gets {space.mbytes} MB: {math.ceil(shape.rows / space.batch)} batches of "
            f"{space.batch} rows, {space.dtype}, every pair computed {space.passes:.2f} times"
        )
    unsure = "does not fit" if found.cannot_fit else "may not fit, by estimate"
    verdict = "fits" if found.fits else unsure
    lines.append(
        f"{verdict}: {found.largest} takes most, {gigabytes(found.peak(found.largest))} of "
        f"{gigabytes(found.memory)}"
    )
    return lines


def _parts(parts: Mapping[str, int]) -> str:
    large = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in large if size >= 1_000_000)


def gigabytes(size: int) -> str:
    """1e9 bytes, three digits after the point."""
    return f"{size / 1e9:.3f} GB"


def _kept_for_backward(model: Net, settings: csc.Settings, shape: Shape) -> int:
    """Bytes that one training step keeps for its backward pass, and the largest of them again."""
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            found[tensor.untyped_storage()._cdata] = tensor.numel() * tensor.element_size()
        return tensor

    model.train()
    images = torch.empty(settings.train.batch, 3, shape.height, shape.width, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(
            model(images), torch.empty(len(images), dtype=torch.int64, device="meta")
        )
    del loss
    total = sum(found.values()) + 2 * max(found.values())
    return total // 2 if settings.gpu.bf16 else total


def _widest(model: Net, shape: Shape) -> int:
    """Numbers in the largest output of any layer, for one image."""
    sizes: list[int] = []

    def note(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        sizes.append(output.numel())

    hooks = [module.register_forward_hook(note) for module in model.features.modules()]
    model.eval()
    with torch.inference_mode():
        model(torch.empty(1, 3, shape.height, shape.width, device="meta"))
    for hook in hooks:
        hook.remove()
    return max(sizes)
