"""What a corpus is, not how it is read: one file for each kind of source.

A source says what it holds: rows to train on and, if it has them, rows held out; here the rest is
done for all of them alike. Images in files stay on disk until `backend.reader` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from csc_gpu.data.arrays import open_arrays
from csc_gpu.data.digits import open_digits
from csc_gpu.data.folders import open_folder
from csc_gpu.data.holdout import held_out
from csc_gpu.data.manifests import open_manifest
from csc_gpu.data.metadata import has_metadata, open_metadata
from csc_gpu.data.packed import is_packed, open_packed
from csc_gpu.data.shards import has_shards, open_shards
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.types import Corpus, Log, Split, quiet


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a source becomes images to train on and images held out."""

    size: int = 0
    """Height and width that images are resized to, in pixels; 0: the median side of the images,
    at most 224."""
    holdout: float = 0.2
    """Share of every class that is held out, where the source holds nothing out itself."""
    holdout_seed: int = 0
    """Which rows those are."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"data.size must be 0 or more, got {self.size}")
        if not 0 < self.holdout < 1:
            raise ConfigError(f"data.holdout must be above 0 and below 1, got {self.holdout}")
        if self.holdout_seed < 0:
            raise ConfigError(f"data.holdout_seed must be 0 or more, got {self.holdout_seed}")


def open_source(source: str, settings: Settings, log: Log = quiet) -> Split:
    """The corpus at a path, by what the path is, or the embedded one; images are not read yet.

    Raises CorpusError, which says what is wrong with the source.
    """
    try:
        train, test = _opened(source, log)
    except OSError as fault:
        raise CorpusError(f"cannot read {source}: {fault}") from fault
    if test is None:
        is_test = held_out(train.labels, settings.holdout, settings.holdout_seed)
        train, test = train.take(np.flatnonzero(~is_test)), train.take(np.flatnonzero(is_test))
    return checked(Split(train, test), source)


def checked(split: Split, name: str) -> Split:
    """The same split if it can be trained and tested on; `name` begins the message if not."""
    train, test = split.train, split.test
    for part, corpus in (("train", train), ("test", test)):
        if not len(corpus):
            raise CorpusError(f"{name}: no images to {part} on; add some, or change data.holdout")
        columns = (
            corpus.ids,
            corpus.paths,
            corpus.files if corpus.pixels is None else corpus.pixels,
        )
        if any(len(column) != len(corpus) for column in columns):
            raise CorpusError(f"{name}: the {part} part has more images than labels, or fewer")
        if corpus.labels.min() < 0 or corpus.labels.max() >= corpus.n_classes:
            raise CorpusError(f"{name}: {part} labels must be 0..{corpus.n_classes - 1}")
    present = np.unique(train.labels)
    if len(present) < 2:
        only = train.classes[present[0]]
        raise CorpusError(f"{name}: only one class, {only!r}, has images to train on; add another")
    if train.pixels is not None and test.pixels is not None:
        sides, other = train.pixels.shape[1:], test.pixels.shape[1:]
        if sides != other:
            raise CorpusError(f"{name}: train images are {sides} but test images are {other}")
    return split


def _opened(source: str, log: Log) -> tuple[Corpus, Corpus | None]:
    path = Path(source)
    if path.is_dir():
        if is_packed(path):
            return open_packed(path, log)
        if has_shards(path):
            return open_shards(path)
        return open_metadata(path) if has_metadata(path) else open_folder(path)
    if path.is_file() and path.suffix.lower() == ".npz":
        return open_arrays(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return open_manifest(path)
    if source == "digits" and not path.exists():
        return open_digits(), None
    raise CorpusError(
        f"no folder, .npz or .csv at {source!r} (the embedded set is called 'digits')"
    )
