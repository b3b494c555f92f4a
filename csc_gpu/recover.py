"""Recovery, beyond the paper: a net that never learnt the trigger names the true class.

Concealment sends a triggered image to the virtual class and cannot say what it shows, for the
extractor still knows the trigger. A net trained from scratch without the suspects does not; beside
it the concealed net stays on as the tripwire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csc_gpu import train
from csc_gpu.backend import Backend
from csc_gpu.checkpoint import NOWHERE, Checkpoints
from csc_gpu.config import require
from csc_gpu.models import Net
from csc_gpu.segregate import at_most
from csc_gpu.types import Corpus, Log, Mask, Segregation, quiet


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Whether and how the true class is recovered."""

    on: bool = False
    """Also give a net trained without the suspects (the option --recover)."""
    doubt: float = 0.02
    """Rows of a suspect's label with a poison_score from here on are left out, too: poison that was
    missed keeps the attack alive, and a clean row costs little."""
    most: float = 0.5
    """Share of the other rows of such a label that doubt may take, the most doubtful ones: a net
    that has seen few of them cannot name the label."""

    def __post_init__(self) -> None:
        shares = ("doubt", "most")
        require(self, "recover", "in [0, 1]", lambda share: 0 <= share <= 1, *shares)


def left_out(verdict: Segregation, labels: NDArray[np.int64], settings: Settings) -> Mask:
    """The suspects and the doubtful rows of their labels, but of no label most of the rest. (N,)"""
    unwanted = verdict.suspect
    for label in np.unique(labels[verdict.suspect]):
        others = (labels == label) & ~verdict.suspect
        doubtful = others & (verdict.score >= settings.doubt)
        unwanted = unwanted | at_most(settings.most, doubtful, others, verdict.score)
    return unwanted


@dataclass(frozen=True)
class Recovered:
    """A net of C outputs, and the rows that it has not learnt from: suspects and doubtful ones."""

    model: Net
    without: Mask  # (N,)


def recover(
    corpus: Corpus,
    unwanted: Mask,
    untrained: Callable[[int], Net],
    training: train.Settings,
    backend: Backend,
    *,
    seed: int,
    log: Log = quiet,
    kept: Checkpoints = NOWHERE,
) -> Recovered:
    """A net trained as long as the first one, but for the unwanted rows (N,).

    untrained makes a fresh net from a seed.
    """
    model = untrained(seed + 2)
    rows = np.flatnonzero(~unwanted)
    for at in train.train(
        model, corpus, training, backend, seed=seed + 2, rows=rows, kept=kept, name="recover"
    ):
        log("step", stage="recover", at=at)
    return Recovered(model, unwanted)
