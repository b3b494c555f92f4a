"""Poisoned sets of other tools: read into a corpus with its key, and written for them.

A reader gives back a Found, rows in the other tool's order; `adopt` makes of it what `csc-gpu
poison` makes of a clean corpus. A new layout is a file and a line here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csc_gpu.errors import ConfigError
from csc_gpu.foreign import backdoor_toolbox, backdoorbench, plain_arrays
from csc_gpu.foreign.adopt import adopt, stamped
from csc_gpu.foreign.base import BASE, read_clean, require_writable, write_base
from csc_gpu.foreign.found import Found
from csc_gpu.types import AnswerKey, Log, Split

Read = Callable[[Path, Split | None, Log], Found]
"""(the set, the clean data set in its order or None, log) -> what the set says."""
Write = Callable[[Path, Split, AnswerKey, Path], None]
"""(empty directory, poisoned corpus, its key, what the directory will be called)."""


@dataclass(frozen=True)
class Format:
    """One layout on disk."""

    read: Read
    write: Write
    names: frozenset[str]  # all that the written directory may hold, with BASE
    lacks: str = ""  # what a written set is no good for, in a line


FORMATS: dict[str, Format] = {
    "backdoor-toolbox": Format(
        backdoor_toolbox.read,
        backdoor_toolbox.write,
        backdoor_toolbox.NAMES,
        "the layout has no place for triggered test images (key.npz has them)",
    ),
    "backdoorbench": Format(
        backdoorbench.read,
        backdoorbench.write,
        backdoorbench.NAMES,
        "load_attack_result cannot read it, for it builds the clean set by name; "
        f"prepro_cls_DatasetBD_v2 can be laid over {BASE}/",
    ),
    "npy": Format(plain_arrays.read, plain_arrays.write, plain_arrays.NAMES),
}

__all__ = [
    "BASE",
    "FORMATS",
    "Format",
    "Found",
    "adopt",
    "named",
    "read_clean",
    "require_writable",
    "stamped",
    "write_base",
]


def named(name: str) -> Format:
    """The layout of that name. Raises ConfigError for one that is not known."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        said = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FORMATS)}"
        raise ConfigError(f"unknown layout {name!r}; {said}")
    return FORMATS[name]
