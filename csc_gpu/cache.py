"""What was found out about files, kept outside the corpus; losing it costs time alone."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path


def home() -> Path:
    """The folder of everything that is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / "csc-gpu"


def place(what: str, about: str | Path, ending: str) -> Path:
    """Where this is kept about a source."""
    name = hashlib.sha256(os.path.abspath(about).encode(errors="surrogateescape")).hexdigest()[:16]
    return home() / f"{what}-{name}{ending}"


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Size, mtime and ctime in ns, None when there is no such file.

    Poisoned sets have files of one size and one mtime, so these alone would not show a change.
    """
    try:
        status = path.stat()
    except (OSError, UnicodeEncodeError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def keep(cache: Path, content: bytes) -> None:
    """Replace what is kept in one step; not being able to is a warning, for the work is done."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(name, cache)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"cannot remember what was found in {cache}: {error}", stacklevel=3)
