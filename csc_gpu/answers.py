"""A poisoned corpus on disk with its answer key: what `csc-gpu poison` writes, `score` reads.

The corpus is a folder of PNGs like any other; only key.npz tells who is poison. So nothing else may
give it away: one encoder, files of one length, one modification time, names by row alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import harmless
from csc_gpu.data.arrays import load_arrays
from csc_gpu.data.folders import CLASS_LIST
from csc_gpu.errors import CorpusError
from csc_gpu.types import AnswerKey, Log, Mask, Split, quiet

WRITTEN = 946_684_800
"""When every image claims to have been written: 2000-01-01, in seconds since 1970."""
PER_ROW = ("is_poison", "is_cover", "orig_labels", "given_labels", "paths")
PER_TEST_ROW = ("test", "test_labels", "attack_labels")


def save_poisoned(out: Path, split: Split, key: AnswerKey, log: Log = quiet) -> None:
    """Write images, classes.txt, key.npz and recipe.json into an empty directory.

    Raises CorpusError for a class whose name cannot be that of a folder.
    """
    for name in split.train.classes:
        folder_name(name)
    total, done = len(split.train) + len(split.test), 0
    for part in (split.train, split.test):
        for path, image in zip(part.paths, part.images, strict=True):
            _write_png(out / path, image)
            done += 1
            log("write", done=done, total=total)
    lines = "".join(f"{name}\n" for name in split.train.classes)
    (out / CLASS_LIST).write_text(lines, encoding="utf-8")
    recipe = json.dumps(dict(key.recipe), indent=2)
    (out / "recipe.json").write_text(recipe + "\n", encoding="utf-8")
    _write_truth(out / "truth.csv", split.train.classes, key)
    arrays = {name: getattr(key, name) for name in (*PER_ROW, *PER_TEST_ROW, "triggered")}
    arrays["paths"] = np.array(key.paths, np.str_)
    np.savez_compressed(out / "key.npz", recipe=np.array(recipe), **arrays)


def load_key(path: Path) -> AnswerKey:
    """The answer key in a file; arrays that it does not know are ignored.

    Raises CorpusError for a file that is no .npz, a missing array, or arrays that do not match.
    """
    found = load_arrays(path, (*PER_ROW, *PER_TEST_ROW, "triggered", "recipe"))
    _require_equal(path, {name: _rows(found[name]) for name in PER_ROW})
    _require_equal(path, {name: _rows(found[name]) for name in PER_TEST_ROW})
    n_attacked = int((found["attack_labels"] >= 0).sum())
    _require_equal(path, {"triggered": _rows(found["triggered"]), "attack_labels >= 0": n_attacked})
    try:
        recipe: dict[str, Any] = json.loads(str(found["recipe"]))
    except json.JSONDecodeError as fault:
        raise CorpusError(f"{path}: recipe is not JSON: {fault}") from fault
    return AnswerKey(
        is_poison=found["is_poison"].astype(bool),
        is_cover=found["is_cover"].astype(bool),
        orig_labels=found["orig_labels"].astype(np.int64),
        given_labels=found["given_labels"].astype(np.int64),
        paths=tuple(map(str, found["paths"])),
        test=found["test"],
        triggered=found["triggered"],
        test_labels=found["test_labels"].astype(np.int64),
        attack_labels=found["attack_labels"].astype(np.int64),
        recipe=recipe,
    )


def folder_name(name: str) -> str:
    """The name of a class, which may be that of a folder; raises CorpusError if it may not."""
    if name == name.strip() != "" and name.isprintable() and "/" not in name and name[0] != ".":
        return name
    raise CorpusError(
        f"class {name!r} cannot be written as a folder: rename it, without '/', control "
        "characters, a leading '.' or spaces around it"
    )


def digest(image: NDArray[np.uint8]) -> str:
    """What tells this image (H, W, 3) from all others."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:32]


def is_among(images: NDArray[np.uint8], digests: Collection[str]) -> Mask:
    """Which images (M, H, W, 3) have one of these digests. (M,)"""
    known = frozenset(digests)
    return np.array([digest(image) in known for image in images], bool)


def without_test(key: AnswerKey, left_out: Mask) -> AnswerKey:
    """The key without these held-out images (M,), so that nobody is scored on what he was given."""
    kept = ~left_out
    return replace(
        key,
        test=key.test[kept],
        test_labels=key.test_labels[kept],
        attack_labels=key.attack_labels[kept],
        triggered=key.triggered[kept[key.attack_labels >= 0]],
    )


def _write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """One (H, W, 3) image; the length of the file tells H and W, and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "PNG", compress_level=0)
    os.utime(path, (WRITTEN, WRITTEN))


def _write_truth(path: Path, classes: tuple[str, ...], key: AnswerKey) -> None:
    """The key to the training rows as a table, for people; an unknown original label is empty."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "orig_label", "is_poison", "is_cover"))
        for row, name in enumerate(key.paths):
            original = key.orig_labels[row]
            labels = classes[key.given_labels[row]], classes[original] if original >= 0 else ""
            told = map(harmless.cell, (name, *labels))
            writer.writerow((*told, key.is_poison[row], key.is_cover[row]))


def _rows(array: NDArray[Any]) -> int:
    return len(array) if array.ndim else 0


def _require_equal(path: Path, lengths: dict[str, int]) -> None:
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise CorpusError(f"{path}: arrays of different lengths: {said}")
