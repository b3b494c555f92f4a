"""What a run will take of a machine's memory, stage by stage, before any work begins.

The sizes of arrays are exact. What training keeps for its backward pass is counted on a net without
memory (torch's meta device). What libraries take besides is covered by a margin on a GPU, by what
the process has already on a CPU; there scikit-learn lists the neighbours of all rows at once, and
how many they are is a guess. No GPU has been compared with it yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from csc_gpu import csc, train
from csc_gpu.backend.gpu import MARGIN, asked_together
from csc_gpu.backend.reader import SHARE_OF_MEMORY
from csc_gpu.backend.workspace import Workspace, needed, workspace
from csc_gpu.errors import DeviceTooSmall
from csc_gpu.features import BATCH, CHECKED, NUMBERS, width
from csc_gpu.models import Net, new_model
from csc_gpu.segregate import looked_at
from csc_gpu.segregate.clusters import BLOCK, least_neighbours
from csc_gpu.segregate.sample import AT_A_TIME

HALF, FLOAT, INDEX = 2, 4, 8  # bytes
AT_WORK = 400_000_000
"""Bytes that libraries take on a CPU once they work, beside what they have at the start (measured:
300 MB in a run on digits)."""
BYTES_A_PAIR = 17
"""Of scikit-learn's DBSCAN for each neighbour of each row (measured: 2.1 times its index)."""
NEIGHBOURS = 8
"""Neighbours within the coarsest radius, on average, in units of min_samples (digits: 7.9)."""
ESTIMATED = ("activations", "graph", "lists of neighbours")
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
    clustering: Workspace | None  # what a GPU's DBSCAN gets of the rest; None: not even a row fits
    streamed: bool  # the pixels would take too much, so files are read in every epoch
    memory: int
    machine: str = "gpu"  # or cpu, where DBSCAN takes what it takes

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
        return not self._is_crowded and self.peak(self.largest) <= self.memory

    @property
    def _is_crowded(self) -> bool:
        return self.machine == "gpu" and self.clustering is None

    @property
    def cannot_fit(self) -> str:
        """The first stage whose arrays alone are too large; empty if there is none."""
        if self._is_crowded:
            return "cluster"
        return next((s for s in self.stages if self.certain(s) > self.memory), "")


def plan(
    shape: Shape,
    settings: csc.Settings,
    memory: int,
    *,
    streamed: bool | None = None,
    machine: str = "gpu",
    libraries: int = MARGIN,
) -> Plan:
    """What each stage of csc.defend takes on a "gpu" or "cpu" with so many bytes to use.

    `libraries` are the bytes that they take beside our arrays, on a CPU counted as usable.
    settings.train.model must name a net. `streamed` says whether the pixels stay on disk; None: if
    they would take too much, as backend.reader decides for files.
    """
    settings = replace(settings, segregate=settings.segregate.suited(shape.classes))
    with torch.device("meta"):
        model = new_model(settings.train.model, shape.classes, shape.height, seed=0)
    pixels = 3 * shape.height * shape.width * (shape.rows + shape.held_out)
    if streamed is None:
        streamed = pixels > SHARE_OF_MEMORY * memory
    held = {
        "pixels": 0 if streamed else pixels,
        "labels and order": 3 * INDEX * shape.rows,
        "weights, gradients, momentum": 3 * _weights(model),
        "libraries": libraries,
    }
    stages = _stages(shape, settings, model, machine)
    if machine == "cpu":
        return Plan(shape, held, stages, None, streamed, memory, machine)
    rest = memory - sum(held.values()) - sum(stages["cluster"].values())
    n = settings.segregate.seen(shape.rows)
    space = _clustering(n, _dims(settings, _width(model, settings, shape)), rest)
    stages["cluster"]["DBSCAN, at least"] = 1_000_000 * needed(n, 1, "int32")
    return Plan(shape, held, stages, space, streamed, memory)


