"""From what the user names to a resident corpus: open it, check every file, decode."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from csc_gpu import data
from csc_gpu.backend import reader, usable_cores
from csc_gpu.types import Log, Split, quiet


def load(
    source: str, settings: data.Settings, *, skip_broken: bool = False, log: Log = quiet
) -> Split:
    """Both parts of a source, with their pixels; raises CorpusError for anything wrong with it."""
    split = data.open_source(source, settings)
    return reader.read(
        split,
        settings,
        threads=usable_cores(),
        skip_broken=skip_broken,
        cache=_checked_files(source),
        log=log,
    )


def _checked_files(source: str) -> Path:
    """Where the list of files known to be whole is kept, outside the corpus."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache")
    name = hashlib.sha256(os.path.abspath(source).encode()).hexdigest()[:16]
    return home / "csc-gpu" / f"checked-{name}.json"
