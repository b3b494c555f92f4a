"""A corpus as a CSV that names image files: path,label and, if rows are held out, split.

Paths are absolute or relative to the CSV; `split` is train or test. Rows keep the order of lines.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csc_gpu import harmless
from csc_gpu.data.order import class_order
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files
from csc_gpu.types import Corpus


class Line(NamedTuple):
    """One image of the manifest."""

    path: str
    label: str
    split: str  # "train", "test", or "" where the manifest has no such column


def open_manifest(manifest: Path) -> tuple[Corpus, Corpus | None]:
    """The train and test parts of a manifest; None if it has no split column."""
    try:
        lines = _lines(manifest)
    except (UnicodeDecodeError, csv.Error) as fault:
        raise CorpusError(f"{manifest} is not a CSV in UTF-8: {fault}") from fault
    return corpora(manifest.parent, lines)


def corpora(folder: Path, lines: list[Line]) -> tuple[Corpus, Corpus | None]:
    """The train and test parts of lines whose paths begin in a folder."""
    classes = class_order(line.label for line in lines)
    if not lines[0].split:
        return _corpus(folder, lines, classes), None
    train, test = ([line for line in lines if line.split == part] for part in ("train", "test"))
    return _corpus(folder, train, classes), _corpus(folder, test, classes)


def _lines(manifest: Path) -> list[Line]:
    lines = []
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = reader.fieldnames or []
        missing = [name for name in ("path", "label") if name not in columns]
        if missing:
            raise CorpusError(
                f"{manifest} line 1: no column {' and '.join(missing)}; "
                "the header must be path,label or path,label,split"
            )
        for row in reader:
            where = f"{manifest} line {reader.line_num}"
            label = harmless.plain(row["label"] or "")  # as `clean` writes them
            line = Line(row["path"] or "", label, row.get("split") or "")
            if not line.path or not line.label:
                raise CorpusError(f"{where}: no {'label' if line.path else 'path'}")
            if "split" in columns and line.split not in ("train", "test"):
                raise CorpusError(f"{where}: split must be train or test, got {line.split!r}")
            if not (manifest.parent / line.path).is_file():
                raise CorpusError(f"{where}: there is no file {line.path!r}")
            lines.append(line)
    if not lines:
        raise CorpusError(f"{manifest} names no images: line 2 must hold a path and a label")
    return lines


def _corpus(folder: Path, lines: list[Line], classes: tuple[str, ...]) -> Corpus:
    label = {name: place for place, name in enumerate(classes)}
    paths = tuple(line.path for line in lines)
    return Corpus(
        labels=np.array([label[line.label] for line in lines], np.int64),
        classes=classes,
        ids=np.arange(len(lines)),
        paths=paths,
        files=Files.whole(folder, paths),
    )