def _stages(
    shape: Shape, settings: csc.Settings, model: Net, machine: str
) -> dict[str, dict[str, int]]:
    """Bytes that each stage holds beside what is always held, without a GPU's DBSCAN."""
    n, chosen, d = shape.rows, settings.segregate, _width(model, settings, shape)
    image = FLOAT * 3 * shape.height * shape.width
    watched = sorted(settings.watch.steps(train.budget(n, settings.train)))
    scales = [len(some) for some in looked_at(watched, chosen).values() if some]
    seen = {
        "clusters of every snapshot and scale": sum(scales) * FLOAT * n,
        "labels of every cluster": sum(scales) * FLOAT * shape.classes**2,  # one a label, or so
        "two dimensions of every snapshot": len(scales) * 2 * HALF * n,
        "strays of every snapshot": len(watched) * n,
    }
    features = {"features": 0 if settings.features.spill else _features(n, d, settings)}
    if machine == "cpu" and settings.watch.keep:
        seen["features of every snapshot"] = len(watched) * _features(n, d, settings)
    activations = {"activations": _kept_for_backward(model, settings, shape, machine)}
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
            "which are finite": min(CHECKED, n) * d,
        },
        "cluster": {
            **features,
            **seen,
            **clustering_parts(n, d, shape.classes, settings, machine),
        },
        "conceal": {
            **features,
            "second model": _weights(model),
            "schedule": FLOAT * n * settings.conceal.epochs,
            "graph": FLOAT * settings.conceal.batch * (d + 4 * shape.classes) * 4
            + 16 * (shape.classes + 1) * d * FLOAT,
        },
    }


def clustering_parts(
    n: int, d: int, classes: int, settings: csc.Settings, machine: str
) -> dict[str, int]:
    """Bytes that segregate.observe takes beside the features (n, d), without a GPU's DBSCAN."""
    settings = replace(settings, segregate=settings.segregate.suited(classes))
    chosen, dims = settings.segregate, _dims(settings, d)
    m, block = chosen.seen(n), min(BLOCK, n)
    k = min(m, least_neighbours(m, chosen))
    asked = m if m < n else min(chosen.k_rows, m)
    parts = {
        "order of its own": 4 * INDEX * n,
        "embedded rows": FLOAT * n * dims,
        "blocks": block * max(3 * FLOAT * d, 2 * FLOAT * d + (FLOAT + 1) * classes),
        "principal components": 4 * INDEX * d**2,
    }
    if machine == "cpu":
        parts["neighbours"] = 2 * INDEX * k * asked
        parts["lists of neighbours"] = BYTES_A_PAIR * m * min(m, NEIGHBOURS * k)
    else:
        parts["neighbours"] = (2 * FLOAT * dims + INDEX) * k * min(asked_together(k, dims), asked)
    if m < n:
        parts["nearest core rows"] = (FLOAT + INDEX) * n + 2 * FLOAT * max(AT_A_TIME, m)
    return parts


def _features(n: int, d: int, settings: csc.Settings) -> int:
    """Bytes of all features, where they are kept."""
    return NUMBERS[settings.features.precision] * n * d


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


def _width(model: Net, settings: csc.Settings, shape: Shape) -> int:
    """Features that an image gets."""
    return width(model, settings.features.layer, (shape.height, shape.width))


def _dims(settings: csc.Settings, n_features: int) -> int:
    """Dimensions in which rows are clustered."""
    asked = settings.segregate.pca
    return asked if 0 < asked < n_features else n_features


REMEDIES = {
    "pixels": "a smaller --set data.size, or an image folder, which can be streamed",
    "features": "--set features.precision=float16, --set features.spill=FOLDER",
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


def told(found: Plan, settings: csc.Settings) -> list[str]:
    """The plan as lines of text."""
    shape, model = found.shape, settings.train.model
    lines = [
        f"{shape.rows} rows of {shape.classes} classes at {shape.height}x{shape.width}, {model}; "
        f"pixels {'streamed from disk' if found.streamed else 'resident'}",
        f"{'always':10s} {gigabytes(sum(found.held.values())):>10s}   {_parts(found.held)}",
    ]
    lines += [
        f"{stage:10s} {gigabytes(found.peak(stage)):>10s}   {_parts(parts)}"
        for stage, parts in found.stages.items()
    ]
    seen = settings.segregate.seen(shape.rows)
    if seen < shape.rows:
        lines.append(
            f"clustering sees a sample of {seen} rows, the others join it: segregate.mode is "
            f"{settings.segregate.mode}"
        )
    space = found.clustering
    if space is not None:
        lines.append(
            f"DBSCAN gets {space.mbytes} MB: {math.ceil(space.n / space.batch)} batches of "
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


def _kept_for_backward(model: Net, settings: csc.Settings, shape: Shape, machine: str) -> int:
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
    return total // 2 if settings.gpu.bf16 and machine == "gpu" else total


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
