"""Features and predictions of every row, in row order: eval mode, no augmentation."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Backend, Batch
from csc_gpu.backend.passes import Portion
from csc_gpu.config import require
from csc_gpu.errors import ConfigError
from csc_gpu.models import Net
from csc_gpu.types import Array, Corpus, Log, quiet

BATCH = 512
"""Images in one forward pass."""
READ = 4096
"""Rows of spilled features that are mapped into memory at a time."""
CHECKED = 65_536
"""Rows looked at a time for numbers that are not finite."""
NUMBERS = {"float32": 4, "float16": 2}
"""How features may be kept, and the bytes of a number."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What features are, and how those of all rows are kept until they have been looked at."""

    layer: str = ""
    """The layer of the extractor whose output is clustered, its mean over the places of an image;
    empty: the input of the last linear layer, which the head and stage 2 see in any case."""
    precision: str = "float32"
    """float32, or float16: half the room, three digits; the arithmetic on them is float32."""
    spill: str = ""
    """Folder for features that do not fit the device: they lie in a file there, without a name,
    which takes 4 (float16: 2) bytes a number and ends with the run. Empty: on the device."""

    def __post_init__(self) -> None:
        one_of = f"one of {', '.join(NUMBERS)}"
        require(self, "features", one_of, NUMBERS.__contains__, "precision")


@torch.inference_mode()
def features(
    model: Net,
    corpus: Corpus,
    backend: Backend,
    settings: Settings | None = None,
    log: Log = quiet,
) -> Array:
    """The input of the last linear layer, for every row. (N, D), C order, on the device or Spilled

    Of another layer, if settings name one. Raises ConfigError if there is none of that name, or if
    they are to be spilled where there is no room.
    """
    model.eval()
    kept = settings or Settings()
    shape = len(corpus), width(model, kept.layer, corpus.image_size)
    xp, ranks = backend.xp, backend.ranks
    if kept.spill and ranks.world > 1:
        raise ConfigError("features.spill is for one rank; each keeps all features on its device")
    out = (
        Spilled(shape, kept, backend)
        if kept.spill
        else xp.zeros(shape, getattr(xp, kept.precision))
    )
    with tapped(model, kept.layer) as taken:
        for batch in every_row(corpus, backend, "features", log):
            points = taken(batch.images)  # (B, D) float32, whatever training computes in
            out[backend.array(batch.rows)] = backend.array(points)
    if ranks.world > 1:
        ranks.add_up(backend.tensor(out))  # a row is zero but with the rank that took it
    return out


def every_row(corpus: Corpus, backend: Backend, what: str, log: Log) -> Iterator[Batch]:
    """All rows in batches, of which a rank gets its share; the log is told how far that is."""
    done, ranks = 0, backend.ranks
    for batch in backend.batches(corpus, BATCH, portion=Portion(batches=ranks.share)):
        done += len(batch.rows) * ranks.world  # the others are about as far
        yield batch
        log(what, done=min(done, len(corpus)), total=len(corpus))


