"""How much memory cuML's DBSCAN gets, and what to do when even that is too much.

cuML works on batches of rows. Each row of a batch takes one byte and one index for every row of the
data, two indices more, and the whole one index and one byte a row (cuML 26.10, `dbscan.cuh`). All
batches but one are computed twice, so a larger batch is faster. int32 indices limit a batch to
(2^31 - 1) / N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from csc_gpu.errors import DeviceTooSmall

LARGEST_INT32 = 2**31 - 1
INDEX_BYTES = {"int32": 4, "int64": 8}
SHARE_OF_ROOM = 0.8
"""Of the room for clustering that a batch may take: cuML's estimate leaves out small things."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workspace:
    """What one clustering is given."""

    n: int  # rows of the data
    mbytes: int  # max_mbytes_per_batch, in 1e6 bytes
    dtype: str  # of cuML's labels and indices: int32 or int64

    @property
    def batch(self) -> int:
        """Rows in one batch; 0 if not even one fits."""
        return _batch(self.n, self.mbytes, self.dtype)

    @property
    def passes(self) -> float:
        """How often each pair of rows is computed, 1 to 2."""
        return 2 - self.batch / self.n


def _batch(n: int, mbytes: int, dtype: str) -> int:
    index = INDEX_BYTES[dtype]
    rows = (mbytes * 1_000_000 - _fixed(n, dtype)) // (n + (n + 2) * index)
    limit = LARGEST_INT32 // n if dtype == "int32" else n
    return max(0, min(n, limit, rows))


def _fixed(n: int, dtype: str) -> int:
    return n * (INDEX_BYTES[dtype] + 1)


def needed(n: int, rows: int, dtype: str) -> int:
    """1e6 bytes for a batch of so many rows."""
    index = INDEX_BYTES[dtype]
    return -(-(_fixed(n, dtype) + rows * (n + (n + 2) * index)) // 1_000_000)


def workspace(n: int, d: int, room: int) -> Workspace:
    """The fastest way to cluster (n, d) in `room` bytes: the indices that allow larger batches.

    Raises DeviceTooSmall if not even a batch of one row fits.
    """
    mbytes = int(SHARE_OF_ROOM * room) // 1_000_000
    kinds = ("int64",) if n * d > LARGEST_INT32 else ("int32", "int64")
    best = max((Workspace(n, mbytes, kind) for kind in kinds), key=lambda space: space.batch)
    if best.batch == 0:
        least = math.ceil(min(needed(n, 1, kind) for kind in kinds) / SHARE_OF_ROOM)
        left = f"{room // 1_000_000} MB are left beside the rest"
        raise _too_small(n, f"needs {least} MB of GPU memory at least, and {left}")
    return replace(best, mbytes=min(mbytes, needed(n, best.batch, best.dtype)))


def with_less(
    run: Callable[[Workspace], Result],
    space: Workspace,
) -> Result:
    """run(space), with batches half as large each time that the memory does not suffice.

    Raises DeviceTooSmall once a batch is a single row, or no smaller budget holds one.
    """
    while True:
        try:
            return run(space)
        except Exception as fault:
            if not is_out_of_memory(fault):
                raise
            half = needed(space.n, space.batch // 2, space.dtype)
            # whole megabytes: those of half the rows can be those of all of them
            less = replace(space, mbytes=min(half, space.mbytes - 1))
            if space.batch <= 1 or less.batch < 1:
                raise _too_small(space.n, "does not fit, not even in the smallest steps") from fault
            space = less


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether memory did not suffice: CuPy and RMM raise MemoryError, C++ tells it in its text."""
    told = str(fault).lower().replace("_", " ")
    return isinstance(fault, MemoryError | torch.OutOfMemoryError) or (
        isinstance(fault, RuntimeError)
        and any(words in told for words in ("out of memory", "bad alloc", "alloc failed"))
    )


def _too_small(n: int, why: str) -> DeviceTooSmall:
    return DeviceTooSmall(
        f"clustering {n} rows {why}; end other programs on this GPU, raise gpu.memory, or pass "
        "--cpu"
    )
