"""Plain NumPy arrays, for tools without a layout of their own: <name>.npy each, or one .npz.

images, labels       (N, H, W, 3) uint8 and (N,) whole numbers
is_poison, is_cover  (N,) bool, if known; without is_poison every row counts as clean
orig_labels          (N,) before relabelling, -1 where not known; else the clean data set's
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.data.arrays import load_arrays
from csc_gpu.errors import CorpusError
from csc_gpu.foreign.found import (
    UNKNOWN,
    Found,
    classes_of,
    labels_of,
    require_agreement,
    require_apart,
    require_images,
    require_rows,
    true_labels,
)
from csc_gpu.types import AnswerKey, Log, Mask, Split, quiet

NEEDED, OPTIONAL = ("images", "labels"), ("is_poison", "is_cover", "orig_labels")
NAMES = frozenset(f"{name}.npy" for name in (*NEEDED, *OPTIONAL))
Arrays = dict[str, NDArray[Any]]


def read(source: Path, clean: Split | None, log: Log = quiet) -> Found:
    """A folder of .npy or an .npz. Raises CorpusError for arrays that do not fit together."""
    del log
    arrays = _folder(source) if source.is_dir() else load_arrays(source, NEEDED, OPTIONAL)
    images, n_rows = arrays["images"], len(np.atleast_1d(arrays["labels"]))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise CorpusError(
            f"{source}: images must be (N, H, W, 3) uint8, but are {images.shape} {images.dtype}"
        )
    for name, array in arrays.items():
        if array.shape[:1] != (n_rows,):
            raise CorpusError(f"{source}: {name} has the shape {array.shape}, labels {n_rows} rows")
    require_images(images, clean, f"{source}")
    classes = classes_of(arrays["labels"], clean, f"{source}: labels")
    labels = labels_of(arrays["labels"], len(classes), f"{source}: labels")
    is_poison, is_cover = (_mask(arrays, name, n_rows, source) for name in OPTIONAL[:2])
    require_apart(is_poison, is_cover, f"{source}")
    if clean is not None:
        require_rows(clean, n_rows, f"{source}")
    return Found(
        images=images,
        labels=labels,
        is_poison=is_poison,
        is_cover=is_cover,
        orig_labels=_true(arrays, labels, is_poison, clean, f"{source}"),
        classes=classes,
        clean=clean,
    )


def write(folder: Path, split: Split, key: AnswerKey, out: Path) -> None:
    """All five arrays into an empty directory."""
    del out
    arrays = {"images": split.train.images, "labels": key.given_labels}
    arrays |= {name: getattr(key, name) for name in OPTIONAL}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _folder(folder: Path) -> Arrays:
    arrays = {}
    for name in (*NEEDED, *OPTIONAL):
        path = folder / f"{name}.npy"
        if name in OPTIONAL and not path.exists():
            continue
        try:
            # mapped, so that what a damaged header claims is compared with the file, not allocated
            arrays[name] = np.lib.format.open_memmap(path, mode="r")
        except OSError as fault:
            raise CorpusError(f"cannot read {path}: {fault.strerror or fault}") from fault
        except (EOFError, ValueError, OverflowError) as fault:
            raise CorpusError(
                f"{path} is no .npy of plain numbers (nothing pickled), or is cut short"
            ) from fault
    return arrays


def _mask(arrays: Arrays, name: str, n_rows: int, source: Path) -> Mask:
    found = arrays.get(name, np.zeros(n_rows, bool))
    if (
        found.shape != (n_rows,)
        or found.dtype.kind not in "biu"
        or not np.isin(found, (0, 1)).all()
    ):
        raise CorpusError(f"{source}: {name} must be true or false for each row")
    return found.astype(bool)


def _true(
    arrays: Arrays,
    labels: NDArray[np.int64],
    is_poison: Mask,
    clean: Split | None,
    what: str,
) -> NDArray[np.int64]:
    """Original labels: as stored, where they are known, or the clean data set's. (N,)"""
    if "orig_labels" not in arrays:
        return true_labels(labels, is_poison, clean, what)
    most = labels.max() if clean is None else clean.train.n_classes - 1
    stored = labels_of(arrays["orig_labels"], int(most) + 1, f"{what}: orig_labels", UNKNOWN)
    if clean is None:
        return stored
    require_agreement(clean.train, stored, stored != UNKNOWN, f"{what}: orig_labels")
    return clean.train.labels
