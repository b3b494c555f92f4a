"""Plain NumPy arrays, for tools without a layout of their own: <name>.npy each, or one .npz.

images, labels       (N, H, W, 3) uint8 and (N,) whole numbers
is_poison, is_cover  (N,) bool, if known; without is_poison every row counts as clean
orig_labels          (N,) before relabelling, -1 where not known; else the clean data set's
test, test_labels    (M, H, W, 3) uint8 and (M,): held out; else the clean data set's
triggered            (T, H, W, 3) uint8, those of them that the attacker shows, with the trigger
attack_labels        (M,) what the attacker wants them to be, -1 for the M - T others
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
    Labels,
    Triggered,
    classes_of,
    labels_of,
    require_agreement,
    require_apart,
    require_images,
    require_rows,
    true_labels,
)
from csc_gpu.types import AnswerKey, Corpus, Log, Mask, Split, quiet

NEEDED, PER_ROW = ("images", "labels"), ("is_poison", "is_cover", "orig_labels")
TEST, TRIGGERED = ("test", "test_labels"), ("triggered", "attack_labels")
OPTIONAL = (*PER_ROW, *TEST, *TRIGGERED)
NAMES = frozenset(f"{name}.npy" for name in (*NEEDED, *OPTIONAL))
Arrays = dict[str, NDArray[Any]]


def read(source: Path, clean: Split | None, log: Log = quiet) -> Found:
    """A folder of .npy or an .npz. Raises CorpusError for arrays that do not fit together."""
    del log
    arrays = _folder(source) if source.is_dir() else load_arrays(source, NEEDED, OPTIONAL)
    images, n_rows = arrays["images"], len(np.atleast_1d(arrays["labels"]))
    _require_pixels(arrays, "images", source)
    for name in (*NEEDED, *PER_ROW):
        if name in arrays and arrays[name].shape[:1] != (n_rows,):
            shape = arrays[name].shape
            raise CorpusError(f"{source}: {name} has the shape {shape}, labels {n_rows} rows")
    require_images(images, clean, f"{source}")
    told = [name for name in ("labels", "test_labels", "attack_labels") if name in arrays]
    named = (classes_of(arrays[name], clean, f"{source}: {name}") for name in told)
    classes = max(named, key=len)
    labels = labels_of(arrays["labels"], len(classes), f"{source}: labels")
    is_poison, is_cover = (_mask(arrays, name, n_rows, source) for name in PER_ROW[:2])
    require_apart(is_poison, is_cover, f"{source}")
    if clean is not None:
        require_rows(clean, n_rows, f"{source}")
    test, triggered = _held_out(arrays, classes, clean, source)
    return Found(
        images=images,
        labels=labels,
        is_poison=is_poison,
        is_cover=is_cover,
        orig_labels=_true(arrays, is_poison, labels, len(classes), clean, f"{source}"),
        classes=classes,
        clean=clean,
        test=test,
        triggered=triggered,
    )


def write(folder: Path, split: Split, key: AnswerKey, out: Path) -> None:
    """All nine arrays into an empty directory."""
    del out
    arrays = {"images": split.train.images, "labels": key.given_labels}
    arrays |= {name: getattr(key, name) for name in OPTIONAL}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _folder(folder: Path) -> Arrays:
    arrays: Arrays = {}
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


def _require_pixels(arrays: Arrays, name: str, source: Path) -> None:
    """Raises CorpusError unless this array is RGB images, of the size of the training images."""
    images, size = arrays[name], arrays["images"].shape[1:]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise CorpusError(
            f"{source}: {name} must be (N, H, W, 3) uint8, but are {images.shape} {images.dtype}"
        )
    if images.shape[1:] != size:
        raise CorpusError(f"{source}: {name} has the shape {images.shape}, images {size} each")


def _held_out(
    arrays: Arrays, classes: tuple[str, ...], clean: Split | None, source: Path
) -> tuple[Corpus | None, Triggered | None]:
    """The held-out images that the set stores, and those with its trigger; None for none."""
    for names in (TEST, (*TEST, *TRIGGERED)):
        missing = [name for name in names if name not in arrays]
        if missing and any(name in arrays for name in names[-2:]):
            raise CorpusError(f"{source} has {names[-2]} or {names[-1]}, but no {missing[0]}")
    if "test" not in arrays:
        return None, None
    _require_pixels(arrays, "test", source)
    labels = labels_of(arrays["test_labels"], len(classes), f"{source}: test_labels")
    _require_as_many(arrays, "test", labels, "test_labels", source)
    if clean is not None:
        _require_as_many(arrays, "test", clean.test.labels, "test part of the clean set", source)
        known = np.ones(len(labels), bool)
        require_agreement(clean.test, labels, known, f"{source}: test_labels")
    test = Corpus(labels, classes, np.arange(len(labels)), ("",) * len(labels), arrays["test"])
    if "triggered" not in arrays:
        return test, None
    _require_pixels(arrays, "triggered", source)
    what = f"{source}: attack_labels"
    attacked = labels_of(arrays["attack_labels"], len(classes), what, UNKNOWN)
    _require_as_many(arrays, "test", attacked, "attack_labels", source)
    hit = attacked[attacked >= 0]
    _require_as_many(arrays, "triggered", hit, "attack_labels of 0 or more", source)
    return test, Triggered(arrays["triggered"], attacked) if len(hit) else None


def _require_as_many(arrays: Arrays, name: str, rows: Labels, of: str, source: Path) -> None:
    if len(arrays[name]) != len(rows):
        raise CorpusError(f"{source}: {name} holds {len(arrays[name])} images, {of} {len(rows)}")


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
    is_poison: Mask,
    labels: Labels,
    n_classes: int,
    clean: Split | None,
    what: str,
) -> Labels:
    """Original labels: as stored, where they are known, or the clean data set's. (N,)"""
    if "orig_labels" not in arrays:
        return true_labels(labels, is_poison, clean, what)
    stored = labels_of(arrays["orig_labels"], n_classes, f"{what}: orig_labels", UNKNOWN)
    if clean is None:
        return stored
    require_agreement(clean.train, stored, stored != UNKNOWN, f"{what}: orig_labels")
    return clean.train.labels
