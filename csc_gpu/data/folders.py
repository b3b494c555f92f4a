"""A corpus as image files, a folder for each class: train/<class>/ and test/<class>/, or <class>/.

Rows go by file name first and class second, in natural order, so that row i of a poisoned set is
the file numbered i. A `classes.txt` gives the classes and their order, one name a line; else they
are the folders that hold images, sorted.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from csc_gpu.data.order import class_order, natural
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files
from csc_gpu.types import Corpus

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")
CLASS_LIST = "classes.txt"

Listing = list[tuple[str, str]]
"""(file name, class), one for each image."""


def open_folder(folder: Path) -> tuple[Corpus, Corpus | None]:
    """The train and test parts of a folder of image files; None if it has no test part."""
    parts = [""]
    if (folder / "train").is_dir() and _subfolders(folder / "train"):
        parts = ["train", "test"] if (folder / "test").is_dir() else ["train"]
    listings = [_listing(folder / part) for part in parts]
    present = class_order(name for listing in listings for _, name in listing)
    classes = _listed_classes(folder / CLASS_LIST, present) or present
    corpora = [
        _corpus(folder, part, listing, classes)
        for part, listing in zip(parts, listings, strict=True)
    ]
    return corpora[0], corpora[1] if len(corpora) == 2 else None


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _images(folder: Path) -> list[str]:
    # by name alone: a link to nowhere must be listed, to be found broken later
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMAGE_ENDINGS)
            and not entry.name.startswith(".")
            and not entry.is_dir()
        ]


def _listing(folder: Path) -> Listing:
    found = [(file, name) for name in _subfolders(folder) for file in _images(folder / name)]
    if not found:
        fault = "images lie directly in it" if _images(folder) else "no images in class folders"
        raise CorpusError(
            f"{folder}: {fault}; put every .jpg, .jpeg or .png into a folder named after its class"
        )
    classes = {name: natural(name) for _, name in found}
    return sorted(found, key=lambda row: (natural(row[0]), classes[row[1]]))


def _listed_classes(path: Path, present: tuple[str, ...]) -> tuple[str, ...]:
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
    unlisted = [name for name in present if name not in classes]
    if unlisted:
        raise CorpusError(f"{path} does not name the class folder {unlisted[0]!r}; add it there")
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
