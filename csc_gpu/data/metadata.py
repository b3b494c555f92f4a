"""A corpus as Hugging Face's image folders have it: metadata.csv or metadata.jsonl beside images.

Each line names an image, `file_name`, by its path from the file's own folder, and its `label`;
other columns are left alone. There is one such file at the top, where train/ and test/ begin the
names, or one in train/ and one in the held-out part. Without a column `label` folders are classes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csc_gpu.data.folders import parts_of
from csc_gpu.data.manifests import Line, corpora
from csc_gpu.errors import CorpusError
from csc_gpu.types import Corpus

NAMES = ("metadata.csv", "metadata.jsonl")


def has_metadata(folder: Path) -> bool:
    """Whether labels of images stand in a metadata file of this folder, or of its train part."""
    path = _metadata_of(folder) or _metadata_of(folder / "train")
    return path is not None and "label" in next((line for _, line in _read(path)), {})


def open_metadata(folder: Path) -> tuple[Corpus, Corpus | None]:
    """The train and held-out parts that metadata name; None if there is but one."""
    parts = parts_of(folder)
    path = _metadata_of(folder)
    if path is not None:
        lines = [_line(path, "", number, told) for number, told in _read(path)]
        lines = [line._replace(split=_split(line.path, parts)) for line in lines]
    else:
        lines = [line for part in parts for line in _lines_of(folder, part, parts)]
    if not lines:
        raise CorpusError(f"{folder}: its metadata name no images")
    if not any(line.split == "test" for line in lines):
        lines = [line._replace(split="") for line in lines]
    for line in lines:
        if not (folder / line.path).is_file():
            raise CorpusError(f"{folder}: its metadata name {line.path!r}, which is not there")
    return corpora(folder, lines)


def _lines_of(folder: Path, part: str, parts: list[str]) -> list[Line]:
    path = _metadata_of(folder / part)
    if path is None:
        raise CorpusError(f"{folder / part} has no {' or '.join(NAMES)}, as the other part has")
    lines = (_line(path, f"{part}/", number, told) for number, told in _read(path))
    return [line._replace(split=_split(line.path, parts)) for line in lines]


def _split(name: str, parts: list[str]) -> str:
    """train or test, by the first folder of a name; the second part is the one held out."""
    return "test" if name.partition("/")[0] in parts[1:] else "train"


def _metadata_of(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def _line(path: Path, before: str, number: int, told: dict[str, Any]) -> Line:
    name, label = told.get("file_name"), told.get("label")
    if not name or label is None or label == "":
        raise CorpusError(f"{path} line {number}: no {'label' if name else 'file_name'}")
    return Line(before + str(name), str(label), "")


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line with its number; raises CorpusError for one that cannot be understood."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, line) for line in reader)
            else:
                filled = ((n, text) for n, text in enumerate(file, 1) if text.strip())
                yield from ((number, dict(json.loads(text))) for number, text in filled)
    except (UnicodeDecodeError, csv.Error, ValueError, TypeError) as fault:
        raise CorpusError(f"{path} is not UTF-8 text of its kind: {fault}") from fault
