"""From a source to pixels of one size: leave out what is broken, choose the size, decode.

The training rows decide the size, for a defender has no others. Both parts are read alike. Files
whose pixels would not fit may stay on disk; `backend.loader.stream` then reads them on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import data
from csc_gpu.backend import Decoder
from csc_gpu.backend.loader import decode, decoded_bytes, find_broken, header_sizes
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files, Place
from csc_gpu.tolerance import Tolerance, listed, named
from csc_gpu.types import Corpus, Log, Split, quiet

LARGEST_SIDE = 224
"""Longest side of an image, in pixels, unless data.size says otherwise."""
SMALLEST_SIDE = 4
"""Smaller images leave the nets nothing to pool, in pixels."""
SHARE_OF_MEMORY = 0.5
"""Most of the room that pixels may take: training, and poisoning, need the rest."""
UNCHECKED = "its header tells no size"
"""Why an image is broken that decodes nevertheless."""
Before = Callable[[Split, tuple[int, int], bool], None]
"""(split, (H, W), whether it stays on disk): told before pixels are read."""


def read(
    split: Split,
    settings: data.Settings,
    *,
    decoder: Decoder,
    room: Callable[[], int | None],
    may_stream: bool = False,
    before: Before = lambda split, size, streamed: None,
    skip_broken: bool = False,
    max_bad: int | None = None,
    cache: Path | None = None,
    seen: Path | None = None,
    log: Log = quiet,
) -> Split:
    """The same split with its pixels in memory, all of one size.

    `cache` is a file that remembers which images are sound, `seen` one that remembers their sizes.

    `room` tells how many bytes are free where the pixels go, None if nobody knows. Files whose
    pixels would take too much of it stay on disk if they may be streamed: read_at is then set.
    `before` is told what is about to be read, and may raise.
    Raises CorpusError for files that do not decode, unless they are to be left out, and for pixels
    that fit neither way. With max_bad so many may be left out; those to train on stay on disk
    whatever is free, so that a run can be gone on with anywhere, and may prove broken while they
    are read (see Tolerance).
    """
    if split.train.files:
        how: dict[str, Any] = {"threads": decoder.threads, "cache": cache, "log": log}
        if max_bad is None:
            split = sound(split, skip_broken=skip_broken, **how)
        else:
            split = tolerant(split, max_bad, seen, **how)
    sizes = sizes_of(split.train, split.test, cache=seen)
    height, width = common_size(sizes[: len(split.train)], settings.size)
    if min(height, width) < SMALLEST_SIDE:
        raise CorpusError(
            f"images of {height}x{width} pixels are too small; --set data.size=32 enlarges them"
        )
    if split.train.pixels is not None and split.train.pixels.shape[1:3] == (height, width):
        before(split, (height, width), False)
        return split
    n_bytes = 3 * height * width * (len(split.train) + len(split.test))
    free = room()
    stays = split.train.tolerance is not None
    if not stays and free is not None and n_bytes > SHARE_OF_MEMORY * free:
        if not (may_stream and split.train.files):
            raise _too_large(n_bytes, height, width, free)
        stays = True
    before(split, (height, width), stays)
    if stays:
        if free is not None:
            log("stream", bytes=n_bytes, room=free)
        read_at, file_bytes = (height, width), decoded_bytes(sizes)
        return replace(
            split,
            train=replace(split.train, read_at=read_at, file_bytes=file_bytes),
            test=replace(split.test, read_at=read_at, file_bytes=file_bytes),
        )
    if split.train.files:
        return _decoded(split, height, width, decoded_bytes(sizes), decoder, log)
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
    reasons = _checked(train.files + test.files, threads, cache, log)
    if not reasons:
        return split
    (train, of_train), (test, of_test) = (_without(part, reasons) for part in (train, test))
    broken = of_train + of_test
    if not skip_broken:
        n_rows = len(split.train) + len(split.test)
        raise CorpusError(
            f"{len(broken)} of {n_rows} images do not decode: {named(broken)}; "
            "replace or remove them, or pass --skip-broken to leave them out"
        )
    return data.checked(Split(train, test, listed(broken)), "without the broken files")


def tolerant(
    split: Split,
    max_bad: int,
    seen: Path | None,
    *,
    threads: int,
    cache: Path | None = None,
    log: Log = quiet,
) -> Split:
    """The split whose images to train on may prove broken; those held out are decoded once here."""
    test, broken = _without(split.test, _checked(split.test.files, threads, cache, log))
    for path, reason in broken:
        log("broken", image=path, reason=reason)
    train, tolerance = split.train, Tolerance(max_bad, log, broken)
    tolerance.require_few()  # before those to train on are looked at
    headless = np.flatnonzero(sizes_of(train, cache=seen)[:, 0] == 0)
    reasons = _checked(train.files.take(headless), threads, None, log)
    for row in headless.tolist():
        told = reasons.get(train.files[row], UNCHECKED)
        tolerance.note(int(train.ids[row]), train.paths[row], told)
    tolerance.require_few()
    train = replace(train, tolerance=tolerance)
    return data.checked(Split(train, test, listed(broken)), "without the broken files")


def _checked(files: Files, threads: int, cache: Path | None, log: Log) -> dict[Place, str]:
    """Why images do not decode, by their place; all are decoded fully once."""
    found = find_broken(
        files,
        cache=cache,
        progress=lambda done, total: log("check", done=done, total=total),
        threads=threads,
    )
    return {one.path: one.reason for one in found}


def _without(corpus: Corpus, reasons: Mapping[Place, str]) -> tuple[Corpus, list[tuple[str, str]]]:
    """The rows whose images do decode; path and reason of the others."""
    reason = [reasons.get(place) for place in corpus.files]
    kept = np.flatnonzero([told is None for told in reason])
    broken = [(path, told) for path, told in zip(corpus.paths, reason, strict=True) if told]
    return corpus.take(kept), broken


def sizes_of(*parts: Corpus, cache: Path | None = None) -> NDArray[np.int64]:
    """Height and width of every row, 0 where none can be told; `cache` is read's `seen`. (N, 2)"""
    if parts[0].pixels is not None:
        return np.concatenate([np.tile(part.image_size, (len(part), 1)) for part in parts])
    return header_sizes(sum((part.files for part in parts[1:]), parts[0].files), cache=cache)


def common_size(sizes: NDArray[np.int64], size: int) -> tuple[int, int]:
    """Height and width for images of these sizes (N, 2), those to train on: as asked, as they all
    are, or the median as a square."""
    sizes = sizes[sizes[:, 0] > 0]
    if size or not len(sizes):
        return size, size
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


def _decoded(
    split: Split, height: int, width: int, file_bytes: int, decoder: Decoder, log: Log
) -> Split:
    """The same split with the pixels of its files, (N, height, width, 3)."""
    pixels = decode(
        split.train.files + split.test.files,
        height=height,
        width=width,
        decoder=decoder,
        file_bytes=file_bytes,
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
