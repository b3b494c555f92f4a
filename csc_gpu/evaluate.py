"""Scores: the only place that sees both an outcome and the answer key.

Every figure is a bare fraction 0..1 with its numerator and denominator beside it; one without a
denominator (no poison, nobody flagged, no attack) is None, never 0. The argmax runs over all C + 1
outputs of a concealed model: an input sent to the virtual class is an error on clean images and a
catch on triggered ones. `asr_masked` and `ra_masked` are over the C real outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from csc_gpu.backend import Backend
from csc_gpu.features import BATCH
from csc_gpu.models import Net
from csc_gpu.types import AnswerKey, Corpus, Mask

CURVE = 200
"""Points of a curve, at most."""


@dataclass(frozen=True)
class Fraction:
    """A numerator over a denominator."""

    hits: int
    of: int

    @property
    def value(self) -> float | None:
        """0..1, or None where there is nothing to count."""
        return self.hits / self.of if self.of else None


def share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> Fraction:
    """How many of the rows in `among` are hits."""
    return Fraction(int((hits & among).sum()), int(among.sum()))


Score = Mapping[str, Any]
"""Named fractions, with `counts` giving [numerator, denominator] of each."""


def accuracy_and_attack(model: Net, key: AnswerKey, n_classes: int, backend: Backend) -> Score:
    """acc, asr, asr_incl_target, ra and the virtual rates of one model (anchors: BackdoorBench's).

    asr counts triggered images that are not of the target class already; ra those among them that
    get their true label.
    """
    logits = outputs(model, unlabelled(key.test), backend)
    guess, truth = logits.argmax(1), key.test_labels
    everyone = np.ones(len(truth), bool)
    found = {
        "acc": share(guess == truth, everyone),
        "virtual_clean": share(guess == n_classes, everyone),
    }
    under_attack = key.attack_labels >= 0
    wanted, true = key.attack_labels[under_attack], truth[under_attack]
    triggered = outputs(model, unlabelled(key.triggered), backend)
    guess, masked = triggered.argmax(1), triggered[:, :n_classes].argmax(1)
    others, all_of_them = wanted != true, np.ones(len(true), bool)
    found |= {
        "asr": share(guess == wanted, others),
        "asr_incl_target": share(guess == wanted, all_of_them),
        "ra": share(guess == true, others),
        "virtual_triggered": share(guess == n_classes, others),
        "asr_masked": share(masked == wanted, others),
        "ra_masked": share(masked == true, others),
    }
    return {**_as_score(found), "argmax_over": model.n_outputs}


def detection(suspect: Mask, score: NDArray[np.floating[Any]], key: AnswerKey) -> Score:
    """tpr, fpr, precision from the verdict; auroc and ap from the score; covers count as clean.

    `tpr_relabelled` is over the poison whose label changed, `mislabelled_flagged` over clean rows
    with a false label, `covers_flagged` over the covers.
    """
    poison = key.is_poison
    everyone = np.ones(len(poison), bool)
    known = key.orig_labels >= 0  # of an imported set they may not be
    relabelled = known & (key.orig_labels != key.given_labels)
    found = {
        "tpr": share(suspect, poison),
        "fpr": share(suspect, ~poison),
        "precision": share(poison, suspect),
        "tpr_relabelled": share(suspect, poison & relabelled),
        "mislabelled_flagged": share(suspect, ~poison & relabelled),
        "covers_flagged": share(suspect, key.is_cover),
        "flagged": share(suspect, everyone),
    }
    both = poison.any() and not poison.all()
    ranked = {
        "auroc": float(roc_auc_score(poison, score)) if both else None,
        "ap": float(average_precision_score(poison, score)) if both else None,
    }
    counted = np.bincount(key.orig_labels[suspect & ~poison & known])
    by_class = {int(label): int(counted[label]) for label in np.flatnonzero(counted)}
    return {**_as_score(found), **ranked, "false_flags_by_class": by_class}


def curves(score: NDArray[np.floating[Any]], key: AnswerKey) -> dict[str, list[float]] | None:
    """What any limit of the score would give: fpr and tpr, recall and precision, thinned out.

    None where there is no poison, or nothing else.
    """
    poison = key.is_poison
    if not poison.any() or poison.all():
        return None
    fpr, tpr, _ = roc_curve(poison, score)
    precision, recall, _ = precision_recall_curve(poison, score)
    lines = {"fpr": fpr, "tpr": tpr, "recall": recall, "precision": precision}
    return {name: _thinned(line) for name, line in lines.items()}


def _thinned(line: NDArray[np.floating[Any]]) -> list[float]:
    some = np.linspace(0, len(line) - 1, min(len(line), CURVE)).astype(int)
    return [float(value) for value in line[some]]


def unlabelled(images: NDArray[np.uint8]) -> Corpus:
    """Images (M, H, W, 3) as rows to predict."""
    blank = np.zeros(len(images), np.int64)
    return Corpus(blank, ("",), np.arange(len(images)), ("",) * len(images), pixels=images)


@torch.inference_mode()
def outputs(model: Net, corpus: Corpus, backend: Backend) -> NDArray[np.float32]:
    """The logits of every row. (M, C) or (M, C + 1) float32"""
    model.eval()
    out = np.empty((len(corpus), model.n_outputs), np.float32)
    for batch in backend.batches(corpus, BATCH) if len(corpus) else ():
        rows = backend.to_numpy(backend.array(batch.rows))
        out[rows] = backend.to_numpy(backend.array(model(batch.images)))
    return out


def virtual_rate(model: Net, corpus: Corpus, n_classes: int, backend: Backend) -> Fraction:
    """How many rows a concealed model sends to the virtual class: evidence without a key."""
    virtual = outputs(model, corpus, backend).argmax(1) == n_classes
    return share(virtual, np.ones(len(corpus), bool))


def _as_score(found: dict[str, Fraction]) -> Score:
    counts = {name: [fraction.hits, fraction.of] for name, fraction in found.items()}
    return {**{name: fraction.value for name, fraction in found.items()}, "counts": counts}
