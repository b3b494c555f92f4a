"""The machine, chosen once and passed on. Where machines differ, there is a verb, not a branch.

`open_backend("cpu")` is NumPy, scikit-learn and torch on the CPU. The GPU backend (CuPy, cuML, CUDA
graphs) is the same protocol and not built yet: asking for it names what is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.errors import BackendUnavailable
from csc_gpu.types import Array, Corpus

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(inputs, labels) -> loss; updates the model."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a corpus. It belongs to the loader until the next one."""

    images: torch.Tensor  # (B, 3, H, W) float32, (pixel / 255 - .5) / .25
    labels: torch.Tensor  # (B,) int64
    rows: torch.Tensor  # (B,) int64, positions in the corpus


@dataclass(frozen=True)
class Augment:
    """Random changes that keep an image's label."""

    shift: int = 0
    """Largest shift up, down, left and right, in pixels; what moves in is black."""
    flip: bool = False
    """Mirror left and right, half of the time."""


class Backend(Protocol):
    """What a stage may ask of the machine."""

    @property
    def name(self) -> str:
        """cpu or gpu"""

    @property
    def xp(self) -> ModuleType:
        """numpy or cupy"""

    @property
    def device(self) -> torch.device:
        """Where torch computes."""

    @property
    def usual_model(self) -> str:
        """The net that is trained here unless another is asked for."""

    def batches(
        self,
        corpus: Corpus,
        size: int,
        *,
        order: NDArray[np.int64] | None = None,
        augment: Augment | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        """The rows of `order` (all, if None), `size` at a time; every one exactly once."""

    def array(self, tensor: torch.Tensor) -> Array:
        """The tensor as an array of xp, without a copy."""

    def tensor(self, array: Array) -> torch.Tensor:
        """An array of xp as a tensor, without a copy."""

    def to_numpy(self, array: Array) -> NDArray[np.generic]:
        """The one way down from the device."""

    def dbscan(self, points: Array, *, eps: float, min_samples: int) -> Array:
        """Exact DBSCAN, euclidean. (N,) int32, -1 for noise"""

    def neighbors(self, points: Array, k: int, queries: Array) -> Array:
        """Distance of each query to its k-th neighbour among the points, itself counted. (len,)"""

    def captured(self, step: Step) -> Step:
        """The step as a CUDA graph, or the step itself: one contract."""


def open_backend(name: str, threads: int = 0) -> Backend:
    """The backend "cpu" or "gpu"; threads 0 takes every core this process may use.

    Raises BackendUnavailable, which names what is missing.
    """
    if name == "cpu":
        from csc_gpu.backend.cpu import CpuBackend

        return CpuBackend(threads or usable_cores())
    raise BackendUnavailable(f"{_missing_for_gpu()}; pass --cpu to run on this machine's processor")


def readiness() -> dict[str, str]:
    """Whether each backend can be opened here, and if not, why."""
    missing = _missing_for_gpu()
    return {"backend cpu": "ready", "backend gpu": f"not ready: {missing}"}


def usable_cores() -> int:
    """The cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def _missing_for_gpu() -> str:
    absent = [name for name in ("cupy", "cuml") if importlib.util.find_spec(name) is None]
    if not torch.cuda.is_available():
        return "no NVIDIA GPU can be used here (torch.cuda.is_available() is false)"
    if absent:
        return f"the GPU backend needs {' and '.join(absent)}, which is not installed"
    return "a GPU is here, but this version has no GPU backend yet"


def describe() -> dict[str, str]:
    """Which machine this is and which versions are installed, for the summary and `doctor`."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(usable_cores()),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
    }
    for package in ("csc-gpu", "torch", "torchvision", "numpy", "scikit-learn", *_OPTIONAL):
        found[package] = version(package) or "not installed"
    found["nvidia-dali"] = next((v for v in map(version, _DALI) if v), "not installed")
    found["cupy"] = next((v for v in map(version, _CUPY) if v), "not installed")
    found["cuml"] = next((v for v in map(version, _CUML) if v), "not installed")
    return found


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


_OPTIONAL = ("pillow", "safetensors")
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
_CUML = ("cuml-cu13", "cuml-cu12", "cuml")


def version(package: str) -> str | None:
    """The installed version of a package, by its registry name; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
