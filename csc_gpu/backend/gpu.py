"""The backend on one NVIDIA GPU: CuPy arrays, cuML's DBSCAN on them, concealment as a CUDA graph.

`GpuBackend` decides; `Cuda` is the driver's edge, the only code that calls the CUDA side of torch,
CuPy, cuML and RMM. Tests without a GPU put a fake in its place. No GPU has run `Cuda` yet: it was
checked against the signatures of cuML 26.10, CuPy 14.2, RMM 26.10 and torch 2.15 alone.

Memory: torch keeps its own allocator; CuPy and cuML share one RMM pool that is bounded and gives
unused memory back. Before clustering torch's cache is emptied, and clustering gets what is then
free less what torch had at its peak, so that training finds its memory again.

Order: all work runs on the default stream of torch and CuPy. Tensors and arrays pass by DLPack,
which makes one stream wait for the other wherever a caller uses another; cuML has streams of its
own, so the device is synchronised before it starts, and cuML does so before it returns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Decoder, Settings, Step, loader
from csc_gpu.backend.batches import Batches
from csc_gpu.backend.captured import Captured, Graphs
from csc_gpu.backend.ranks import ALONE, Ranks, local_rank
from csc_gpu.backend.workspace import Workspace, with_less, workspace
from csc_gpu.errors import BackendUnavailable
from csc_gpu.types import Array

MARGIN = 256_000_000
"""Bytes never handed to clustering: kernels, handles and fragments take some."""
POOL_KEEPS = 64_000_000
"""Bytes the RMM pool may keep unused: more goes back to the driver, where torch finds it."""
CONNECT = 10
"""Seconds that a Dask scheduler has to answer."""
ASKED = 2**24
"""Numbers held at a time to measure the distances from queries to their neighbours."""


class Driver(Graphs, Protocol):
    """What differs between a GPU and its fake."""

    xp: ModuleType
    device: torch.device
    card: str

    def free_bytes(self) -> int:
        """Bytes that arrays may still take within the limit, torch's cache left to torch."""

    def peak_bytes(self) -> int:
        """Most bytes that arrays took so far: torch's peak and the pool's, which may not meet."""

    def dbscan(self, points: Array, eps: float, min_samples: int, space: Workspace) -> Array:
        """Cluster numbers of cuML, int32 or int64. (N,)"""

    def kmeans(self, points: Array, k: int, seed: int, tries: int) -> Array:
        """Cluster numbers of cuML's k-means, integers. (N,)"""

    def nearest(self, points: Array, queries: Array, k: int) -> Array:
        """The rows of the k nearest points of each query. (len(queries), k) integers"""

    def synchronise(self) -> None:
        """Wait for everything the device was given."""

    def mark(self, name: str) -> AbstractContextManager[object]:
        """An NVTX range."""


class GpuBackend(Batches):
    """One NVIDIA GPU; the same verbs as the CPU's."""

    name = "gpu"
    usual_model = "resnet18"
    fused = True

    def __init__(self, driver: Driver, threads: int, settings: Settings) -> None:
        self._driver = driver
        self._settings = settings
        self._uploaded: tuple[Array, torch.Tensor] | None = None
        self.threads = threads
        self.xp = driver.xp
        self.device = driver.device
        self.decoder = Decoder(
            driver.device,
            settings.decode_threads or threads,
            settings.prefetch,
            settings.hw_decoder_load,
        )

    @property
    def machine(self) -> str:
        """See Backend.machine."""
        return f"{self._driver.card}, {self.threads} threads"

    def free_bytes(self) -> int | None:
        """See Backend.free_bytes."""
        return self._driver.free_bytes()

    def peak_bytes(self) -> int | None:
        """See Backend.peak_bytes."""
        return self._driver.peak_bytes()

    def cpu_seconds(self) -> float | None:
        """See Backend.cpu_seconds: the work is done elsewhere."""
        return None

    def precision(self) -> AbstractContextManager[object]:
        """See Backend.precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._settings.bf16)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See Backend.stage."""
        self._driver.synchronise()  # what came before is not this stage's
        with self._driver.mark(f"csc {name}"):
            yield
            self._driver.synchronise()

    def _placed(self, pixels: Array) -> torch.Tensor:
        """See Batches; sent up once: the last corpus that was asked for stays."""
        if isinstance(pixels, torch.Tensor):
            return pixels.to(self.device)
        if self._uploaded is None or self._uploaded[0] is not pixels:
            self._uploaded = None  # frees the last corpus first
            self._uploaded = pixels, torch.from_numpy(pixels).to(self.device)
        return self._uploaded[1]

    def array(self, tensor: torch.Tensor) -> Array:
        """See Backend.array."""
        return self.xp.from_dlpack(tensor.detach())

    def tensor(self, array: Array) -> torch.Tensor:
        """See Backend.tensor."""
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(array)
        return tensor

    def to_numpy(self, array: Array) -> NDArray[np.generic]:
        """See Backend.to_numpy."""
        if isinstance(array, np.ndarray):
            return array
        down: NDArray[np.generic] = self.xp.asnumpy(array)
        return down

    def dbscan(self, points: Array, *, eps: float, min_samples: int) -> Array:
        """See Backend.dbscan; raises DeviceTooSmall if no batch fits."""
        points = self.xp.ascontiguousarray(points, dtype=self.xp.float32)
        n, d = points.shape
        space = workspace(n, d, self._driver.free_bytes())

        def run(space: Workspace) -> Array:
            return self._driver.dbscan(points, eps, min_samples, space)

        return with_less(run, space).astype(self.xp.int32)

    def neighbors(self, points: Array, k: int, queries: Array) -> Array:
        """See Backend.neighbors.

        cuML says who the neighbours are; how far is measured here. Its own distances come from
        |x|^2 + |y|^2 - 2xy, which blurs the radii of the densest clusters, and its second pass
        (two_pass_precision, 26.10) takes the neighbours' rows from the queries, not the points.
        Who is nearest stays blurred below about 1e-3 of the points' length, so that distances there
        may come out too long: embedded rows are centred and at most about 1 long.
        """
        together = asked_together(k, points.shape[1])
        parts = []
        for start in range(0, len(queries), together):
            some = queries[start : start + together]
            near = points[self._driver.nearest(points, some, k)]  # (Q, k, D)
            near -= some[:, None]
            near *= near
            parts.append(near.sum(axis=2).max(axis=1) ** 0.5)
        return self.xp.concatenate(parts)

    def kmeans(self, points: Array, k: int, *, seed: int, tries: int) -> Array:
        """See Backend.kmeans."""
        points = self.xp.ascontiguousarray(points, dtype=self.xp.float32)
        return self._driver.kmeans(points, k, seed, tries).astype(self.xp.int32)

    def captured(self, step: Step) -> Step:
        """See Backend.captured; settings.graph false gives the step itself."""
        return Captured(step, self._driver) if self._settings.graph else step


