"""A corpus as arrays in an .npz: x_train, y_train and, if rows are held out, x_test, y_test.

Images are (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8; labels are whole numbers (N,), whose
sorted values become the classes. Pickled objects are never loaded.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.errors import CorpusError
from csc_gpu.memory import free_memory
from csc_gpu.types import Corpus


def open_arrays(path: Path) -> tuple[Corpus, Corpus | None]:
    """The train and test parts of an .npz; None if it has no test part."""
    arrays = load_arrays(path, ("x_train", "y_train"), ("x_test", "y_test"))
    parts = ["train"]
    if "x_test" in arrays or "y_test" in arrays:
        _require(path, arrays, ("x_test", "y_test"))
        parts.append("test")
    images = [_images(path, f"x_{part}", arrays[f"x_{part}"]) for part in parts]
    labels = [_labels(path, part, arrays) for part in parts]
    values = np.unique(np.concatenate(labels))
    corpora = [
        Corpus(
            labels=np.searchsorted(values, given).astype(np.int64),
            classes=tuple(str(value) for value in values),
            ids=np.arange(len(given)),
            paths=tuple(f"{path.name}#{part}/{row}" for row in range(len(given))),
            pixels=pixels,
        )
        for part, pixels, given in zip(parts, images, labels, strict=True)
    ]
    return corpora[0], corpora[1] if len(corpora) == 2 else None


def load_arrays(
    path: Path, names: Collection[str], optional: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """The named arrays of an .npz, and the optional ones that it has; others are not touched.

    Raises CorpusError for a file that is no .npz, a missing array or a pickled one, and for arrays
    that unpacked are more than the memory that is free.
    """
    try:
        # opened here, for numpy leaves a file open that it does not understand
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            present = [name for name in (*names, *optional) if name in archive]
            parts = archive.zip.infolist()
            sizes = {part.filename.removesuffix(".npy"): part.file_size for part in parts}
            _require_room(path, sum(sizes[name] for name in present))
            arrays = {name: np.asarray(archive[name]) for name in present}
    except OSError as fault:
        raise CorpusError(f"cannot read {path}: {fault.strerror or fault}") from fault
    except (
        EOFError,
        ValueError,
        TypeError,
        OverflowError,
        RuntimeError,  # encrypted, or packed in a way that zipfile does not know
        zipfile.BadZipFile,
        zlib.error,
    ) as fault:
        raise CorpusError(f"{path} is no .npz of plain arrays (nothing pickled)") from fault
    except MemoryError as fault:
        raise CorpusError(
            f"{path}: an array does not fit into memory ({fault}), or its header is damaged"
        ) from fault
    _require(path, arrays, names)
    return arrays


def _require_room(path: Path, needed: int) -> None:
    """Raises CorpusError if arrays of so many bytes cannot be held: a small file may unpack so."""
    free = free_memory()
    if free is not None and needed > free:
        raise CorpusError(
            f"{path} unpacks to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; "
            "give it as an image folder or shards, which are read as they are needed"
        )


def rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey (N, H, W) or (N, H, W, 1), or colour, as colour. (N, H, W, 3)"""
    if images.ndim == 3:
        images = images[..., None]
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


def _require(path: Path, arrays: Collection[str], names: Collection[str]) -> None:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise CorpusError(f"{path} has no array {', '.join(missing)}")


def _images(path: Path, name: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        raise CorpusError(f"{path}: {name} must be uint8, 0..255, but is {images.dtype}")
    if images.ndim != 3 and (images.ndim != 4 or images.shape[-1] not in (1, 3)):
        raise CorpusError(
            f"{path}: {name} must be (N, H, W), (N, H, W, 1) or (N, H, W, 3), but is {images.shape}"
        )
    return rgb(images)


def _labels(path: Path, part: str, arrays: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise CorpusError(
            f"{path}: y_{part} must be (N,) whole numbers, but is {labels.shape} {labels.dtype}"
        )
    if len(labels) != len(images):
        raise CorpusError(
            f"{path}: {len(images)} images in x_{part} but {len(labels)} labels in y_{part}"
        )
    return labels.astype(np.int64)
