"""A corpus as `csc-gpu pack` writes it: tar shards with a manifest, so that nothing is looked for.

    manifest.json        format, classes; of every shard its file, bytes, sha256 and rows
    rows.npz             of every row its shard, offset, size, label, number and path
    classes.txt          the classes, for other readers
    train/000000.tar     KEY.jpg or KEY.png and KEY.cls, as WebDataset has them; test/ likewise

Nothing in it is believed: shards must be there, of that size and hash, and places within them. A
hash is computed once, and remembered until the shard changes.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import cache
from csc_gpu.data.arrays import load_arrays
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files
from csc_gpu.types import Corpus, Log, quiet

FORMAT, VERSION = "csc-gpu shards", 1
MANIFEST, ROWS = "manifest.json", "rows.npz"
SHARD = re.compile(r"(train|test)/\d{6}\.tar")
LARGEST_MANIFEST = 1 << 24
"""Most bytes of a manifest: enough for 90,000 shards."""
COLUMNS = ("shard", "offset", "size", "label", "row")
"""Arrays of rows.npz, (N,) int64 each; `paths` holds N names with a NUL between them, as bytes."""


@dataclass(frozen=True)
class Shard:
    """One file of a packed corpus."""

    file: str  # relative to the manifest
    bytes: int
    sha256: str
    rows: int


def is_packed(folder: Path) -> bool:
    """Whether it holds a manifest of ours, or a damaged one beside its table.

    Raises CorpusError for one that cannot be read to its end.
    """
    path = folder / MANIFEST
    if not path.exists() or path.is_dir():
        return False
    if not path.is_file() or path.stat().st_size > LARGEST_MANIFEST:  # a pipe would wait for ever
        raise CorpusError(
            f"{path} is no file, or of more than {LARGEST_MANIFEST} bytes; move it away"
        )
    try:
        told = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return (folder / ROWS).exists()
    return isinstance(told, dict) and told.get("format") == FORMAT


def open_packed(folder: Path, log: Log = quiet) -> tuple[Corpus, Corpus]:
    """Both parts; raises CorpusError where manifest, table and shards do not fit together."""
    classes, shards, table = _manifest(folder / MANIFEST)
    for done, shard in enumerate((table, *shards)):
        _require_sound(folder, shard)
        log("hash", done=done, total=len(shards))
    fault = CorpusError(f"{folder / ROWS} does not fit {folder / MANIFEST}; pack the corpus again")
    if not _is_stored(folder / ROWS):
        raise fault
    arrays = load_arrays(folder / ROWS, (*COLUMNS, "paths"))
    columns = [arrays[name] for name in COLUMNS]
    n_rows = sum(shard.rows for shard in shards)
    if any(c.dtype != np.int64 or c.shape != (n_rows,) for c in columns):
        raise fault
    of, offset, size, label, row = columns
    joined = arrays["paths"].tobytes()
    if joined.count(b"\0") != n_rows - 1:
        raise fault
    try:
        paths = joined.decode(errors="surrogateescape").split("\0")
    except UnicodeDecodeError as error:
        raise fault from error
    if not _fits(columns, shards, len(classes)):
        raise fault
    is_test = np.array([shard.file.startswith("test/") for shard in shards])[of]
    files = Files(
        folder,
        tuple(shard.file for shard in shards),
        of.astype(np.int32),
        np.stack([offset, size], axis=1),
    )
    every = Corpus(label, classes, row, tuple(paths), files=files)
    parts = every.take(np.flatnonzero(~is_test)), every.take(np.flatnonzero(is_test))
    if any(len(set(part.paths)) < len(part) or len(np.unique(part.ids)) < len(part)
           for part in parts):  # fmt: skip
        raise CorpusError(f"{folder / ROWS} names a row twice; pack the corpus again")
    return parts


def _is_stored(path: Path) -> bool:
    """Whether the arrays are as large as the file says: compressed, they could be of any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _fits(columns: list[NDArray[np.int64]], shards: list[Shard], n_classes: int) -> bool:
    """Whether every row lies within its shard, and has a label and a number."""
    of, offset, size, label, _ = columns
    if min(column.min() for column in columns) < 0 or of.max() >= len(shards) or size.min() == 0:
        return False
    ends = np.array([shard.bytes for shard in shards])[of]
    within = (size <= ends) & (offset <= ends - size)
    counts = np.bincount(of, minlength=len(shards)).tolist()
    return bool(within.all() and counts == [s.rows for s in shards] and label.max() < n_classes)


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(folder: Path, file: str, rows: int) -> dict[str, Any]:
    """What a manifest says about one of its files."""
    path = folder / file
    return {"file": file, "bytes": path.stat().st_size, "sha256": digest(path), "rows": rows}


def _manifest(path: Path) -> tuple[tuple[str, ...], list[Shard], Shard]:
    """Classes, shards and the table of rows."""
    try:
        told = json.loads(path.read_bytes())
        if told["version"] != VERSION:
            raise ValueError(f"version {told['version']!r}, not {VERSION}")
        classes = tuple(told["classes"])
        shards = [_shard(entry) for entry in told["shards"]]
        table = _shard(told["table"])
    except (KeyError, TypeError, ValueError, RecursionError) as fault:
        raise CorpusError(f"{path} is damaged: {fault}; pack the corpus again") from fault
    names = [shard.file for shard in shards]
    wrong = [name for name in names if not SHARD.fullmatch(name)]
    if wrong or table.file != ROWS:
        raise CorpusError(f"{path} names {(*wrong, table.file)[0]!r}, which is no shard beside it")
    if not all(type(name) is str for name in classes) or len(set(classes)) < len(classes):
        raise CorpusError(f"{path}: classes must be names, none twice")
    if not names or len(set(names)) < len(names):
        raise CorpusError(f"{path} names no shard, or one twice")
    return classes, shards, table


def _shard(entry: Mapping[str, Any]) -> Shard:
    shard = Shard(**{name: entry[name] for name in Shard.__dataclass_fields__})
    kinds = type(shard.file), type(shard.bytes), type(shard.sha256), type(shard.rows)
    if kinds != (str, int, str, int) or not 0 < shard.rows <= shard.bytes < 1 << 62:
        raise ValueError(f"what it says of {shard.file!r}")
    return shard


def _require_sound(folder: Path, shard: Shard) -> None:
    """Raises CorpusError unless the file is the one that was packed; hashes are remembered."""
    path = folder / shard.file
    if not path.is_file():
        raise CorpusError(f"{path} is missing, a shard of {folder / MANIFEST}")
    if path.stat().st_size != shard.bytes:
        raise CorpusError(
            f"{path} has {path.stat().st_size} bytes, not the {shard.bytes} of its manifest"
        )
    kept = cache.place("hash", path, ".json")
    told = json.dumps([cache.stamp(path), shard.sha256]).encode()
    try:
        if kept.read_bytes() == told:
            return
    except OSError:
        pass
    if digest(path) != shard.sha256:
        raise CorpusError(f"{path} is not what was packed: its hash is not the manifest's")
    cache.keep(kept, told)
