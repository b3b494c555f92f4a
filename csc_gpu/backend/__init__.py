"""The machine, chosen once and passed on. Where machines differ, there is a verb, not a branch.

`open_backend("cpu")` is NumPy, scikit-learn and torch on the CPU; `open_backend("gpu")` is CuPy,
cuML and CUDA graphs on one NVIDIA GPU, the same protocol, never replaced by the other in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.config import require
from csc_gpu.errors import BackendUnavailable, ConfigError
from csc_gpu.types import Array, Corpus

if TYPE_CHECKING:
    from csc_gpu.backend.passes import Portion
    from csc_gpu.backend.ranks import Ranks

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Two tensors of fixed shapes -> one; it may update a model. What it returns belongs to it until
the next call."""


CLUSTERS = ("local", "dask")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a GPU is used, and how DALI reads files on either machine."""

    memory: float = 0.0
    """Device memory to plan with, in GB (1e9 bytes); 0: all. Torch may take no more, nor the pool
    of CuPy and cuML; clustering takes no more than they leave of it."""
    bf16: bool = True
    """Train in bfloat16 where autocast finds it safe; features are float32 all the same."""
    tf32: bool = True
    """TensorFloat-32 in float32 convolutions and products, features included."""
    graph: bool = True
    """Replay concealment from a CUDA graph; false: step by step, for comparison."""
    decode_threads: int = 0
    """Processor threads of DALI; 0: as many as --threads."""
    prefetch: int = 2
    """Batches DALI works on ahead."""
    hw_decoder_load: float = 0.65
    """Share of JPEGs for the GPU's decoding unit, where it has one."""
    cluster: str = "local"
    """local: DBSCAN on the GPU of the run. dask: on all GPUs of the Dask cluster at gpu.scheduler;
    every one of them holds all embedded rows, and takes its share of the pairs."""
    scheduler: str = ""
    """Address of the Dask scheduler, tcp://HOST:8786."""

    def __post_init__(self) -> None:
        require(self, "gpu", f"one of {', '.join(CLUSTERS)}", CLUSTERS.__contains__, "cluster")
        if (self.cluster == "dask") != bool(self.scheduler):
            raise ConfigError(
                "gpu.cluster=dask (--cluster dask) and gpu.scheduler (--scheduler ADDRESS) go "
                "together; give both, or neither"
            )
        require(self, "gpu", "0 or more", lambda value: 0 <= value < 1e9, "memory")
        require(self, "gpu", "0 or more", lambda count: count >= 0, "decode_threads")
        require(self, "gpu", "1 or more", lambda count: count >= 1, "prefetch")
        require(self, "gpu", "in [0, 1]", lambda share: 0 <= share <= 1, "hw_decoder_load")


@dataclass(frozen=True)
class Decoder:
    """Where and how files become pixels."""

    device: torch.device
    threads: int
    prefetch: int = 2
    hw_load: float = 0.65


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
    def machine(self) -> str:
        """What computes, and on how many threads: all that rounding depends on."""

    @property
    def usual_model(self) -> str:
        """The net that is trained here unless another is asked for."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share the run; alone unless torchrun started several."""

    @property
    def decoder(self) -> Decoder:
        """Where DALI decodes for this machine."""

    @property
    def fused(self) -> bool:
        """Whether an optimiser step is one kernel here, which takes its rate from a tensor."""

    def free_bytes(self) -> int | None:
        """Bytes that pixels, features and clustering may still take; None where none can say."""

    def peak_bytes(self) -> int | None:
        """Most bytes held so far: on a GPU, or by this process; None where none can say."""

    def cpu_seconds(self) -> float | None:
        """Processor seconds of this process so far; None where they say little of the work."""

    def precision(self) -> AbstractContextManager[object]:
        """The arithmetic of a forward pass in training."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """A stage, named for profilers; it ends when the device has ended its work."""

    def batches(
        self,
        corpus: Corpus,
        size: int,
        *,
        order: NDArray[np.int64] | None = None,
        augment: Augment | None = None,
        rng: np.random.Generator | None = None,
        portion: Portion | None = None,
    ) -> Iterator[Batch]:
        """The rows of `order` (all, if None), `size` at a time; every one exactly once.

        Pixels that are resident are gathered, files are read on the way. Only a portion of the pass
        may be asked for; the rest is drawn alike, and neither read nor given.
        """

    def array(self, tensor: torch.Tensor) -> Array:
        """The tensor as an array of xp, without a copy."""

    def tensor(self, array: Array) -> torch.Tensor:
        """An array of xp as a tensor, without a copy."""

    def to_numpy(self, array: Array) -> NDArray[np.generic]:
        """The one way down from the device."""

    def dbscan(self, points: Array, *, eps: float, min_samples: int) -> Array:
        """Exact DBSCAN, euclidean, of (N, D) float32 in C order. (N,) int32, -1 for noise"""

    def neighbors(self, points: Array, k: int, queries: Array) -> Array:
        """Distance of each query to its k-th neighbour among the points, itself counted. (len,)"""

    def kmeans(self, points: Array, k: int, *, seed: int, tries: int) -> Array:
        """The best of so many k-means of (N, D) float32 in C order. (N,) int32, 0..k-1"""

    def captured(self, step: Step) -> Step:
        """The step as a CUDA graph, or the step itself: one contract (see captured.py)."""


def open_backend(name: str, threads: int = 0, settings: Settings | None = None) -> Backend:
    """The backend "cpu" or "gpu"; threads 0 takes every core this process may use.

    Raises BackendUnavailable, which names what is missing and the command that adds it.
    """
    from csc_gpu.backend.ranks import joined

    threads, settings = threads or usable_cores(), settings or Settings()
    if name == "cpu":
        if settings.cluster == "dask":
            raise ConfigError("--cluster dask clusters on GPUs; leave it out, or leave out --cpu")
        from csc_gpu.backend.cpu import CpuBackend

        return CpuBackend(threads, settings, joined())
    from csc_gpu.backend import doctor

    lacking = doctor.missing_for_gpu()
    if settings.cluster == "dask":
        lacking += doctor.missing_for_dask()
    if lacking:
        told = "; ".join(f"{lack.what} ({lack.remedy})" for lack in lacking)
        raise BackendUnavailable(f"{told}; mend that, or pass --cpu")
    from csc_gpu.backend.gpu import open_gpu

    return open_gpu(threads, settings, joined())


def usable_cores() -> int:
    """The cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
