"""The defenses by name: each takes a DefenderView and returns an Outcome.

A new one is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csc_gpu import csc
from csc_gpu.defenses import plain
from csc_gpu.types import Outcome


@dataclass(frozen=True)
class Entry:
    """A defense and its settings."""

    run: Callable[..., Outcome]  # (view, settings, backend, *, seed, log) -> Outcome
    settings: Callable[[], Any]
    summary: str


DEFENSES: dict[str, Entry] = {
    "csc": Entry(csc.defend, csc.Settings, "Cluster Segregation Concealment, arXiv 2604.21416"),
    "plain": Entry(plain.defend, csc.Settings, "no defense: ordinary training, the control"),
}
