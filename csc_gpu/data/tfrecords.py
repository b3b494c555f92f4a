"""Images in a TFRecord: tf.train.Example with image/encoded and image/class/label.

Every record is looked into, for its label and where its image lies, so none needs an index; one
beside the file, NAME.idx as DALI's tfrecord2idx writes it (`offset size` a line), must agree with
it. Images themselves are passed over, and checksums not looked at: a damaged one does not decode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from csc_gpu.errors import CorpusError

IMAGE, LABEL = b"image/encoded", b"image/class/label"
HEADER, FOOTER = 12, 4
"""Bytes around a record: its length, 8, and a checksum; another checksum."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_KEY = 1 << 10
AHEAD = 1 << 10
"""Bytes read at a time: keys and labels lie together, images are passed over."""

Span = tuple[int, int]
"""Where something begins and ends, in bytes of the file."""


def scan(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """(name, start, size, label) of every image; its name is the number of its record.

    Raises CorpusError for what is no TFRecord of images.
    """
    with _Shard(path) as shard:
        records = list(shard.records())
        for index in filter(Path.is_file, _indices(path)):
            listed = [(at + HEADER, at + size - FOOTER) for at, size in _listed(index)]
            if listed != records:
                raise CorpusError(f"{index} is not the index of {path}; make it anew, or remove it")
        for number, record in enumerate(records):
            found = shard.example(record)
            if len(found) < 2:
                lacks = (IMAGE if IMAGE not in found else LABEL).decode()
                raise CorpusError(f"{path}: record {number} has no {lacks}")
            (first, last), (label, _) = found[IMAGE], found[LABEL]
            if first == last:
                raise CorpusError(f"{path}: record {number} has an empty image")
            yield str(number), first, last - first, label


class _Shard:
    """A file read a little at a time, which knows where its fault lies."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, os.open(path, os.O_RDONLY)
        self.end = os.fstat(self.file).st_size
        self.at, self.ahead = 0, b""

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def fault(self, at: int) -> CorpusError:
        return CorpusError(f"{self.path} is no TFRecord of images, or damaged at byte {at}")

    def read(self, at: int, count: int) -> bytes:
        if not self.at <= at <= at + count <= self.at + len(self.ahead):
            self.at, self.ahead = at, os.pread(self.file, max(count, AHEAD), at)
        got = self.ahead[at - self.at :][:count]
        if len(got) < count:
            raise self.fault(at)
        return got

    def records(self) -> Iterator[Span]:
        """Where every record's content lies."""
        at = 0
        while at < self.end:
            length = int.from_bytes(self.read(at, HEADER)[:8], "little")
            stop = at + HEADER + length + FOOTER
            if stop > self.end:
                raise self.fault(at)
            yield at + HEADER, stop - FOOTER
            at = stop

    def example(self, span: Span) -> dict[bytes, Span]:
        """Where the image lies, and the label with a 0; what the record lacks is left out."""
        found = {}
        for features in self.fields(span, 1):
            for entry in self.fields(features, 1):
                key = next(self.fields(entry, 1), None)
                if key is None or not key[1] - key[0] <= LONGEST_KEY:
                    raise self.fault(entry[0])
                name = self.read(key[0], key[1] - key[0])
                if name not in (IMAGE, LABEL):
                    continue
                if name in found:
                    raise CorpusError(f"{self.path}: two {name.decode()} at byte {entry[0]}")
                for value in self.fields(entry, 2):
                    number, within = (1, self.items) if name == IMAGE else (3, self.integers)
                    every = (one for some in self.fields(value, number) for one in within(some))
                    values = list(islice(every, 2))  # a hostile list may be of any length
                    if len(values) != 1:
                        raise self.fault(value[0])
                    found[name] = values[0]
        return found

    def items(self, span: Span) -> Iterator[Span]:
        """Where the values of a BytesList lie."""
        return self.fields(span, 1)

    def integers(self, span: Span) -> Iterator[Span]:
        """The values of an Int64List, packed or not."""
        at, end = span
        while at < end:
            tag, at = self.varint(at, end)
            if tag == (1 << 3 | BYTES):
                size, at = self.varint(at, end)
                stop = at + size
                if stop > end:
                    raise self.fault(at)
            elif tag == (1 << 3 | VARINT):
                stop = at + 1
            else:
                raise self.fault(at)
            while at < stop:
                value, at = self.varint(at, end)
                yield value - (1 << 64 if value >> 63 else 0), 0

    def fields(self, span: Span, wanted: int) -> Iterator[Span]:
        """Where the fields of this number lie in a message; others are passed over."""
        at, end = span
        while at < end:
            tag, at = self.varint(at, end)
            number, kind = tag >> 3, tag & 7
            if kind == BYTES:
                size, at = self.varint(at, end)
                if size > end - at:
                    raise self.fault(at)
                if number == wanted:
                    yield at, at + size
                at += size
            elif kind == VARINT:
                _, at = self.varint(at, end)
            elif kind in (FIXED64, FIXED32):
                at += 8 if kind == FIXED64 else 4
            else:
                raise self.fault(at)

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """A number of up to 64 bits, and where it ends."""
        told = self.read(at, min(10, end - at))
        value = 0
        for place, byte in enumerate(told):
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value & (1 << 64) - 1, at + place + 1
        raise self.fault(at)


def _indices(path: Path) -> set[Path]:
    return {path.with_name(path.name + ".idx"), path.with_suffix(".idx")}


def _listed(index: Path) -> Iterator[Span]:
    """(offset, size) of every record, as an index lists them."""
    with index.open("rb") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if len(words) != 2 or not all(word.isdigit() and len(word) < 19 for word in words):
                raise CorpusError(f"{index} line {number}: must be an offset and a size")
            yield int(words[0]), int(words[1])
