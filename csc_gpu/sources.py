"""From what the user names to a corpus of one size: open it, check every file, decode."""

from __future__ import annotations

import torch

from csc_gpu import cache, data
from csc_gpu.backend import Backend, Decoder, reader, usable_cores
from csc_gpu.backend.cpu import free_memory
from csc_gpu.types import Corpus, Log, Split, quiet


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
    split = data.open_source(source, settings, log)
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
