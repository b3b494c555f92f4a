"""From what the user names to a corpus of one size: open it, check every file, decode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu import cache, data
from csc_gpu.backend import Backend, Decoder, reader, usable_cores
from csc_gpu.backend.loader import contents_of, decode
from csc_gpu.data.packed import MANIFEST, digest, is_packed
from csc_gpu.errors import CorpusError
from csc_gpu.memory import free_memory
from csc_gpu.types import Corpus, Log, Split, quiet

SAMPLED = 1000
"""Images of a source whose bytes are looked at to tell it from another: reading all takes long."""
CONTENTS, DATES = "contents", "dates"


def load(
    source: str,
    settings: data.Settings,
    *,
    backend: Backend | None = None,
    before: reader.Before = lambda split, size, streamed: None,
    skip_broken: bool = False,
    max_bad: int | None = None,
    log: Log = quiet,
) -> Split:
    """Both parts of a source; raises CorpusError for anything wrong with it.

    With a backend the pixels are where it wants them, or stay on disk if they do not fit there;
    without one they are resident on the processor. `before` is told first, and may raise.
    """
    return read(
        data.open_source(source, settings, log),
        source,
        settings,
        backend=backend,
        before=before,
        skip_broken=skip_broken,
        max_bad=max_bad,
        log=log,
    )


def read(
    split: Split,
    source: str,
    settings: data.Settings,
    *,
    backend: Backend | None = None,
    before: reader.Before = lambda split, size, streamed: None,
    skip_broken: bool = False,
    max_bad: int | None = None,
    log: Log = quiet,
) -> Split:
    """As `load`, of a source that is open already."""
    return reader.read(
        split,
        settings,
        decoder=backend.decoder if backend else Decoder(torch.device("cpu"), usable_cores()),
        room=backend.free_bytes if backend else free_memory,
        may_stream=backend is not None,
        before=before,
        skip_broken=skip_broken,
        max_bad=max_bad,
        cache=cache.place("checked", source, ".bin"),
        seen=cache.place("sizes", source, ".bin"),
        log=log,
    )


def fingerprints(source: str, split: Split) -> dict[str, str]:
    """What tells the images of an open source from others, though not all of them are read.

    Contents: an .npz or a CSV by its bytes, what `pack` wrote by its manifest, which has the hash
    of every shard. Files by their sizes, and by the bytes of SAMPLED images of each part; their
    dates are apart, for a copy has others.
    """
    path = Path(source)
    if path.is_dir() and is_packed(path):
        return {CONTENTS: digest(path / MANIFEST)}
    contents, dates = hashlib.sha256(), hashlib.sha256()
    if path.is_file():
        contents.update(digest(path).encode())
    parts = [part.files for part in (split.train, split.test)]
    root = parts[0].root
    for name in dict.fromkeys(parts[0].names + parts[1].names):
        size, modified, _ = cache.stamp(root / name) or (-1, -1, -1)
        contents.update(size.to_bytes(8, signed=True))
        dates.update(modified.to_bytes(8, signed=True))
    for files in parts:
        for row in range(0, len(files), max(1, len(files) // SAMPLED)):
            found = contents_of(files[row])
            contents.update(found.encode() if isinstance(found, str) else found)
    return {CONTENTS: contents.hexdigest(), DATES: dates.hexdigest()}


def training_size(source: str, train: Corpus, settings: data.Settings) -> tuple[int, int]:
    """Height and width to which the images of a source will be brought."""
    sizes = reader.sizes_of(train, cache=cache.place("sizes", source, ".bin"))
    return reader.common_size(sizes, settings.size)


def sound(source: str, split: Split, *, skip_broken: bool = False, log: Log = quiet) -> Split:
    """The split of files without those that do not decode; raises CorpusError unless told to."""
    return reader.sound(
        split,
        threads=usable_cores(),
        skip_broken=skip_broken,
        cache=cache.place("checked", source, ".bin"),
        log=log,
    )


@dataclass(frozen=True)
class Album:
    """The images that a run was trained on, found again."""

    corpus: Corpus
    place: NDArray[np.int64]  # (N,) where the run's rows are in the corpus
    size: tuple[int, int]  # H and W at which they were looked at

    def images(self, rows: NDArray[np.int64], largest: int = 0) -> NDArray[np.uint8]:
        """These rows of the run; smaller, if a side were longer than `largest`. (n, H, W, 3)

        Raises CorpusError if one of them cannot be read any more.
        """
        shrink = min(1.0, largest / max(self.size)) if largest else 1.0
        height, width = (max(1, round(side * shrink)) for side in self.size)
        some = self.corpus.take(self.place[rows])
        if some.pixels is not None:
            return reader.resized(some.pixels, height, width)
        decoder = Decoder(torch.device("cpu"), usable_cores())
        found: NDArray[np.uint8] = decode(some.files, height=height, width=width, decoder=decoder)
        return found


def album(
    source: str, settings: data.Settings, paths: Sequence[str], size: tuple[int, int]
) -> Album:
    """The rows of a run, by their paths; raises CorpusError if the source does not hold them."""
    corpus = data.open_source(source, settings).train
    return Album(corpus, matched(corpus, paths, source), size)


def matched(corpus: Corpus, paths: Sequence[str], source: str) -> NDArray[np.int64]:
    """Where the rows of these paths are in the corpus. (len(paths),)

    Raises CorpusError if one is not there.
    """
    at = {path: row for row, path in enumerate(corpus.paths)}
    strangers = [path for path in paths if path not in at]
    if strangers:
        raise CorpusError(
            f"{source} is not what the run was trained on, or has changed: {len(strangers)} of its "
            f"{len(paths)} rows are not there, the first is {strangers[0]}"
        )
    return np.array([at[path] for path in paths], np.int64)


def reserve(source: str, corpus: Corpus, *, log: Log = quiet) -> Corpus:
    """All images of a source, held out or not, as clean rows with the corpus's labels and size.

    Raises CorpusError for a class that the corpus does not have, and for images of another shape.
    """
    height, width = corpus.image_size
    size = height if height == width else 0
    split = load(source, data.Settings(size=size), log=log)
    strange = set(split.train.classes) - set(corpus.classes)
    if strange:
        raise CorpusError(
            f"{source}: the corpus has no class {min(strange)!r}; clean images need its class names"
        )
    if split.train.image_size != (height, width):
        raise CorpusError(
            f"{source}: clean images are {split.train.image_size}, those of the corpus "
            f"{(height, width)}; set data.size"
        )
    label_of = np.array([corpus.classes.index(name) for name in split.train.classes])
    labels = np.concatenate([split.train.labels, split.test.labels])
    return replace(
        split.train,
        labels=label_of[labels],
        classes=corpus.classes,
        ids=np.arange(len(labels)),
        paths=split.train.paths + split.test.paths,
        pixels=np.concatenate([split.train.images, split.test.images]),
    )
