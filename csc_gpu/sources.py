"""From what the user names to a corpus of one size: open it, check every file, decode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from csc_gpu import cache, data
from csc_gpu.backend import Backend, Decoder, reader, usable_cores
from csc_gpu.backend.cpu import free_memory
from csc_gpu.errors import CorpusError
from csc_gpu.types import Corpus, Log, Split, quiet


def load(
    source: str,
    settings: data.Settings,
    *,
    backend: Backend | None = None,
    before: reader.Before = lambda split, size, streamed: None,
    skip_broken: bool = False,
    log: Log = quiet,
) -> Split:
    """Both parts of a source; raises CorpusError for anything wrong with it.

    With a backend the pixels are where it wants them, or stay on disk if they do not fit there;
    without one they are resident on the processor. `before` is told first, and may raise.
    """
    split = data.open_source(source, settings)
    return reader.read(
        split,
        settings,
        decoder=backend.decoder if backend else Decoder(torch.device("cpu"), usable_cores()),
        room=backend.free_bytes if backend else free_memory,
        may_stream=backend is not None,
        before=before,
        skip_broken=skip_broken,
        cache=cache.place("checked", source, ".bin"),
        log=log,
    )


def sound(source: str, split: Split, *, skip_broken: bool = False, log: Log = quiet) -> Split:
    """The split of files without those that do not decode; raises CorpusError unless told to."""
    return reader.sound(
        split,
        threads=usable_cores(),
        skip_broken=skip_broken,
        cache=cache.place("checked", source, ".bin"),
        log=log,
    )


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
