"""The backend behind --cpu: NumPy arrays, scikit-learn's DBSCAN, the step itself as the step."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors

from csc_gpu.backend import Decoder, Settings, Step
from csc_gpu.backend.batches import Batches
from csc_gpu.backend.ranks import ALONE, Ranks, local_world
from csc_gpu.memory import free_memory, peak_memory
from csc_gpu.types import Array


class CpuBackend(Batches):
    """One processor; the same verbs as the GPU's."""

    name = "cpu"
    xp: ModuleType = np
    device = torch.device("cpu")
    usual_model = "resnet8"
    fused = False

    def __init__(self, threads: int, settings: Settings, ranks: Ranks = ALONE) -> None:
        self.threads, self.ranks = threads, ranks
        self.decoder = Decoder(self.device, settings.decode_threads or threads, settings.prefetch)
        torch.set_num_threads(threads)

    @property
    def machine(self) -> str:
        """See Backend.machine."""
        return f"{torch.backends.cpu.get_cpu_capability()}, {self.threads} threads"

    def free_bytes(self) -> int | None:
        """See Backend.free_bytes: what can be taken without swapping, shared among the ranks."""
        free = free_memory()
        return free if free is None else free // local_world()

    def peak_bytes(self) -> int | None:
        """See Backend.peak_bytes: resident, files that are mapped among them."""
        return peak_memory()

    def cpu_seconds(self) -> float | None:
        """See Backend.cpu_seconds: of all threads."""
        return time.process_time()

    def precision(self) -> AbstractContextManager[object]:
        """See Backend.precision."""
        return nullcontext()

    def stage(self, name: str) -> AbstractContextManager[object]:
        """See Backend.stage."""
        return nullcontext()

    def _placed(self, pixels: Array) -> torch.Tensor:
        """See Batches."""
        return torch.from_numpy(pixels)

    def array(self, tensor: torch.Tensor) -> Array:
        """See Backend.array."""
        return tensor.detach().numpy()

    def tensor(self, array: Array) -> torch.Tensor:
        """See Backend.tensor."""
        return torch.from_numpy(array)

    def to_numpy(self, array: Array) -> NDArray[np.generic]:
        """See Backend.to_numpy."""
        return np.asarray(array)

    def dbscan(self, points: Array, *, eps: float, min_samples: int) -> Array:
        """See Backend.dbscan."""
        model = DBSCAN(eps=eps, min_samples=min_samples, n_jobs=self.threads)
        return model.fit_predict(points).astype(np.int32)

    def neighbors(self, points: Array, k: int, queries: Array) -> Array:
        """See Backend.neighbors."""
        search = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=self.threads)
        return search.fit(points).kneighbors(queries)[0][:, -1]

    def kmeans(self, points: Array, k: int, *, seed: int, tries: int) -> Array:
        """See Backend.kmeans."""
        model = KMeans(k, n_init=tries, random_state=seed)
        with warnings.catch_warnings():  # fewer distinct rows than clusters is an answer, too
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit_predict(points).astype(np.int32)

    def captured(self, step: Step) -> Step:
        """See Backend.captured."""
        return step