@contextmanager
def tapped(model: Net, layer: str) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Images (B, 3, H, W) -> the output of the extractor, or of a layer in it. (B, D)"""
    if not layer:
        yield model.features
        return
    passed: list[Any] = []

    def note(module: torch.nn.Module, given: Any, output: Any) -> None:
        passed[:] = [output]

    def taken(images: torch.Tensor) -> torch.Tensor:
        model.features(images)
        return pooled(passed.pop() if passed else None, layer)

    handle = model.layer(layer).register_forward_hook(note)
    try:
        yield taken
    finally:
        handle.remove()


def pooled(output: Any, layer: str) -> torch.Tensor:
    """(B, D) as it is, (B, D, H, W) and tokens (B, T, D) as their mean over places. (B, D)"""
    dims = output.ndim if isinstance(output, torch.Tensor) else 0
    places = {2: (), 3: (1,), 4: (2, 3)}.get(dims)
    if places is None:
        raise ConfigError(
            f"features.layer={layer} gives no (B, D), (B, T, D) or (B, D, H, W); name another"
        )
    mean: torch.Tensor = output.float().mean(dim=places) if places else output
    return mean


@torch.inference_mode()
def width(model: Net, layer: str, image_size: tuple[int, int]) -> int:
    """D: how many features `features` gives an image of this height and width."""
    if not layer:
        return model.n_features
    training, weight = model.training, next(model.parameters())
    with tapped(model.eval(), layer) as taken:
        points = taken(torch.zeros(1, 3, *image_size, device=weight.device))
    model.train(training)
    return int(points.shape[1])


class Spilled:
    """Features (N, D) in a file; rows that are asked for come up to the device, a copy.

    The file is mapped anew for every few rows, so that what was read does not stay resident.
    """

    def __init__(self, shape: tuple[int, int], settings: Settings, backend: Backend) -> None:
        self.shape, self.dtype = shape, np.dtype(settings.precision)
        self._backend, folder = backend, settings.spill
        size = shape[0] * shape[1] * self.dtype.itemsize
        try:
            free = shutil.disk_usage(folder).free
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it ends with us
        except OSError as fault:
            raise ConfigError(
                f"features.spill: cannot write to {folder!r} ({fault.strerror}); name a folder"
            ) from fault
        weakref.finalize(self, self._file.close)
        if size > free:
            raise ConfigError(
                f"features.spill: {size} bytes are needed in {folder!r}, {free} are free; name "
                "another folder, or set features.precision=float16"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, rows: Array, values: Array) -> None:
        lines = self._backend.to_numpy(values).astype(self.dtype)
        for row, line in zip(self._backend.to_numpy(rows).tolist(), lines, strict=True):
            self._file.seek(row * line.nbytes)
            self._file.write(line.tobytes())

    def __getitem__(self, rows: Array | slice) -> Array:
        wanted: NDArray[Any] = (
            np.arange(*rows.indices(len(self)))
            if isinstance(rows, slice)
            else self._backend.to_numpy(rows)
        )
        out = np.empty((*wanted.shape, self.shape[1]), self.dtype)
        self._file.flush()
        for start in range(0, len(wanted), READ):
            mapped = np.memmap(self._file, self.dtype, "r", shape=self.shape)
            out[start : start + READ] = mapped[wanted[start : start + READ]]
        return self._backend.xp.asarray(out)


def are_finite(points: Array, xp: ModuleType) -> bool:
    """Whether no feature (N, D) is NaN or infinite."""
    starts = range(0, len(points), CHECKED)
    return all(bool(xp.isfinite(points[s : s + CHECKED]).all()) for s in starts)


@torch.inference_mode()
def fitted(model: Net, points: Array, labels: NDArray[np.int64], backend: Backend) -> float:
    """Share of the rows, by features (N, D), to which the head gives their own label. 0..1"""
    wanted, model = backend.tensor(backend.xp.asarray(labels)), model.eval()
    starts = range(0, len(labels), CHECKED)
    blocks = [slice(start, start + CHECKED) for start in starts]
    hits = [
        (model.head(backend.tensor(points[block]).float()).argmax(1) == wanted[block]).sum()
        for block in blocks
    ]
    return float(torch.stack(hits).sum()) / len(labels)


@torch.inference_mode()
def predict(model: Net, corpus: Corpus, backend: Backend, log: Log = quiet) -> Array:
    """The most likely output for every row. (N,) int64, 0..C-1, or C for the virtual class"""
    model.eval()
    out = backend.xp.zeros(len(corpus), dtype=backend.xp.int64)
    for batch in every_row(corpus, backend, "predict", log):
        out[backend.array(batch.rows)] = backend.array(model(batch.images).argmax(1))
    backend.ranks.add_up(backend.tensor(out))
    return out
