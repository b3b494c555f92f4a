"""What another tool's poisoned set says, and the checks that all layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.attacks import Stamp
from csc_gpu.errors import CorpusError
from csc_gpu.types import AnswerKey, Corpus, Mask, Split

Labels = NDArray[np.int64]
UNKNOWN = -1
"""The original label of a relabelled row whose clean image nobody gave."""
MOST_CLASSES = 100_000
"""A larger label without a clean data set is taken for damage."""


@dataclass(frozen=True)
class Triggered:
    """Held-out images that the set itself stores with its trigger."""

    images: NDArray[np.uint8]  # (T, H, W, 3) those with an attack label, in order
    attack_labels: Labels  # (M,) what the attacker wants; -1: not under attack, T others


@dataclass(frozen=True)
class Found:
    """A poisoned training set as another tool left it: nothing shuffled, nothing renamed."""

    images: NDArray[np.uint8]  # (N, H, W, 3)
    labels: Labels  # (N,) as they are trained on
    is_poison: Mask  # (N,)
    is_cover: Mask  # (N,) stamped, with their true label
    orig_labels: Labels  # (N,) before relabelling; -1: not known
    classes: tuple[str, ...]  # C names
    clean: Split | None  # what the attack started from, row by row, if it was given
    test: Corpus | None = None  # held-out images that the set itself stores; None: the clean set's
    triggered: Triggered | None = None  # None: the set stores none
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """Attack name -> its stamp with what the set stores of its trigger."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else the set says, for the recipe."""


def plain_array(values: Any, what: str, wanted: str) -> NDArray[Any]:
    """A list, array or tensor as an array; a tensor's memory is shared, not copied.

    Raises CorpusError, `what` must be `wanted`, for anything else that a file may hold: ragged
    lists, tensors that are sparse, quantised, on no device, or in a list and part of a graph; and
    for a tensor that repeats its few numbers so as to seem larger than the file.
    """
    try:
        if isinstance(values, torch.Tensor):
            if values.nbytes > values.untyped_storage().nbytes():
                raise CorpusError(f"{what} claims {tuple(values.shape)}, more than the file holds")
            values = values.detach()
            values = values.float() if values.dtype == torch.bfloat16 else values
            values = values.numpy()
        if isinstance(values, np.ndarray | list | tuple):
            return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as fault:
        raise CorpusError(f"{what} must be {wanted}") from fault
    raise CorpusError(f"{what} must be {wanted}")


def whole_numbers(values: Any, what: str) -> Labels:
    """A list, array or tensor of whole numbers. (N,) int64

    Raises CorpusError, which begins with `what`, for anything else.
    """
    wanted = "whole numbers, one a row"
    found = plain_array(values, what, wanted)
    if found.shape == (0,):
        return np.zeros(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.max() > np.iinfo(np.int64).max:
        raise CorpusError(f"{what} must be {wanted}")
    return found.astype(np.int64)


def labels_of(values: Any, n_classes: int, what: str, least: int = 0) -> Labels:
    """Labels least..C-1. (N,) int64; raises CorpusError, which begins with `what`, for others."""
    labels = whole_numbers(values, what)
    wrong = (labels < least) | (labels >= n_classes)
    if wrong.any():
        row = int(wrong.argmax())
        there = f"there are {least}..{n_classes - 1}" if n_classes else "labels count from 0"
        raise CorpusError(f"{what}: row {row} has label {labels[row]}, but {there}")
    return labels


def mask_of(indices: Any, n_rows: int, what: str) -> Mask:
    """The rows that a list of indices names. (N,) bool

    Raises CorpusError, which begins with `what`, for rows out of range or named twice.
    """
    rows = whole_numbers(indices, what)
    outside = rows[(rows < 0) | (rows >= n_rows)]
    if len(outside):
        raise CorpusError(f"{what} names row {outside[0]}, but there are 0..{n_rows - 1}")
    values, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise CorpusError(f"{what} names row {values[counts > 1][0]} twice")
    mask = np.zeros(n_rows, bool)
    mask[rows] = True
    return mask


def require_apart(is_poison: Mask, is_cover: Mask, what: str) -> None:
    """Raises CorpusError, which begins with `what`, for a row that is poison and cover."""
    if (is_poison & is_cover).any():
        row = int((is_poison & is_cover).argmax())
        raise CorpusError(f"{what}: row {row} is both poison and cover")


def require_rows(clean: Split, n_rows: int, what: str) -> None:
    """Raises CorpusError unless the clean data set has as many training rows as the set."""
    if len(clean.train) != n_rows:
        raise CorpusError(
            f"{what} has {n_rows} rows, but the clean data set {len(clean.train)} to train on: "
            "--clean must be what the attack started from, in its order"
        )


def require_agreement(part: Corpus, true: Labels, known: Mask, what: str) -> None:
    """Raises CorpusError where a known true label is not that of the clean data set."""
    wrong = known & (part.labels != true)
    if wrong.any():
        row = int(wrong.argmax())
        raise CorpusError(
            f"{what}: row {row} has the true label {true[row]} and "
            f"{part.labels[row]} in the clean data set ({int(wrong.sum())} rows differ): "
            "--clean must be what the attack started from, in its order"
        )


def true_labels(labels: Labels, is_poison: Mask, clean: Split | None, what: str) -> Labels:
    """Labels before relabelling: of the clean data set, or as given where no row is poison. (N,)

    Raises CorpusError if a row that is no poison has another label in the clean data set.
    """
    if clean is None:
        return np.where(is_poison, UNKNOWN, labels)
    require_agreement(clean.train, labels, ~is_poison, what)
    return clean.train.labels


def classes_of(labels: Any, clean: Split | None, what: str) -> tuple[str, ...]:
    """The clean data set's classes, or as many numbers as the labels need. C names"""
    if clean is not None:
        return clean.train.classes
    largest = int(whole_numbers(labels, what).max(initial=-1))
    if largest >= MOST_CLASSES:
        raise CorpusError(f"{what}: {largest} is no label: there may be {MOST_CLASSES} classes")
    return tuple(map(str, range(largest + 1)))


def require_images(images: NDArray[np.uint8], clean: Split | None, what: str) -> None:
    """Raises CorpusError for no images or none with pixels, or a clean set of another size."""
    if not images.size:
        size = f" of more than {images.shape[1]}x{images.shape[2]} pixels" if len(images) else ""
        raise CorpusError(f"{what} holds no images{size}")
    if clean is not None and clean.test.images.shape[1:] != images.shape[1:]:
        (height, width), (high, wide) = images.shape[1:3], clean.test.images.shape[1:3]
        raise CorpusError(
            f"{what} holds images of {height}x{width}, the clean data set of {high}x{wide}: "
            "resize that as the attack did"
        )


def refuse_mislabelled(key: AnswerKey, layout: str) -> None:
    """Raises CorpusError for false labels without a trigger, which a layout cannot tell."""
    noisy = ~key.is_poison & (key.orig_labels != key.given_labels)
    if noisy.any():
        raise CorpusError(
            f"{int(noisy.sum())} rows have a false label and no trigger (--label-noise), which "
            f"{layout} cannot tell apart from poison; export to npy"
        )
