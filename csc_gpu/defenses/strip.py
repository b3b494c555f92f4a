"""STRIP (Gao et al., ACSAC 2019, arXiv 1902.06531), on the training rows.

An image with a trigger keeps its prediction whatever clean image is laid over it, so the entropy of
its predictions is low. Rows below the entropy that a tenth of the clean images falls short of are
removed, and a net is trained on the rest: so a tenth of clean rows is flagged by design.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu import csc
from csc_gpu.backend import Backend
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.features import BATCH
from csc_gpu.models import Net
from csc_gpu.types import Corpus, DefenderView, Outcome


@dataclass(frozen=True, kw_only=True)
class Superposition:
    """What is laid over an image, and how low an entropy is suspect."""

    overlays: int = 100
    """Clean images laid over each image."""
    weight: float = 1.0
    """What they weigh against it, as they go into the net."""
    false_alarms: float = 0.1
    """Share of the clean images whose entropy counts as suspect."""

    def __post_init__(self) -> None:
        require(self, "strip", "1 or more", lambda count: count >= 1, "overlays")
        require(self, "strip", "above 0", lambda value: 0 < value < 100, "weight")
        require(self, "strip", "in (0, 1)", lambda share: 0 < share < 1, "false_alarms")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and STRIP's."""

    strip: Superposition = field(default_factory=Superposition)


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, remove the rows that keep their prediction under any overlay, train again."""
    course = Course(view, settings, backend, **how)
    clean, chosen = course.reserve, settings.strip
    model = course.trained()
    with course.clock("judge"):
        usual = entropies(model, clean, clean, chosen, backend, seed=course.seed)
        limit = float(np.quantile(usual, chosen.false_alarms))
        entropy = entropies(model, view.train, clean, chosen, backend, seed=course.seed + 1)
    found = verdict(entropy < limit, -entropy, "strip", {"entropy_limit": limit})
    return course.filtered(model, found)


@torch.inference_mode()
def entropies(
    model: Net, corpus: Corpus, clean: Corpus, chosen: Superposition, backend: Backend, *, seed: int
) -> NDArray[np.float64]:
    """Mean entropy, in bits, of the predictions of each row under its overlays. (N,)"""
    model.eval()
    rng = np.random.default_rng(seed)
    laid = backend.xp.asarray(rng.integers(len(clean), size=(len(corpus), chosen.overlays)))
    over = backend.tensor(laid)  # (N, overlays) rows of the clean images
    images = torch.cat([batch.images.clone() for batch in backend.batches(clean, BATCH)])
    out = np.zeros(len(corpus))
    for batch in backend.batches(corpus, BATCH):
        mine, total = over[batch.rows], torch.zeros(len(batch.rows), device=backend.device)
        for which in mine.T:
            log_share = model(batch.images + chosen.weight * images[which]).log_softmax(1)
            total -= (log_share.exp() * log_share).sum(1)
        rows = backend.to_numpy(backend.array(batch.rows))
        out[rows] = backend.to_numpy(backend.array(total)) / (chosen.overlays * np.log(2))
    return out