def dbscan_arguments(
    eps: float, min_samples: int, space: Workspace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """For cuML's DBSCAN and its fit_predict. A test holds them to the real signatures.

    Without core sample indices there is no copy of the core rows, which could be the size of the
    features; with an explicit budget cuML does not plan on 80 % of all memory, torch's included.
    """
    model = {
        "eps": eps,
        "min_samples": min_samples,
        "metric": "euclidean",  # cosine would change the caller's array in place
        "algorithm": "brute",
        "max_mbytes_per_batch": space.mbytes,
        "calc_core_sample_indices": False,
        "output_type": "cupy",
    }
    return model, {"out_dtype": space.dtype}


def asked_together(k: int, d: int) -> int:
    """Queries whose k neighbours of d dimensions are measured at a time."""
    return max(1, ASKED // (k * d))


def nearest_arguments(k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """For cuML's NearestNeighbors and its kneighbors."""
    model = {
        "n_neighbors": k,
        "algorithm": "brute",
        "metric": "euclidean",
        "output_type": "cupy",
    }
    return model, {"return_distance": False}


def kmeans_arguments(k: int, seed: int, tries: int) -> dict[str, Any]:
    """For cuML's KMeans."""
    return {
        "n_clusters": k,
        "n_init": tries,
        "init": "k-means++",
        "random_state": seed,
        "output_type": "cupy",
    }


class Cuda:
    """The driver's edge. Not yet run on a GPU."""

    def __init__(self, settings: Settings) -> None:
        self.xp = imported("cupy")
        if not self.xp.cuda.is_available():
            raise BackendUnavailable("CuPy finds no GPU although torch does; see csc-gpu doctor")
        # before the allocator is set: importing cuML sets one of its own
        self._clustering, self._searching = imported("cuml.cluster"), imported("cuml.neighbors")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.card = torch.cuda.get_device_name(self.device)
        self.xp.cuda.Device(self.device.index).use()  # torch's choice, for CuPy and cuML too
        total = torch.cuda.get_device_properties(self.device).total_memory
        self._limit = min(total, int(settings.memory * 1e9) or total)
        if self._limit < total:
            torch.cuda.set_per_process_memory_fraction(self._limit / total, self.device)
        self._pool, self._counted = _bounded_pool(self.xp, self._limit)
        self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32
        torch.backends.cudnn.allow_tf32 = settings.tf32
        torch.backends.cudnn.benchmark = True

    def free_bytes(self) -> int:
        """See Driver.free_bytes."""
        self.synchronise()  # the pool gives back what is unused only then
        torch.cuda.empty_cache()
        loader.release()
        has = torch.cuda.memory_reserved(self.device)
        returns_for = torch.cuda.max_memory_reserved(self.device) - has
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = self._limit - has - int(self._pool.get_allocated_bytes())
        return max(0, min(free, unused) - returns_for - MARGIN)

    def peak_bytes(self) -> int:
        """See Driver.peak_bytes."""
        return torch.cuda.max_memory_allocated(self.device) + int(
            self._counted.allocation_counts.peak_bytes
        )

    def dbscan(self, points: Array, eps: float, min_samples: int, space: Workspace) -> Array:
        """See Driver.dbscan."""
        model, fit = dbscan_arguments(eps, min_samples, space)
        self.synchronise()
        return self._clustering.DBSCAN(**model).fit_predict(points, **fit)

    def kmeans(self, points: Array, k: int, seed: int, tries: int) -> Array:
        """See Driver.kmeans."""
        self.synchronise()
        return self._clustering.KMeans(**kmeans_arguments(k, seed, tries)).fit_predict(points)

    def nearest(self, points: Array, queries: Array, k: int) -> Array:
        """See Driver.nearest."""
        model, search = nearest_arguments(k)
        self.synchronise()
        return self._searching.NearestNeighbors(**model).fit(points).kneighbors(queries, **search)

    def synchronise(self) -> None:
        """See Driver.synchronise."""
        torch.cuda.synchronize(self.device)

    def mark(self, name: str) -> AbstractContextManager[object]:
        """See Driver.mark."""
        return torch.cuda.nvtx.range(name)

    def aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See Graphs.aside."""
        here = torch.cuda.current_stream(self.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            result = work()
        here.wait_stream(self._side)
        result.record_stream(here)
        return result

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
        """See Graphs.record; thread_local, because a loader's thread may use the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


class SpreadCuda(Cuda):
    """The driver's edge where DBSCAN runs on every GPU of a Dask cluster. No GPU has run it.

    Its names and arguments were read in cuML's source. Embedded rows go to the host and from there
    to every worker; clusters come back as host arrays. What a batch may take is what this GPU has
    free, so the workers' GPUs should have as much.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._client = connected(settings.scheduler)
        self._spread = imported("cuml.dask.cluster")

    def dbscan(self, points: Array, eps: float, min_samples: int, space: Workspace) -> Array:
        """See Driver.dbscan."""
        model, fit = dbscan_arguments(eps, min_samples, space)
        model |= {"client": self._client, "output_type": "numpy"}
        found = self._spread.DBSCAN(**model).fit_predict(self.xp.asnumpy(points), **fit)
        return self.xp.asarray(found)


def connected(scheduler: str) -> Any:
    """A client of the Dask cluster; raises BackendUnavailable if none is there, or no worker."""
    remedy = "start dask scheduler and dask cuda worker (README, At scale), or leave out --cluster"
    try:
        client = imported("dask.distributed").Client(scheduler, timeout=CONNECT)
    except (OSError, ValueError) as fault:  # a time-out is an OSError
        told = " ".join(str(fault).split())[:160]
        raise BackendUnavailable(
            f"no Dask scheduler answers at {scheduler} ({told}); {remedy}"
        ) from fault
    if not client.nthreads():
        raise BackendUnavailable(f"the Dask cluster at {scheduler} has no workers; {remedy}")
    return client


def imported(name: str) -> ModuleType:
    """A module of RAPIDS or CuPy; raises BackendUnavailable if it is there but does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as fault:
        raise BackendUnavailable(
            f"{name} is installed but does not load ({' '.join(str(fault).split())[:200]}); "
            "install cuml and cupy of one RAPIDS release, and nvidia-nvjitlink>=13.3 for CUDA 13, "
            "or pass --cpu"
        ) from fault


def _bounded_pool(cupy: ModuleType, limit: int) -> tuple[Any, Any]:
    """One RMM pool for CuPy and cuML that stops at the limit and gives memory back; its counts."""
    rmm = imported("rmm")
    from_rmm = imported("rmm.allocators.cupy").rmm_cupy_allocator
    pool = rmm.mr.LimitingResourceAdaptor(
        rmm.mr.CudaAsyncMemoryResource(release_threshold=POOL_KEEPS), limit
    )
    counted = rmm.mr.StatisticsResourceAdaptor(pool)
    rmm.mr.set_current_device_resource(counted)
    cupy.cuda.set_allocator(from_rmm)
    return pool, counted


def open_gpu(threads: int, settings: Settings, ranks: Ranks = ALONE) -> GpuBackend:
    """The backend on the current CUDA device; the packages must be there (doctor).

    With several ranks each takes the GPU of its place on the machine; nobody has run that yet.
    """
    torch.set_num_threads(threads)
    if ranks.world > 1:
        torch.cuda.set_device(local_rank())
        imported("cupy").cuda.Device(local_rank()).use()
    spread = settings.cluster == "dask" and ranks.is_first  # who clusters
    backend = GpuBackend((SpreadCuda if spread else Cuda)(settings), threads, settings)
    backend.ranks = ranks
    return backend
