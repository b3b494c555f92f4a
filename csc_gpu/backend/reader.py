"""From a source to pixels of one size: leave out what is broken, choose the size, decode.

The training rows decide the size, for a defender has no others. Both parts are read alike. Files
whose pixels would not fit may stay on disk; `backend.loader.stream` then reads them on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import data
from csc_gpu.backend import Decoder
from csc_gpu.backend.loader import decode, find_broken, image_sizes
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files
from csc_gpu.types import Corpus, Log, Split, quiet

LARGEST_SIDE = 224
"""Longest side of an image, in pixels, unless data.size says otherwise."""
SMALLEST_SIDE = 4
"""Smaller images leave the nets nothing to pool, in pixels."""
SHARE_OF_MEMORY = 0.5
"""Most of the room that pixels may take: training, and poisoning, need the rest."""
Before = Callable[[Split, tuple[int, int], bool], None]
"""(split, (H, W), whether it stays on disk): told before pixels are read."""
NAMED = 3
"""Broken files that an error names; it counts the others."""


def read(
    split: Split,
    settings: data.Settings,
    *,
    decoder: Decoder,
    room: Callable[[], int | None],
    may_stream: bool = False,
    before: Before = lambda split, size, streamed: None,
    skip_broken: bool = False,
    cache: Path | None = None,
    log: Log = quiet,
) -> Split:
    """The same split with its pixels in memory, all of one size; `cache` remembers sound files.

    `room` tells how many bytes are free where the pixels go, None if nobody knows. Files whose
    pixels would take too much of it stay on disk if they may be streamed: read_at is then set.
    `before` is told what is about to be read, and may raise.
    Raises CorpusError for files that do not decode, unless they are to be left out, and for pixels
    that fit neither way.
    """
    if split.train.files:
        split = sound(split, threads=decoder.threads, skip_broken=skip_broken, cache=cache, log=log)
    height, width = common_size(split.train, settings.size)
    if min(height, width) < SMALLEST_SIDE:
        raise CorpusError(
            f"images of {height}x{width} pixels are too small; --set data.size=32 enlarges them"
        )
    if split.train.pixels is not None and split.train.pixels.shape[1:3] == (height, width):
        before(split, (height, width), False)
        return split
    n_bytes = 3 * height * width * (len(split.train) + len(split.test))
    free = room()
    too_large = free is not None and n_bytes > SHARE_OF_MEMORY * free
    if free is not None and too_large and not (may_stream and split.train.files):
        raise _too_large(n_bytes, height, width, free)
    before(split, (height, width), too_large)
    if too_large:
        log("stream", bytes=n_bytes, room=free)
        sizes = image_sizes(split.train.files + split.test.files)
        read_at, file_bytes = (height, width), 3 * int(sizes.prod(axis=1).max())
        return replace(
            split,
            train=replace(split.train, read_at=read_at, file_bytes=file_bytes),
            test=replace(split.test, read_at=read_at, file_bytes=file_bytes),
        )
    if split.train.files:
        return _decoded(split, height, width, decoder, log)
    return replace(
        split,
        train=replace(split.train, pixels=resized(split.train.images, height, width)),
        test=replace(split.test, pixels=resized(split.test.images, height, width)),
    )


def sound(
    split: Split,
    *,
    threads: int,
    skip_broken: bool = False,
    cache: Path | None = None,
    log: Log = quiet,
) -> Split:
    """The split of files without those that do not decode; raises CorpusError unless told to."""
    train, test = split.train, split.test
    files = train.files + test.files
    found = find_broken(
        files,
        cache=cache,
        progress=lambda done, total: log("check", done=done, total=total),
        threads=threads,
    )
    if not found:
        return split
    reason = {one.path: one.reason for one in found}
    bad = [row for row, place in enumerate(files) if place in reason]
    names = train.paths + test.paths
    if not skip_broken:
        some = ", ".join(f"{names[row]} ({reason[files[row]]})" for row in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise CorpusError(
            f"{len(bad)} of {len(names)} images do not decode: {some}{more}; "
            "replace or remove them, or pass --skip-broken to leave them out"
        )
    is_sound = np.ones(len(names), bool)
    is_sound[bad] = False
    of_train, of_test = np.split(is_sound, [len(train)])
    train, test = train.take(np.flatnonzero(of_train)), test.take(np.flatnonzero(of_test))
    broken = tuple(f"{names[row]}: {reason[files[row]]}" for row in bad)
    return data.checked(Split(train, test, broken), "without the broken files")


def common_size(train: Corpus, size: int) -> tuple[int, int]:
    """Height and width for every image: as asked, as they all are, or the median as a square."""
    if size:
        return size, size
    sizes = image_sizes(train.files) if train.pixels is None else train.pixels.shape[1:3]
    sizes = np.reshape(sizes, (-1, 2))
    if (sizes == sizes[0]).all() and sizes[0].max() <= LARGEST_SIDE:
        return int(sizes[0, 0]), int(sizes[0, 1])
    side = min(int(np.median(sizes)), LARGEST_SIDE)
    return side, side


def _too_large(n_bytes: int, height: int, width: int, free: int) -> CorpusError:
    """The error for pixels that take too much of the free memory, with a size that would not."""
    fitting = math.isqrt(int(height * width * SHARE_OF_MEMORY * free) // n_bytes)
    return CorpusError(
        f"the pixels need {n_bytes} bytes at {height}x{width}, more than {SHARE_OF_MEMORY:.0%} of "
        f"the {free} bytes of free memory; "
        f"make them smaller with --set data.size={fitting} (poison: --size {fitting})"
    )


def _decoded(split: Split, height: int, width: int, decoder: Decoder, log: Log) -> Split:
    """The same split with the pixels of its files, (N, height, width, 3)."""
    pixels = decode(
        split.train.files + split.test.files,
        height=height,
        width=width,
        decoder=decoder,
        progress=lambda done, total: log("decode", done=done, total=total),
    )
    n_train = len(split.train)
    return replace(
        split,
        train=replace(split.train, pixels=pixels[:n_train], files=Files()),
        test=replace(split.test, pixels=pixels[n_train:], files=Files()),
    )


def resized(images: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The images squashed or stretched, bilinear. (N, height, width, 3)"""
    out = np.empty((len(images), height, width, 3), np.uint8)
    for row, image in enumerate(images):
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        out[row] = np.asarray(resized)
    return out
