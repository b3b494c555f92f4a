"""Backdoor defense for image classifiers: Cluster Segregation Concealment and its rivals.

The command line is `csc-gpu`; the method is in `csc_gpu.csc`, where a reader starts. From Python:

    from csc_gpu import defend

    outcome = defend("photos/", cpu=True)
    outcome.suspects  # file names; outcome.segregation.suspect: (N,) bool
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csc_gpu.api import defend
    from csc_gpu.datasets import CleanDataset
    from csc_gpu.guarded import GuardedClassifier
    from csc_gpu.watcher import Watcher

__all__ = ["CleanDataset", "GuardedClassifier", "Watcher", "defend"]

PLACES = {
    "CleanDataset": "csc_gpu.datasets",
    "GuardedClassifier": "csc_gpu.guarded",
    "Watcher": "csc_gpu.watcher",
    "defend": "csc_gpu.api",
}
"""Where the public names are: loaded when they are asked for, since torch takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'csc_gpu' has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)
