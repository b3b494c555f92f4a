"""Image files of other layouts, and the clean data set that they are laid over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import data, sources
from csc_gpu.backend import Decoder, usable_cores
from csc_gpu.backend.loader import decode, find_broken, image_sizes
from csc_gpu.backend.reader import LARGEST_SIDE
from csc_gpu.data.folders import CLASS_LIST
from csc_gpu.errors import CorpusError
from csc_gpu.types import AnswerKey, Corpus, Log, Split

BASE = "clean"
"""The folder beside an exported set that its import takes as --clean."""


def read_images(files: Sequence[Path], log: Log) -> NDArray[np.uint8]:
    """Every file decoded, in this order. (N, H, W, 3); (0, 0, 0, 3) for none

    Raises CorpusError for a file that is missing or broken, and for files of several sizes.
    """
    if not files:
        return np.zeros((0, 0, 0, 3), np.uint8)
    decoder = Decoder(torch.device("cpu"), usable_cores())
    broken = find_broken(files, threads=decoder.threads)
    if broken:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise CorpusError(f"{broken[0].path} does not decode: {broken[0].reason}{more}")
    sizes = image_sizes(files)
    odd = (sizes != sizes[0]).any(axis=1)
    if odd.any():
        row = int(odd.argmax())
        raise CorpusError(
            f"{files[row]} is {sizes[row, 0]}x{sizes[row, 1]}, but {files[0].name} "
            f"{sizes[0, 0]}x{sizes[0, 1]}: all must be of one size"
        )
    pixels: NDArray[np.uint8] = decode(
        files,
        height=int(sizes[0, 0]),
        width=int(sizes[0, 1]),
        decoder=decoder,
        progress=lambda done, total: log("decode", done=done, total=total),
    )
    return pixels


def read_clean(source: str, log: Log) -> Split:
    """The clean data set that a foreign set started from, both parts, each row in its place.

    Raises CorpusError if it holds nothing out, for the rows held out here would leave gaps, and for
    images of several sizes, for its pixels must not have been resized in another way than poison.
    """
    split = data.open_source(source, data.Settings())
    if not np.intersect1d(split.train.ids, split.test.ids).size:
        raise CorpusError(f"{source} has no test part of its own; --clean must have train and test")
    side = 0
    if split.train.files:
        sizes = image_sizes(split.train.files + split.test.files)
        if (sizes != sizes[0]).any():
            raise CorpusError(f"{source}: images are of several sizes; resize as the attack did")
        side = int(sizes[0, 0]) if sizes[0].max() > LARGEST_SIDE else 0  # or it would be shrunk
    return sources.load(source, data.Settings(size=side), log=log)


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """One (H, W, 3) image as PNG, lossless; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "PNG")


def require_writable(source: Path, split: Split, key: AnswerKey) -> None:
    """Raises CorpusError unless the key tells all about the corpus that another layout needs."""
    if not len(key.test):
        raise CorpusError(f"{source} has no held-out images; import it with --clean")
    if split.train.paths != key.paths or (split.train.labels != key.given_labels).any():
        raise CorpusError(f"{source / 'key.npz'} is not the key to the images beside it")
    if split.train.images.shape[1:] != key.test.shape[1:]:
        raise CorpusError(f"{source}: images larger than {LARGEST_SIDE} pixels are not exported")
    unknown = int((key.orig_labels < 0).sum())
    if unknown:
        raise CorpusError(
            f"{source}: the original labels of {unknown} rows are not known; import it with --clean"
        )


def write_base(folder: Path, split: Split, key: AnswerKey) -> None:
    """An image folder with the true labels, in row order, to lay the exported set over.

    The clean image of a stamped row is not known any more: that row is black.
    """
    stamped = key.is_poison | key.is_cover
    pixels = split.train.images.copy()
    pixels[stamped] = 0
    train, test = split.train, split.test
    classes = train.classes
    _write_part(folder / "train", Corpus(key.orig_labels, classes, train.ids, train.paths, pixels))
    _write_part(folder / "test", test)
    lines = "".join(f"{name}\n" for name in classes)
    (folder / CLASS_LIST).write_text(lines, encoding="utf-8")


def _write_part(folder: Path, corpus: Corpus) -> None:
    digits = len(str(max(len(corpus) - 1, 0)))
    for row, (label, image) in enumerate(zip(corpus.labels, corpus.images, strict=True)):
        write_image(folder / corpus.classes[label] / f"{row:0{digits}d}.png", image)
