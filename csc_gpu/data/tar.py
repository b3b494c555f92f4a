"""The members of a tar, from their headers alone: nothing is unpacked, nothing written.

ustar, GNU long names and pax paths. What has no place in a corpus is refused: links, devices,
names that lead out of the folder, sizes beyond the file, a tar without its end or that goes on
after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from csc_gpu.errors import CorpusError

BLOCK = 512
LONGEST_NAME = 1 << 16
"""Most bytes of a GNU long name or a pax header."""
LONGEST_END = 1 << 20
"""Most bytes of zeros at the end: tar fills up its last record, of 10 kB unless told otherwise."""
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
FILE, FOLDER, LONG_NAME, PAX, PAX_OF_ALL = b"0\x007", b"5", b"L", b"x", b"g"


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    start: int  # bytes
    size: int  # bytes
    head: bytes  # its first bytes, at most 512


def members(path: Path) -> Iterator[Member]:
    """Every file in a tar, in its order; raises CorpusError for a tar that is not to be trusted."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield from _members(file, path, os.fstat(file).st_size)
    finally:
        os.close(file)


def _members(file: int, path: Path, end: int) -> Iterator[Member]:
    at, given = 0, dict[str, str]()  # what the next header is told by the one before it
    while True:
        both = os.pread(file, 2 * BLOCK, at)  # most labels fit into the second one
        header = both[:BLOCK]
        for magic, packer in PACKED.items():
            if at == 0 and header.startswith(magic):
                raise CorpusError(f"{path} is compressed with {packer}; unpack it first")
        if len(header) < BLOCK:
            raise CorpusError(f"{path} ends without the end of a tar: it was cut short, or is none")
        if not any(header):
            return _require_end(file, path, at, end)
        kind, name, size = _read(header, path, at)
        name, size = given.get("path", name), _number(given.get("size", size), path, at)
        start, given = at + BLOCK, {}
        if size > end - start:
            raise CorpusError(f"{path}: member {name!r} of {size} bytes ends beyond the file")
        at = start + -(-size // BLOCK) * BLOCK
        if kind in (LONG_NAME, PAX, PAX_OF_ALL):
            if size > LONGEST_NAME:
                raise CorpusError(f"{path}: a name of {size} bytes")
            told = os.pread(file, size, start)
            given = {"path": _text(told.rstrip(b"\0"), path)} if kind == LONG_NAME else {}
            given |= _pax(told, path) if kind == PAX else {}
        elif kind in FILE:
            _require_inside(name, path)
            yield Member(name, start, size, both[BLOCK:][:size])
        elif kind != FOLDER:
            raise CorpusError(
                f"{path}: member {name!r} is a link, a device or another thing that is no file"
            )


def _require_end(file: int, path: Path, at: int, end: int) -> None:
    """Raises CorpusError for more than zeros after the last member: it would be passed over."""
    if end - at > LONGEST_END or os.pread(file, LONGEST_END, at).strip(b"\0"):
        raise CorpusError(
            f"{path} goes on at byte {at}, after the end of a tar; if it is several of them, make "
            "each a file of its own"
        )


def _read(header: bytes, path: Path, at: int) -> tuple[bytes, str, int]:
    """Kind, name and size as a header has them."""
    told = header[148:156].split(b"\0")[0].strip()
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if not told or told.strip(b"01234567") or int(told, 8) != total:
        raise CorpusError(f"{path} is no tar, or damaged at byte {at}")
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    field = header[124:136]
    if field[0] & 0x80:  # GNU's way to write large numbers, and negative ones
        size = int.from_bytes(field, "big", signed=True) + (1 << 95 if field[0] == 0x80 else 0)
    else:
        digits = field.split(b"\0")[0].strip()
        size = -1 if digits.strip(b"01234567") else int(digits or b"0", 8)
    return header[156:157], _text(name, path), size


def _number(size: str | int, path: Path, at: int) -> int:
    if isinstance(size, int) and size >= 0:
        return size
    if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) < 20:
        return int(size)
    raise CorpusError(f"{path}: the member at byte {at} has no size")


def _pax(told: bytes, path: Path) -> dict[str, str]:
    """The records `length name=value` of a pax header."""
    found = {}
    while told:
        length = told.split(b" ")[0]
        size = int(length) if length.isdigit() and len(length) < 8 else 0
        name, equals, value = told[len(length) + 1 : size - 1].partition(b"=")
        if not equals or size > len(told):
            raise CorpusError(f"{path}: a pax header is damaged")
        if name.startswith(b"GNU.sparse"):
            raise CorpusError(f"{path} holds a sparse file; pack it without holes")
        found[_text(name, path)] = _text(value, path)
        told = told[size:]
    return found


def _text(name: bytes, path: Path) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as fault:
        raise CorpusError(f"{path}: a member's name is not UTF-8") from fault


def _require_inside(name: str, path: Path) -> None:
    """A name is a place below the folder, whatever system reads it."""
    parts = PurePosixPath(name).parts
    if not parts or name[0] == "/" or ".." in parts or not name.isprintable() or "\\" in name:
        raise CorpusError(f"{path}: member {name!r} leads out of the shard, or is no name")
