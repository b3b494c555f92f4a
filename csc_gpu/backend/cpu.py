"""The backend behind --cpu: NumPy arrays, scikit-learn's DBSCAN, the step itself as the step."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from sklearn.neighbors import NearestNeighbors

from csc_gpu.backend import Augment, Batch, Step, resident
from csc_gpu.types import Array, Corpus


class CpuBackend:
    """One processor; the same verbs as the GPU's."""

    name = "cpu"
    xp: ModuleType = np
    device = torch.device("cpu")
    usual_model = "resnet8"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        torch.set_num_threads(threads)

    def batches(
        self,
        corpus: Corpus,
        size: int,
        *,
        order: NDArray[np.int64] | None = None,
        augment: Augment | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Batch]:
        """See Backend.batches."""
        return resident.batches(corpus, size, self.device, order=order, augment=augment, rng=rng)

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

    def captured(self, step: Step) -> Step:
        """See Backend.captured."""
        return step
