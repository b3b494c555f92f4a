"""A GPU without a GPU: a strict stand-in for CuPy over NumPy, and a driver behind GpuBackend.

It is stricter than the real thing: whatever would move data between host and device unseen is
refused, and what moves them openly is counted. Work is recorded as a CUDA graph records it: Python
runs once, nothing is computed, and a replay repeats the same operations on the same addresses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from sklearn.cluster import DBSCAN, KMeans
from torch.utils._python_dispatch import TorchDispatchMode

from csc_gpu.backend import Settings
from csc_gpu.backend.gpu import GpuBackend
from csc_gpu.backend.workspace import Workspace


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


METHODS = _names(
    "all any argmax argmin argsort astype clip copy cumsum fill flatten max mean min nonzero ravel "
    "repeat reshape round sort squeeze std sum swapaxes take trace transpose var view"
)
"""What a DeviceArray does as cupy.ndarray does it; test_cuda_signatures holds it to the real one.
"""
UPLOADS = frozenset({"array", "asarray", "ascontiguousarray"})
"""Functions to which CuPy takes arrays of the host."""
NAMES = _names(
    "arange argsort bincount bool_ clip concatenate empty exp eye flatnonzero float16 float32 "
    "float64 full int16 int32 int64 isfinite linspace log2 matmul maximum packbits quantile "
    "sort sqrt stack subtract tanh uint16 uint32 uint64 uint8 unique where zeros"
)
"""The other names of CuPy that the fake offers: those that csc_gpu uses. test_cuda_signatures finds
out whether they are enough, and whether CuPy has them."""


@dataclass(frozen=True)
class Transfer:
    """Bytes that went between host and device at once."""

    label: str
    down: bool
    size: int  # bytes


@dataclass
class Traffic:
    """Every transfer, under the label that was current."""

    transfers: list[Transfer] = field(default_factory=list)
    label: str = ""

    @contextmanager
    def during(self, label: str) -> Iterator[None]:
        """Label what is transferred meanwhile."""
        self.label, before = label, self.label
        yield
        self.label = before

    def note(self, size: int, *, down: bool) -> None:
        """One transfer of so many bytes."""
        self.transfers.append(Transfer(self.label, down, size))

    def sizes(self, *, down: bool, label: str | None = None) -> list[int]:
        """Bytes of each transfer in one direction; under one label, or all."""
        return [t.size for t in self.transfers if t.down == down and label in (None, t.label)]


class DeviceArray:
    """An array that only other DeviceArrays and scalars may meet, as cupy.ndarray."""

    __array_ufunc__ = None  # so that NumPy's arrays do not take it for one of theirs
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: np.ndarray, traffic: Traffic) -> None:
        self._host = host
        self._traffic = traffic

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed; use .get()")

    def get(self) -> np.ndarray:
        """A copy on the host."""
        self._traffic.note(self._host.nbytes, down=True)
        return self._host.copy()

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, key: Any) -> DeviceArray:
        return self._wrap(self._host[_index(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_index(key)] = _bare(value)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "flags"):
            return getattr(self._host, name)
        if name == "T":
            return self._wrap(self._host.T)
        if name not in METHODS:
            raise AttributeError(f"the fake's arrays have no {name}")

        def method(*args: Any, **named: Any) -> Any:
            bare = {key: _bare(value) for key, value in named.items()}
            return self._wrap(getattr(self._host, name)(*map(_bare, args), **bare))

        return method

    def __dlpack__(self, **how: Any) -> Any:
        return self._host.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self._host.__dlpack_device__()

    def _wrap(self, result: Any) -> Any:
        return _wrapped(result, self._traffic)


def _binary(name: str, *, mirrored: bool = False) -> Callable[[DeviceArray, Any], Any]:
    work = getattr(operator, name)

    def compute(self: DeviceArray, other: Any) -> Any:
        one, two = self._host, _bare(other)
        return self._wrap(work(two, one) if mirrored else work(one, two))

    return compute


def _in_place(name: str) -> Callable[[DeviceArray, Any], DeviceArray]:
    work = getattr(operator, f"i{name}")

    def compute(self: DeviceArray, other: Any) -> DeviceArray:
        work(self._host, _bare(other))
        return self

    return compute


def _unary(name: str) -> Callable[[DeviceArray], Any]:
    work = getattr(operator, name)
    return lambda self: self._wrap(work(self._host))


for _name in _names("add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift"):
    _plain = _name.rstrip("_")
    setattr(DeviceArray, f"__{_plain}__", _binary(_name))
    setattr(DeviceArray, f"__r{_plain}__", _binary(_name, mirrored=True))
    if _name != "matmul":  # CuPy has no @=
        setattr(DeviceArray, f"__i{_plain}__", _in_place(_plain))
for _name in _names("eq ne lt le gt ge"):
    setattr(DeviceArray, f"__{_name}__", _binary(_name))
for _name in _names("neg pos abs invert"):
    setattr(DeviceArray, f"__{_name}__", _unary(_name))


def _bare(value: Any) -> Any:
    """A value without its wrapping; TypeError for what lies on the host."""
    if isinstance(value, DeviceArray):
        return value._host
    if isinstance(value, np.ndarray | torch.Tensor):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(map(_bare, value))
    return value


def _index(key: Any) -> Any:
    """An index without its wrapping; lists are refused, too, for CuPy would upload them."""
    if isinstance(key, tuple):
        return tuple(map(_index, key))
    if isinstance(key, list):
        raise TypeError("an index from the host would be uploaded")
    return _bare(key)


def _wrapped(result: Any, traffic: Traffic) -> Any:
    """Arrays, also of no dimension, as DeviceArrays: CuPy has no scalars of its own."""
    if isinstance(result, np.ndarray | np.generic):
        return DeviceArray(np.asarray(result), traffic)
    if isinstance(result, tuple):
        return tuple(_wrapped(part, traffic) for part in result)
    return result


class FakeCupy(ModuleType):
    """The names of CuPy that csc_gpu uses; every other is an AttributeError."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__("fake_cupy")
        self._traffic = traffic
        self.ndarray = DeviceArray
        self.linalg = ModuleType("fake_cupy.linalg")
        for name in ("norm", "eigh", "pinv"):
            setattr(self.linalg, name, self._on_device(getattr(np.linalg, name)))

    def __getattr__(self, name: str) -> Any:
        if name in UPLOADS:
            return self._sent_up(getattr(np, name))
        if name not in NAMES:
            raise AttributeError(f"the fake CuPy has no {name}")
        found = getattr(np, name)
        return found if isinstance(found, type) else self._on_device(found)

    def _on_device(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            bare = {key: _bare(value) for key, value in named.items()}
            return _wrapped(work(*map(_bare, args), **bare), self._traffic)

        return run

    def _sent_up(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(source: Any, **how: Any) -> DeviceArray:
            if isinstance(source, DeviceArray):
                result = work(source._host, **how)
                return source if result is source._host else DeviceArray(result, self._traffic)
            array = np.array(work(source, **how))  # a copy: the host may change its own
            self._traffic.note(array.nbytes, down=False)
            return DeviceArray(array, self._traffic)

        return run

    def asnumpy(self, array: DeviceArray) -> np.ndarray:
        """A copy on the host."""
        return array.get()

    def from_dlpack(self, tensor: torch.Tensor) -> DeviceArray:
        """The same memory; the fake's device is torch's CPU."""
        return DeviceArray(tensor.numpy(), self._traffic)


WAITS = {
    getattr(torch.ops.aten, name)
    for name in (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "repeat_interleave",
        "unique_dim",
    )
}
"""Operations whose result must be known on the host: a stream that captures refuses them."""


def _is_masked(func: Any, args: Any) -> bool:
    """Whether rows are chosen by a mask, whose length only the device knows."""
    by_index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_)
    return by_index and any(index.dtype is torch.bool for index in _tensors(list(args[1])))


class Tape(TorchDispatchMode):
    """Records every operation of torch and undoes it; a replay repeats them in place."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if func.overloadpacket in WAITS or _is_masked(func, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = _tensors((args, list(kwargs.values())))
        if func._schema.is_mutable:
            self._before += [(tensor, tensor.clone()) for tensor in given]
        result = func(*args, **kwargs)
        fresh = _fresh(result, given)
        if fresh or func._schema.is_mutable:  # else a view, which stays one
            self._operations.append((func, args, kwargs, fresh))
        return result

    def undo(self) -> None:
        """What was there before; what the operations made is not computed yet."""
        with torch.no_grad():
            for *_, fresh in self._operations:
                for tensor in fresh:
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
            for tensor, before in reversed(self._before):
                tensor.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """The same operations on the same memory."""
        for func, args, kwargs, fresh in self._operations:
            result = func(*args, **kwargs)
            if fresh:
                new = _fresh(result, _tensors((args, list(kwargs.values()))))
                for place, value in zip(fresh, new, strict=True):
                    place.copy_(value)


def _fresh(result: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a result that are not views of what was given."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    return [t for t in _tensors([result]) if t.untyped_storage().data_ptr() not in known]


def _tensors(values: Any) -> list[torch.Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


class FakeGraphs:
    """Of a driver what Captured needs; counts what it is asked for."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See Graphs.aside."""
        return work()

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
        """See Graphs.record."""
        self.recordings += 1
        with Tape() as tape:
            result = work()
        tape.undo()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return result, replay


class FakeDriver(FakeGraphs):
    """A gpu.Driver on the CPU, with as much memory and as many faults as it is told."""

    device = torch.device("cpu")
    card = "a fake"

    def __init__(self, free: int = 10**9, faults: tuple[Exception, ...] = ()) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.xp = FakeCupy(self.traffic)
        self.free = free
        self.faults = list(faults)  # raised by dbscan, one a call, before it succeeds
        self.spaces: list[Workspace] = []  # of every call of dbscan
        self.points: list[DeviceArray] = []
        self.marks: list[str] = []

    def free_bytes(self) -> int:
        """See Driver.free_bytes."""
        return self.free

    def peak_bytes(self) -> int:
        """See Driver.peak_bytes."""
        return max((points.nbytes for points in self.points), default=0)

    def dbscan(
        self, points: DeviceArray, eps: float, min_samples: int, space: Workspace
    ) -> DeviceArray:
        """See Driver.dbscan: scikit-learn, where the workspace is right."""
        assert isinstance(points, DeviceArray)
        self.spaces.append(space)
        self.points.append(points)
        if self.faults:
            raise self.faults.pop(0)
        found = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(points._host)
        return DeviceArray(found.astype(space.dtype), self.traffic)

    def kmeans(self, points: DeviceArray, k: int, seed: int, tries: int) -> DeviceArray:
        """See Driver.kmeans."""
        assert isinstance(points, DeviceArray)
        model = KMeans(k, n_init=tries, random_state=seed)
        return DeviceArray(model.fit_predict(points._host), self.traffic)

    def nearest(self, points: DeviceArray, queries: DeviceArray, k: int) -> DeviceArray:
        """See Driver.nearest."""
        x, y = queries._host, points._host  # in float32 and expanded, blurred as cuML's are
        squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
        return DeviceArray(np.argpartition(squared, k - 1, axis=1)[:, :k], self.traffic)

    def synchronise(self) -> None:
        """See Driver.synchronise."""

    def mark(self, name: str) -> nullcontext[None]:
        """See Driver.mark."""
        self.marks.append(name)
        return nullcontext()


def fake_gpu(driver: FakeDriver | None = None, **settings: Any) -> GpuBackend:
    """The GPU backend on a fake driver."""
    return GpuBackend(driver or FakeDriver(), 1, Settings(**settings))
