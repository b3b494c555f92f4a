"""Write a corpus as tar shards with a manifest (see data.packed), and read them back to be sure.

Images in files keep their bytes; arrays are encoded as PNG. Rows keep their numbers and paths, so a
run on the shards names the same suspects as one on what they were packed from.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csc_gpu.backend.loader import contents_of, signature
from csc_gpu.data import packed
from csc_gpu.data.folders import CLASS_LIST
from csc_gpu.data.shards import scan_tar
from csc_gpu.errors import CorpusError, OutputError
from csc_gpu.types import Corpus, Log, Split

ENDINGS = {"JPEG": "jpg", "PNG": "png"}
OVERHEAD = 2560
"""Bytes of a tar beside an image, at most: two headers, a label, what fills up the blocks."""


def write(folder: Path, split: Split, shard_bytes: int, log: Log) -> int:
    """Both parts in shards of about that many bytes, checked; how many shards there are.

    Raises CorpusError for an image that cannot be read, OutputError where the disk gives back other
    bytes than it was given.
    """
    _require_listable(split.train.classes)
    shards: list[dict[str, Any]] = []
    columns: dict[str, list[NDArray[np.int64]]] = {name: [] for name in packed.COLUMNS}
    n_rows = len(split.train) + len(split.test)
    done = 0
    for part, corpus in (("train", split.train), ("test", split.test)):
        (folder / part).mkdir()
        for number, rows in enumerate(_shared_out(corpus, shard_bytes)):
            file = f"{part}/{number:06d}.tar"

            def wrote(count: int, before: int = done) -> None:
                log("pack", done=before + count, total=n_rows)

            pieces = _write_shard(folder / file, corpus, rows, wrote)
            filled = [np.full(len(rows), len(shards)), *pieces.T]
            filled += [corpus.labels[rows], corpus.ids[rows]]
            for name, column in zip(packed.COLUMNS, filled, strict=True):
                columns[name].append(column.astype(np.int64))
            shards.append(packed.described(folder, file, len(rows)))
            done += len(rows)
    paths = "\0".join(split.train.paths + split.test.paths).encode(errors="surrogateescape")
    joined = {name: np.concatenate(column) for name, column in columns.items()}
    arrays: dict[str, Any] = {"paths": np.frombuffer(paths, np.uint8), **joined}
    np.savez(folder / packed.ROWS, **arrays)
    classes = split.train.classes
    (folder / CLASS_LIST).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    manifest = {
        "format": packed.FORMAT,
        "version": packed.VERSION,
        "classes": classes,
        "table": packed.described(folder, packed.ROWS, n_rows),
        "shards": shards,
    }
    (folder / packed.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _require_same(split, packed.open_packed(folder, log))
    return len(shards)


def _require_listable(classes: tuple[str, ...]) -> None:
    """Raises CorpusError for a class that classes.txt cannot name on a line of its own."""
    for name in classes:
        is_utf8 = name.encode(errors="replace").decode() == name
        if not is_utf8 or name.strip().splitlines() != [name]:
            raise CorpusError(
                f"class {name!r} cannot stand in {CLASS_LIST}: rename it, in UTF-8, without line "
                "ends or spaces around it"
            )


def encoded_bytes(corpus: Corpus) -> int:
    """About what its images take in shards, tar and all; PNGs never take much more than pixels."""
    return int(_sizes(corpus).sum())


def _sizes(corpus: Corpus) -> NDArray[np.int64]:
    """Bytes of each row in a shard, about. (N,)"""
    if corpus.pixels is not None:
        return np.full(len(corpus), corpus.pixels[0].nbytes + OVERHEAD)
    if corpus.files.pieces is not None:
        return corpus.files.pieces[:, 1] + OVERHEAD
    sizes = (file.stat().st_size for file in corpus.files if isinstance(file, Path))
    return np.fromiter(sizes, np.int64, len(corpus)) + OVERHEAD


def _shared_out(corpus: Corpus, shard_bytes: int) -> list[NDArray[np.int64]]:
    """The rows of each shard, in order; none is empty."""
    of_row = (np.cumsum(_sizes(corpus)) - 1) // shard_bytes
    starts = np.flatnonzero(np.diff(of_row)) + 1
    return np.split(np.arange(len(corpus)), starts)


def _write_shard(
    path: Path, corpus: Corpus, rows: NDArray[np.int64], wrote: Callable[[int], None]
) -> NDArray[np.int64]:
    """One shard, written and read back. (n, 2) where each image lies, start and size in bytes

    `wrote` is told after each image how many there are.
    """
    written = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for at, (content, row) in enumerate(zip(encoded(corpus, rows), rows, strict=True)):
            label = int(corpus.labels[row])
            for ending, some in ((ending_of(content), content), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{at:09d}.{ending}")
                member.size = len(some)
                shard.addfile(member, io.BytesIO(some))
            written.append((hashlib.sha256(content).digest(), label))
            wrote(len(written))
    found = list(scan_tar(path))
    with path.open("rb") as file:
        for (wanted, label), image in zip(written, found, strict=True):
            file.seek(image.start)
            same = hashlib.sha256(file.read(image.size)).digest() == wanted
            if not same or image.label != label:
                raise OutputError(f"{path} does not hold what was written; is the disk sound?")
    return np.array([(image.start, image.size) for image in found], np.int64)


def ending_of(content: bytes) -> str:
    """What the name of a file with this content ends in."""
    kind = signature(content)
    assert kind is not None, "only what decodes is packed"
    return ENDINGS[kind]


def encoded(corpus: Corpus, rows: NDArray[np.int64]) -> Iterator[bytes]:
    """The images of these rows: the bytes of their files, or PNGs."""
    for row in rows:
        if corpus.pixels is None:
            content = contents_of(corpus.files[row])
            if isinstance(content, str):
                raise CorpusError(f"cannot pack {corpus.paths[row]}: {content}")
            yield content
        else:
            file = io.BytesIO()
            Image.fromarray(corpus.pixels[row]).save(file, "PNG")
            yield file.getvalue()


def _require_same(split: Split, back: tuple[Corpus, Corpus]) -> None:
    for one, other in zip((split.train, split.test), back, strict=True):
        same = one.paths == other.paths and one.classes == other.classes
        if not same or (one.labels != other.labels).any() or (one.ids != other.ids).any():
            raise OutputError("the shards do not hold what was packed; is the disk sound?")
