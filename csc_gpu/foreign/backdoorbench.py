"""BackdoorBench: a record/<run> directory holds the stamped images alone, to lay over a clean set.

    attack_result.pt                              dict: num_classes, bd_train, bd_test, ...
    bd_train_dataset/<ORIGINAL label>/<row>.png   stamped training rows, numbered as the clean set's
    bd_test_dataset/<ORIGINAL label>/<row>.png    triggered test rows
    train_poison_index_list.pickle                by torch.save, despite its name: 0. or 1. a row
    cover_indices                                 ours alone: which flagged rows are covers

Read as an image folder such a set looks clean. bd_train and bd_test give each row's new label;
their `poison_indicator` counts rows of the clean set, not places in the view. The clean set's
pixels must be those the attack started from: among JPEG copies the stamped rows would stand out.

Training-controlled attacks (WaNet, input-aware) flag covers as poison, too. A cover keeps its
label; so does poison that was of the target class before. `parted` tells them apart where it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.errors import CorpusError
from csc_gpu.foreign import torch_files
from csc_gpu.foreign.base import read_images, write_image
from csc_gpu.foreign.found import (
    Found,
    Labels,
    Triggered,
    labels_of,
    mask_of,
    plain_array,
    refuse_mislabelled,
    require_agreement,
    require_images,
    whole_numbers,
)
from csc_gpu.types import AnswerKey, Corpus, Log, Mask, Split, quiet

RESULT, COVERS, INDEX_LIST = "attack_result.pt", "cover_indices", "train_poison_index_list.pickle"
FOLDERS = {"bd_train": "bd_train_dataset", "bd_test": "bd_test_dataset"}
NAMES = frozenset({RESULT, COVERS, INDEX_LIST, *FOLDERS.values()})
PNG = ".png"
COMPARED = 256
"""Stamped rows that are compared with the clean set."""


@dataclass(frozen=True)
class View:
    """bd_train or bd_test: the rows it holds of a clean part, and what is stamped on whom."""

    rows: Labels  # (V,) of the clean part, in the order of the view
    stamped: Mask  # (N,) by row of the clean part
    labels: Labels  # (N,) the new label of stamped rows, the old one of others


# --- reading --------------------------------------------------------------------------------------


def read(folder: Path, clean: Split | None, log: Log = quiet) -> Found:
    """A record directory. Raises CorpusError for what does not fit together, or the clean set."""
    if clean is None:
        raise CorpusError(
            f"{folder} holds the stamped images alone: give the data set that the attack started "
            "from with --clean, in its order"
        )
    what = f"{folder / RESULT}"
    result = _entries(torch_files.load(folder / RESULT), what)
    count = result.get("num_classes")
    if not isinstance(count, int | np.integer) or count != clean.train.n_classes:
        raise CorpusError(
            f"{what} has num_classes {_shortly(count)}, but the clean data set "
            f"{clean.train.n_classes} classes"
        )
    view = _view(result, "bd_train", clean.train, what)
    images = clean.train.images.copy()
    stamped = _stamped(folder, "bd_train", view, clean.train, log)
    images[view.stamped] = stamped
    images = images[view.rows]
    require_images(images, None, what)
    triggered = _triggered(folder, result, clean.test, log)
    near = {"bd_train": _nearer(stamped, clean.train.images[view.stamped])}
    if triggered is not None:
        attacked = clean.test.images[triggered.attack_labels >= 0]
        near["bd_test"] = _nearer(triggered.images, attacked)
    is_cover, unsure = _covers(folder, view, clean.train)
    return Found(
        images=images,
        labels=view.labels[view.rows],
        is_poison=(view.stamped & ~is_cover)[view.rows],
        is_cover=is_cover[view.rows],
        orig_labels=clean.train.labels[view.rows],
        classes=clean.train.classes,
        clean=replace(clean, train=clean.train.take(view.rows)),
        triggered=triggered,
        notes={
            "flagged": int(view.stamped.sum()),
            "flagged_maybe_covers": unsure,
            "own_row_nearer": {name: share for name, share in near.items() if share is not None},
        },
    )


def _triggered(folder: Path, result: Mapping[Any, Any], test: Corpus, log: Log) -> Triggered | None:
    """The stored triggered test images, by row; None if the run kept none."""
    if result.get("bd_test") is None:
        return None
    view = _view(result, "bd_test", test, f"{folder / RESULT}")
    images = _stamped(folder, "bd_test", view, test, log)
    return Triggered(images, np.where(view.stamped, view.labels, -1))


def _view(result: Mapping[Any, Any], name: str, part: Corpus, what: str) -> View:
    """Which rows of the clean part a view holds, and the labels it gives them."""
    what, n_rows = f"{what}: {name}", len(part)
    if result.get(name) is None:
        raise CorpusError(f"{what} is None: the run kept no such set")
    state = _entries(result[name], what)
    rows = whole_numbers(state.get("original_index_array"), f"{what}: original_index_array")
    held = mask_of(rows, n_rows, f"{what}: original_index_array")
    stamped = held & _flags(state.get("poison_indicator"), n_rows, f"{what}: poison_indicator")
    container = _entries(state.get("bd_data_container"), f"{what}: bd_data_container")
    form = container.get("save_file_format", PNG)
    if not isinstance(form, str) or form != PNG:
        raise CorpusError(f"{what}: images are {_shortly(form)}, not {PNG}")
    told = _entries(container.get("data_dict"), f"{what}: data_dict")
    labels, true = part.labels.copy(), part.labels.copy()
    for row in np.flatnonzero(stamped).tolist():
        labels[row], true[row] = _label_pair(told, row, part.n_classes, f"{what}: data_dict")
    require_agreement(part, true, stamped, what)
    return View(rows, stamped, labels)


def _entries(value: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise CorpusError(f"{what} must be a dict, but is a {type(value).__name__}")
    return value


def _shortly(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, int | str) else f"a {type(value).__name__}"


def _flags(indicator: Any, n_rows: int, what: str) -> Mask:
    """0 or 1 for each row of the clean part. (N,) bool"""
    wanted = "0 or 1 for each row"
    found = plain_array(indicator, what, wanted)
    if found.shape != (n_rows,):
        raise CorpusError(
            f"{what} has the shape {found.shape}, but the clean data set {n_rows} rows: "
            "--clean must be what the attack started from, in its order"
        )
    if found.dtype.kind not in "biuf" or not np.isin(found, (0, 1)).all():
        raise CorpusError(f"{what} must be {wanted}")
    return found.astype(bool)


def _label_pair(told: Mapping[Any, Any], row: int, n_classes: int, what: str) -> Labels:
    """(new label, original label) of a stamped row."""
    if row not in told:
        raise CorpusError(f"{what} lacks row {row}, which is flagged as poison")
    pair = _entries(told[row], f"{what}: row {row}").get("other_info")
    pair = list(pair) if isinstance(pair, list | tuple) else pair
    labels = labels_of(pair, n_classes, f"{what}: row {row}: other_info")
    if len(labels) != 2:
        raise CorpusError(f"{what}: row {row}: other_info must be [new label, original label]")
    return labels


def _stamped(folder: Path, name: str, view: View, part: Corpus, log: Log) -> NDArray[np.uint8]:
    """The stored image of every stamped row, by row. Folders bear the original label."""
    rows = np.flatnonzero(view.stamped).tolist()
    files = [folder / FOLDERS[name] / str(part.labels[row]) / f"{row}{PNG}" for row in rows]
    images = read_images(files, log)
    if not rows:
        return np.zeros((0, *part.images.shape[1:]), np.uint8)
    if images.shape[1:] != part.images.shape[1:]:
        (height, width), (high, wide) = images.shape[1:3], part.images.shape[1:3]
        raise CorpusError(
            f"{folder / FOLDERS[name]} holds images of {height}x{width}, the clean data set of "
            f"{high}x{wide}: resize that as the attack did"
        )
    return images


def _nearer(stamped: NDArray[np.uint8], clean: NDArray[np.uint8]) -> float | None:
    """Share of images that are nearer to the clean image of their row than to that of the next.

    Of the first rows that are not black, as an export leaves them; None if there are not two.
    """
    rows = np.flatnonzero(clean.any(axis=(1, 2, 3)))[:COMPARED]
    if len(rows) < 2:
        return None
    theirs, ours = stamped[rows].astype(np.float32), clean[rows]
    own, other = (
        np.abs(theirs - some).mean(axis=(1, 2, 3)) for some in (ours, np.roll(ours, 1, 0))
    )
    return float((own <= other).mean())


# --- covers ---------------------------------------------------------------------------------------


def _covers(folder: Path, view: View, train: Corpus) -> tuple[Mask, int]:
    """The flagged rows that are covers, (N,), and how many others may be some, too."""
    if not (folder / COVERS).exists():
        return parted(view.stamped, view.labels, train.labels, train.n_classes)
    is_cover = mask_of(torch_files.load(folder / COVERS), len(train), f"{folder / COVERS}")
    wrong = is_cover & (~view.stamped | (view.labels != train.labels))
    if wrong.any():
        raise CorpusError(
            f"{folder / COVERS} names row {int(wrong.argmax())}, which is not flagged or has "
            "another label than before: that is no cover"
        )
    return is_cover, 0


def parted(flagged: Mask, labels: Labels, true: Labels, n_classes: int) -> tuple[Mask, int]:
    """The covers among flagged rows, (N,), and how many rows are left in doubt, as poison.

    A flagged row with a new label is poison, one that keeps a label which is nobody's target a
    cover. If there is such a cover, the flagged rows of the target class may be either: where every
    batch of training began with k rows of poison and then covers, their place in it tells.
    """
    changed = flagged & (labels != true)
    targets = np.unique(labels[changed])
    to_the_next = len(targets) > 1 and (labels == (true + 1) % n_classes)[changed].all()
    kept = flagged & ~changed
    either = kept & np.isin(labels, targets) & (not to_the_next)
    cover = kept & ~either
    if not changed.any() or not cover.any():  # clean labels, or poison drawn from every class
        return np.zeros(len(flagged), bool), 0
    size = batch_size(flagged)
    if size is None:
        return cover, int(either.sum())
    place = np.arange(len(flagged)) % size
    short = len(flagged) % size
    in_short = np.arange(len(flagged)) >= len(flagged) - short
    least, most = _bounds(place, changed & ~in_short, cover & ~in_short, 0, size)
    if least > most:
        return cover, int(either.sum())
    poison, covers = either & ~in_short & (place < least), either & ~in_short & (place >= most)
    if short:  # there k is int(rate * short), and rate in [k / size, (k + 1) / size)
        bounds = least * short // size, -(-(most + 1) * short // size)
        least, most = _bounds(place, changed & in_short, cover & in_short, *bounds)
        most = max(least, most)
        poison |= either & in_short & (place < least)
        covers |= either & in_short & (place >= most)
    return cover | covers, int((either & ~poison & ~covers).sum())


def _bounds(place: Labels, poison: Mask, cover: Mask, least: int, most: int) -> tuple[int, int]:
    """Between which numbers k lies, if poison has the places 0..k-1 and covers come later."""
    return (
        int(max(least, place[poison].max(initial=-1) + 1)),
        int(min(most, place[cover].min(initial=most))),
    )


def batch_size(flagged: Mask) -> int | None:
    """So many rows a batch has, if each begins with the same number of flagged rows, or with none.

    The last may be shorter. None for flags that lie otherwise.
    """
    edges = np.flatnonzero(np.diff(flagged, prepend=False, append=False))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    size = int(np.gcd.reduce(starts)) or len(flagged)
    whole = starts + size <= len(flagged)
    if lengths.max() > size or len(set(lengths[whole].tolist())) > 1:
        return None
    return size


# --- writing --------------------------------------------------------------------------------------


def write(folder: Path, split: Split, key: AnswerKey, out: Path) -> None:
    """The same files into an empty directory that will be called `out`. No model is inside.

    As there, target images are left out of an all-to-one test, and covers are flagged as poison;
    bd_test is None where no image is attacked.
    """
    refuse_mislabelled(key, "backdoorbench")
    train, stamped = split.train, key.is_poison | key.is_cover
    bd_train = _write_view(
        folder, out, "bd_train", stamped, train.images[stamped], key.given_labels, key.orig_labels
    )
    attacked = key.attack_labels >= 0
    others = attacked & (key.attack_labels != key.test_labels)
    images = key.triggered[others[attacked]]
    bd_test = _write_view(
        folder, out, "bd_test", others, images, key.attack_labels, key.test_labels
    )
    bd_test["original_index_array"] = np.flatnonzero(others)
    result = {
        "model_name": "none",
        "num_classes": train.n_classes,
        "model": {},
        "data_path": f"data/{out.name}",  # their loader wants "data" in it
        "img_size": [*train.image_size, 3],
        "clean_data": f"csc-gpu export {out.name}",  # theirs are one word: none is built by mistake
        "bd_train": bd_train | {"original_index_array": np.arange(len(train))},
        # an empty array would need the global `bytes`, which is on nobody's list
        "bd_test": bd_test if others.any() else None,
    }
    torch_files.save(result, folder / RESULT)
    torch_files.save(stamped.astype(np.float64), folder / INDEX_LIST)
    if key.is_cover.any():
        torch_files.save(np.flatnonzero(key.is_cover).tolist(), folder / COVERS)


def _write_view(
    folder: Path,
    out: Path,
    name: str,
    stamped: Mask,
    images: NDArray[np.uint8],
    labels: Labels,
    true: Labels,
) -> dict[str, Any]:
    """The images of stamped rows, and what attack_result.pt says of them."""
    told, inside = {}, FOLDERS[name]
    (folder / inside).mkdir()
    for row, image in zip(np.flatnonzero(stamped).tolist(), images, strict=True):
        at = f"{inside}/{true[row]}/{row}{PNG}"
        write_image(folder / at, image)
        told[row] = {"path": f"{out}/{at}", "other_info": [int(labels[row]), int(true[row])]}
    container = {
        "save_folder_path": f"{out}/{inside}",
        "data_dict": told,
        "save_file_format": PNG,
    }
    return {
        "bd_data_container": container,
        "getitem_all": True,
        "getitem_all_switch": False,
        "poison_indicator": stamped.astype(np.float64),
        "save_folder_path": f"{out}/{inside}",
    }
