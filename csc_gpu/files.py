"""Where encoded images lie on disk: each a whole file, or a piece of one (a shard)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

RECENT = 1024
"""Paths that are remembered: joining one takes as long as reading a small image."""


@lru_cache(RECENT)
def _joined(root: Path, name: str) -> Path:
    return root / name


class Piece(NamedTuple):
    """An encoded image inside a larger file."""

    path: Path
    start: int  # bytes
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.path} at byte {self.start}"


Place = Path | Piece
"""One encoded image: a whole file, or a piece of one."""


@dataclass(frozen=True, eq=False)
class Files(Sequence[Place]):
    """The places of N encoded images, 20 bytes a row beside the names of the files."""

    root: Path = Path()
    names: tuple[str, ...] = ()  # of files, absolute or relative to root
    of_row: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # (N,) which
    pieces: NDArray[np.int64] | None = None  # (N, 2) start and size in bytes; None: whole files

    @classmethod
    def whole(cls, root: Path, names: tuple[str, ...]) -> Files:
        """Every file an image."""
        return cls(root, names, np.arange(len(names), dtype=np.int32))

    def __len__(self) -> int:
        return len(self.of_row)

    @overload
    def __getitem__(self, row: int) -> Place: ...
    @overload
    def __getitem__(self, row: slice) -> Files: ...
    def __getitem__(self, row: int | slice) -> Place | Files:
        if isinstance(row, slice):
            return self._chosen(row)
        path = _joined(self.root, self.names[self.of_row[row]])
        return path if self.pieces is None else Piece(path, *self.pieces[row].tolist())

    def __add__(self, other: Files) -> Files:
        """These rows and then those, of one root and one kind."""
        assert self.root == other.root and (self.pieces is None) == (other.pieces is None)
        return replace(
            self,
            names=self.names + other.names,
            of_row=np.concatenate([self.of_row, other.of_row + np.int32(len(self.names))]),
            pieces=None
            if self.pieces is None or other.pieces is None
            else np.concatenate([self.pieces, other.pieces]),
        )

    def take(self, rows: NDArray[np.int64]) -> Files:
        """The places of these rows, in this order."""
        return self._chosen(rows)

    def _chosen(self, rows: slice | NDArray[np.int64]) -> Files:
        pieces = None if self.pieces is None else self.pieces[rows]
        return replace(self, of_row=self.of_row[rows], pieces=pieces)
