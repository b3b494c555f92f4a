"""The main memory of this machine: what is free, and what this process took."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.platform != "win32":
    import resource  # not there on Windows

MEMINFO = Path("/proc/meminfo")


def peak_memory() -> int | None:
    """Most bytes this process had resident so far; None on Windows, where Python does not tell."""
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory() -> int | None:
    """Bytes of main memory that can be taken without swapping; None where Linux does not tell."""
    if not MEMINFO.exists():
        return None
    lines = MEMINFO.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
