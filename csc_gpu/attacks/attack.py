"""What an attack is: plain functions, put together in one value that its file calls ATTACK."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.config import typed
from csc_gpu.types import Corpus, Log

Pixels = NDArray[np.uint8]
Stamp = Callable[[Pixels, Any, np.random.Generator], Pixels]
"""Images (B, H, W, 3), the trigger (the attack's settings, or Learned), and the chance of this call
-> the images stamped. Pure: the same three give the same images."""
Tensors = Mapping[str, torch.Tensor]
Learn = Callable[[Corpus, int, Any, Backend, int, Log], Tensors]
"""Clean training rows, the target, settings, the machine, a seed -> what the stamp has to know."""


@dataclass(frozen=True)
class Learned:
    """The trigger of an attack that learns it from the corpus first."""

    settings: Any
    tensors: Tensors
    target: int


@dataclass(frozen=True)
class Whom:
    """Which rows an attack takes, beyond what its label policy says. Classes: names or indices."""

    sources: tuple[str, ...] = ()
    """Poison and triggered images come from these classes; (): from all it may take."""
    covers: float = 0.0
    """Rows that are stamped and keep their true label, for each poisoned row."""
    bystanders: tuple[str, ...] = ()
    """Covers come from these classes; (): from all."""


def anyone(settings: Any) -> Whom:
    """No covers, and poison from wherever the label policy allows."""
    del settings
    return Whom()


def never(settings: Any) -> bool:
    """Whether an attack that learns need not, with these settings: no."""
    del settings
    return False


def with_covers(settings: Any) -> Whom:
    """As `anyone`, and as many covers for each poisoned row as the setting `cover` says."""
    return Whom(covers=settings.cover)


@dataclass(frozen=True)
class Attack:
    """One attack: how it stamps, which rows it may take, and where it comes from."""

    settings: type
    stamp: Stamp
    labels: str  # "dirty": other classes relabelled; "clean": rows of the target; "none"
    family: str  # patch, blend, wave, warp, filter, frequency, generator, ...
    summary: str
    source: str  # the paper
    test: Stamp | None = None  # how held-out images are stamped, if not as training rows are
    cover: Stamp | None = None  # how covers are stamped, if not as poison is
    whom: Callable[[Any], Whom] = anyone
    learn: Learn | None = None
    fixed: Callable[[Any], bool] = never  # with these settings it stamps without learning
    only_all_to_all: bool = False

    def learns(self, settings: Any) -> bool:
        """Whether it has to learn its trigger first, and so needs a machine."""
        return self.learn is not None and not self.fixed(settings)

    @property
    def label_policy(self) -> str:
        """In the field's words: dirty-label, clean-label or - for none."""
        return "-" if self.labels == "none" else f"{self.labels}-label"

    @property
    def defaults(self) -> str:
        """Every setting with its default, as --option takes them."""
        usual = self.settings()
        return " ".join(f"{f.name}={typed(getattr(usual, f.name))}" for f in fields(usual))
