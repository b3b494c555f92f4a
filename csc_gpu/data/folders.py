"""A corpus as image files, a folder for each class: train/<class>/ and test/<class>/, or <class>/.

The held-out part may also be called as Hugging Face has it, validation/ among others.

Rows go by file name first and class second, in natural order, so that row i of a poisoned set is
the file numbered i. A `classes.txt` gives the classes and their order, one name a line; else they
are the folders that hold images, sorted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from csc_gpu import cache
from csc_gpu.data.order import class_order, natural
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files
from csc_gpu.types import Corpus

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")
CLASS_LIST = "classes.txt"
HELD_OUT = ("test", "validation", "valid", "val", "dev")
"""What the part that is held out may be called; the first that is there is taken, no other read."""

WORTH_KEEPING = 10_000
"""Images from which on a listing is kept: shorter ones take no time."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a change would show in a folder's date."""

Listing = list[tuple[str, str]]
"""(file name, class), one for each image."""


def open_folder(folder: Path) -> tuple[Corpus, Corpus | None]:
    """The train and test parts of a folder of image files; None if it has no test part."""
    parts = parts_of(folder) if _has_classes(folder / "train") else [""]
    listings = [_listing(folder / part) for part in parts]
    present = class_order(name for listing in listings for _, name in listing)
    classes = listed_classes(folder / CLASS_LIST) or present
    unlisted = [name for name in present if name not in classes]
    if unlisted:
        raise CorpusError(
            f"{folder / CLASS_LIST} does not name the class folder {unlisted[0]!r}; add it there"
        )
    corpora = [
        _corpus(folder, part, listing, classes)
        for part, listing in zip(parts, listings, strict=True)
    ]
    return corpora[0], corpora[1] if len(corpora) == 2 else None


def parts_of(folder: Path) -> list[str]:
    """train and the part held out, if it has one; [""] if it has no parts."""
    if not (folder / "train").is_dir():
        return [""]
    return ["train", *[name for name in HELD_OUT if (folder / name).is_dir()][:1]]


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and bool(subfolders(folder))


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in it, but for hidden ones."""
    with os.scandir(folder) as entries:
        return [e.name for e in entries if _is_folder(e) and not e.name.startswith(".")]


def images_in(folder: Path) -> list[str]:
    """The names of the images that lie directly in it."""
    # by name alone: a link to nowhere must be listed, to be found broken later
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMAGE_ENDINGS)
            and not entry.name.startswith(".")
            and not _is_folder(entry)
        ]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def images_below(folder: Path) -> Iterator[Path]:
    """Every image in the folder and its subfolders, in natural order; links to folders are left."""
    for here, names, _ in os.walk(folder):
        names[:] = sorted((n for n in names if not n.startswith(".")), key=natural)
        yield from (Path(here, name) for name in sorted(images_in(Path(here)), key=natural))


def _listing(folder: Path) -> Listing:
    """Every image and its class, in order; kept where it is long, and true until a folder changes.

    A change shows in the date of the folder that it lies in. One of the last moments might leave
    the date as it is, so folders that young are listed anew.
    """
    names = subfolders(folder)
    dates = {name: (folder / name).stat().st_mtime_ns for name in (".", *names)}
    kept = cache.place("listing", folder, ".json")
    listing = _recalled(kept, dates)
    if listing is None:
        listing = _walked(folder, names)
        settled = max(dates.values()) < time.time_ns() - SETTLED
        if len(listing) >= WORTH_KEEPING and settled:
            told = {"dates": dates, "files": [file for file, _ in listing]}
            place = {name: at for at, name in enumerate(names)}
            classes = [place[name] for _, name in listing]
            cache.keep(kept, json.dumps(told | {"names": names, "classes": classes}).encode())
    return listing


def _recalled(kept: Path, dates: dict[str, int]) -> Listing | None:
    """The listing that is kept, None if there is none or folders have changed since."""
    try:
        told = json.loads(kept.read_bytes())
        if told["dates"] != dates:
            return None
        names = told["names"]
        return [(file, names[at]) for file, at in zip(told["files"], told["classes"], strict=True)]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _walked(folder: Path, names: list[str]) -> Listing:
    found = [(file, name) for name in names for file in images_in(folder / name)]
    if not found:
        fault = "images lie directly in it" if images_in(folder) else "no images in class folders"
        raise CorpusError(
            f"{folder}: {fault}; put every .jpg, .jpeg or .png into a folder named after its class"
        )
    classes = {name: natural(name) for _, name in found}
    return sorted(found, key=lambda row: (natural(row[0]), classes[row[1]]))


def listed_classes(path: Path) -> tuple[str, ...]:
    """The names in classes.txt, () if there is no such file."""
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as fault:
        raise CorpusError(f"{path} is not UTF-8 text") from fault
    classes = tuple(line.strip() for line in lines if line.strip())
    if len(set(classes)) < len(classes):
        raise CorpusError(f"{path} names a class twice")
    return classes


def _corpus(folder: Path, part: str, listing: Listing, classes: tuple[str, ...]) -> Corpus:
    label = {name: place for place, name in enumerate(classes)}
    prefix = f"{part}/" if part else ""
    paths = tuple(f"{prefix}{name}/{file}" for file, name in listing)
    return Corpus(
        labels=np.array([label[name] for _, name in listing], np.int64),
        classes=classes,
        ids=np.arange(len(listing)),
        paths=paths,
        files=Files.whole(folder, paths),
    )
