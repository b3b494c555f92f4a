"""A corpus in shards: a folder of WebDataset tars, or of TFRecords, in train/ and test/ or neither.

Every shard is looked through once, headers and labels alone, and the places of its images are
remembered; a shard that has changed is looked through again. In a tar KEY.jpg, .jpeg or .png goes
with KEY.cls, the class index as text, or KEY.json, {"label": index}. A `classes.txt` names the
classes, one a line; without one the indices that occur are the classes.

Rows go by shard, in natural order, and by their place in it.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from csc_gpu import cache
from csc_gpu.data import tar, tfrecords
from csc_gpu.data.folders import CLASS_LIST, IMAGE_ENDINGS, images_in, listed_classes, subfolders
from csc_gpu.data.order import natural
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files
from csc_gpu.types import Corpus

PARTS = {"train": "train", "test": "test", "val": "test", "validation": "test"}
"""What folders of shards are called, and names of shards begin with."""
TAR = re.compile(r"\.tar$")
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$")
RECORDS = re.compile(r"\.tfrecords?$|-\d{5}-of-\d{5}$")
LARGEST_LABEL = 2**31 - 1
LONGEST_JSON = 1 << 20
"""Most bytes of a label in a tar."""
SCANS = 2
"""Raise it when shards are read otherwise than before: what is kept is then found out anew."""


class Image(NamedTuple):
    """An image in a shard."""

    name: str  # of its own, in the shard
    start: int  # bytes
    size: int  # bytes
    label: int


@dataclass(frozen=True)
class Table:
    """The images of a shard."""

    names: list[str]
    pieces: NDArray[np.int64]  # (N, 2) start and size in bytes
    labels: NDArray[np.int64]  # (N,) as the shard has them


def has_shards(folder: Path) -> bool:
    """Whether this is a folder of shards."""
    return any(True for _ in _shards(folder))


def open_shards(folder: Path) -> tuple[Corpus, Corpus | None]:
    """The train and test parts of a folder of shards; None if no shard is of the test part."""
    found = sorted(_shards(folder), key=lambda shard: natural(shard.as_posix()))
    kinds = {_kind(shard) for shard in found}
    if len(kinds) > 1:
        raise CorpusError(f"{folder} holds tars and TFRecords; put them into folders of their own")
    _require_no_images(folder)
    _require_all_read(folder)
    scan = scan_tar if kinds == {TAR} else tfrecords.scan
    classes = listed_classes(folder / CLASS_LIST)
    tables = [_scanned(folder / shard, scan) for shard in found]
    values = np.unique(np.concatenate([table.labels for table in tables]))
    for shard, table in zip(found, tables, strict=True):
        _require_labels(folder / shard, table, len(classes) or LARGEST_LABEL)
    if classes:
        values = np.arange(len(classes))
    names = classes or tuple(str(value) for value in values)
    parts = {
        part: [(s, t) for s, t in zip(found, tables, strict=True) if _part(s) == part]
        for part in ("train", "test")
    }
    corpora = {part: _corpus(folder, some, values, names) for part, some in parts.items() if some}
    if "train" not in corpora:
        raise CorpusError(f"{folder}: all shards are of the test part; there is none to train on")
    return corpora["train"], corpora.get("test")


def scan_tar(path: Path) -> Iterator[Image]:
    """Every image of a WebDataset shard; its members lie together, as the format has it."""
    keys = set()
    for key, of_key in _samples(path):
        if key in keys:
            raise CorpusError(f"{path}: two images are called {key!r}")
        keys.add(key)
        images = [ending for ending in of_key if f".{ending.lower()}" in IMAGE_ENDINGS]
        labels = {_label(path, member) for e, member in of_key.items() if e in ("cls", "json")}
        labels.discard(None)
        if not images and not labels:
            continue  # something else, which is nobody's business
        if len(images) != 1 or len(labels) != 1:
            has = f"{len(images)} images and {len(labels)} labels"
            raise CorpusError(f"{path}: {key!r} has {has}; it must have one of each")
        member = of_key[images[0]]
        if not member.size:
            raise CorpusError(f"{path}: {member.name!r} is empty")
        yield Image(member.name, member.start, member.size, labels.pop() or 0)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tar.Member]]]:
    """Neighbours of one key, by what follows the first dot of their file name."""
    last, of_key = "", dict[str, tar.Member]()
    for member in tar.members(path):
        folder, slash, file = member.name.rpartition("/")
        stem, _, ending = file.partition(".")
        key = folder + slash + stem
        if key != last and of_key:
            yield last, of_key
            of_key = {}
        if ending in of_key:
            raise CorpusError(f"{path}: two members are called {member.name!r}")
        last, of_key[ending] = key, member
    if of_key:
        yield last, of_key


def _label(path: Path, member: tar.Member) -> int | None:
    """The label that a .cls or .json gives, None if the latter gives none."""
    told = member.head
    if member.size > LONGEST_JSON:
        raise CorpusError(f"{path}: {member.name!r} is too large for a label")
    if member.size > len(told):
        with path.open("rb") as file:
            file.seek(member.start)
            told = file.read(member.size)
    try:
        if member.name.endswith(".cls"):
            return int(told.decode("ascii"))
        label = json.loads(told).get("label")
    except (ValueError, AttributeError, RecursionError) as fault:
        raise CorpusError(f"{path}: {member.name!r} holds no label") from fault
    if label is not None and type(label) is not int:
        raise CorpusError(f"{path}: {member.name!r} holds no label")
    return label


def _shards(folder: Path) -> Iterator[Path]:
    """Every shard in the folder or in its parts, relative to it."""
    for part in ("", *PARTS):
        for path in (folder / part).iterdir() if (folder / part).is_dir() else ():
            if COMPRESSED.search(path.name):
                raise CorpusError(f"{path} is compressed; unpack it first, to a .tar")
            if (TAR.search(path.name) or RECORDS.search(path.name)) and path.is_file():
                yield path.relative_to(folder)


def _kind(shard: Path) -> re.Pattern[str]:
    return TAR if TAR.search(shard.name) else RECORDS


def _part(shard: Path) -> str:
    if len(shard.parts) > 1:
        return PARTS[shard.parts[0]]
    return "test" if shard.name.lower().startswith(("test", "val")) else "train"


def _require_no_images(folder: Path) -> None:
    """Raises CorpusError for images in folders beside the shards: they would be passed over."""
    for part in ("", *PARTS):
        here = folder / part
        beside = subfolders(here) if here.is_dir() else []
        strange = [here / name for name in beside if images_in(here / name)]
        if strange:
            raise CorpusError(
                f"{folder} holds shards and a folder of images, {strange[0]}; move either away"
            )


def _require_all_read(folder: Path) -> None:
    """Raises CorpusError for shards in deeper or other folders: they would be passed over."""
    read = [folder / part for part in ("", *PARTS)]
    for here, names, files in (found for top in read for found in os.walk(top)):
        names[:] = [name for name in names if not name.startswith(".")]
        strange = [] if Path(here) in read else [name for name in files if _is_named_so(name)]
        if strange:
            raise CorpusError(
                f"{Path(here, strange[0])} would be passed over: shards are read from {folder} "
                f"and its folders {', '.join(PARTS)}; move it there, or away"
            )


def _is_named_so(name: str) -> bool:
    """Whether a file of this name is a shard, or a compressed one."""
    return any(kind.search(name) for kind in (TAR, COMPRESSED, RECORDS))


def _require_labels(path: Path, table: Table, limit: int) -> None:
    wrong = np.flatnonzero((table.labels < 0) | (table.labels >= limit))
    if len(wrong):
        label = table.labels[wrong[0]]
        raise CorpusError(
            f"{path}: {table.names[wrong[0]]!r} has the label {label}, not 0..{limit - 1}"
        )


def _scanned(path: Path, scan: Callable[[Path], Iterator[tuple[str, int, int, int]]]) -> Table:
    """The images of a shard, from what is kept about it if it has not changed since."""
    kept, now = cache.place("shard", path, ".npz"), [SCANS, *(cache.stamp(path) or ())]
    if (table := _recalled(kept, now)) is not None:
        return table
    names, numbers = [], []
    for name, *rest in scan(path):
        names.append(name)
        numbers.append(rest if abs(rest[2]) <= LARGEST_LABEL else [*rest[:2], -1])
    if not names:
        raise CorpusError(f"{path} holds no images")
    array = np.array(numbers, np.int64).reshape(-1, 3)
    file = io.BytesIO()
    joined = np.frombuffer("\n".join(names).encode(), np.uint8)
    np.savez(file, stamp=np.array(now), names=joined, numbers=array)
    cache.keep(kept, file.getvalue())
    return Table(names, array[:, :2], array[:, 2])


def _recalled(kept: Path, now: list[int]) -> Table | None:
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if archive["stamp"].tolist() != now:
                return None
            names = archive["names"].tobytes().decode().split("\n")
            array = archive["numbers"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return Table(names, array[:, :2], array[:, 2]) if array.shape == (len(names), 3) else None


def _corpus(
    folder: Path,
    some: list[tuple[Path, Table]],
    values: NDArray[np.int64],
    classes: tuple[str, ...],
) -> Corpus:
    """The rows of these shards; `values` are the labels that the classes have in them."""
    tables = [table for _, table in some]
    shards = tuple(shard.as_posix() for shard, _ in some)
    counts = [len(table.names) for table in tables]
    return Corpus(
        labels=np.searchsorted(values, np.concatenate([table.labels for table in tables])),
        classes=classes,
        ids=np.arange(sum(counts)),
        paths=tuple(
            f"{shard}/{name}" for shard, t in zip(shards, tables, strict=True) for name in t.names
        ),
        files=Files(
            folder,
            shards,
            np.repeat(np.arange(len(shards), dtype=np.int32), counts),
            np.concatenate([table.pieces for table in tables]),
        ),
    )
