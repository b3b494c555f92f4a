"""A trigger guessed from two groups of rows, and what it does to other images.

The mean image of a group less the mean image of another is the pattern that one has and the other
has not. Added to images of other labels, a trigger that lies at one place (a patch, a blend, a
wave) sends them to its target; what makes benign groups of a class differ does so seldom. After
the trigger reconstruction of Neural Cleanse (Wang et al., S&P 2019), but without optimisation: the
suspects themselves say what the trigger looks like. It is ours, not CSC's.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.features import BATCH
from csc_gpu.models import Net
from csc_gpu.types import Corpus, Mask, Transfer

TRIED = 256
"""Images of other labels that the pattern is added to, at most."""
AVERAGED = 2048
"""Rows of a group whose mean is taken, at most."""
FREE = 0.5
"""Share of the images tried that must not have the label before the pattern is added."""
OF_ONE = 16
"""Images of one label that must have been tried for its share to be told."""
NONE = (0.0, -1)
"""The share of one label, and the label, where there is none to be told."""
RANGE = 2.0
"""Images as the net sees them lie within -RANGE and RANGE."""


def evenly(rows: Mask, most: int) -> NDArray[np.int64]:
    """At most so many of these rows, spread evenly over the corpus."""
    found = np.flatnonzero(rows)
    places = np.linspace(0, len(found) - 1, min(len(found), most)).astype(np.int64)
    chosen: NDArray[np.int64] = found[places]
    return chosen


def mean_image(corpus: Corpus, rows: Mask, backend: Backend) -> torch.Tensor:
    """The mean of these rows as the net sees them. (3, H, W) float64 on the device"""
    chosen = evenly(rows, AVERAGED)
    parts = backend.batches(corpus, BATCH, order=chosen)
    total = sum(batch.images.double().sum(dim=0) for batch in parts)
    return torch.as_tensor(total) / len(chosen)


@torch.inference_mode()
def transfers(
    model: Net, corpus: Corpus, group: Mask, rest: Mask, label: int, backend: Backend
) -> Transfer:
    """How many of the other labels' images get `label` once the pattern of a group is added.

    The pattern is the mean of `group` (N,) less that of `rest` (N,). Images that the model gives
    the label as they are do not count; where half are such the model prefers it, whatever the
    pattern, and the share is 0. A trigger that works on one label alone (TaCT) shows in that
    label's share, which is known where a corpus has so few labels that enough of each are tried,
    and told if the group is made of such images: nearer to their mean than to that of `rest`.
    """
    model.eval()
    ours = mean_image(corpus, group, backend)
    pattern = ours - mean_image(corpus, rest, backend)
    tried = evenly((corpus.labels != label) & ~group & ~rest, TRIED)
    if not len(tried):
        tried = evenly(corpus.labels != label, TRIED)
    is_free, is_hit = answers(model, corpus, pattern, tried, label, backend)
    labels = corpus.labels[tried]

    def share(of: Mask) -> float:
        free = int(is_free[of].sum())
        return int(is_hit[of].sum()) / free if free > FREE * int(of.sum()) else 0.0

    def is_made_of(y: int) -> bool:
        theirs = mean_image(corpus, np.isin(np.arange(len(corpus)), tried[labels == y]), backend)
        return bool((theirs - ours).norm() < pattern.norm())

    enough = [y for y in np.unique(labels).tolist() if (labels == y).sum() >= OF_ONE]
    shares = [(share(labels == y), y) for y in enough]
    most, source = max(
        (found for found in shares if found[0] and is_made_of(found[1])), default=NONE
    )
    groups = Transfer.fingerprint(group, rest)
    return Transfer(label, groups, share(np.ones(len(tried), bool)), source, most)


def answers(
    model: Net,
    corpus: Corpus,
    pattern: torch.Tensor,
    tried: NDArray[np.int64],
    label: int,
    backend: Backend,
) -> tuple[Mask, Mask]:
    """Which of these rows (n,) have not the label as they are, and which then get it stamped."""
    free, hit = np.zeros(len(tried), bool), np.zeros(len(tried), bool)
    done = 0
    for batch in backend.batches(corpus, BATCH, order=tried):
        stamped = (batch.images + pattern.to(batch.images)).clamp(-RANGE, RANGE)
        stamped = stamped.contiguous(memory_format=torch.channels_last)
        counts = model(batch.images).argmax(dim=1) != label
        now = slice(done, done := done + len(counts))
        free[now] = counts.cpu().numpy()
        hit[now] = (counts & (model(stamped).argmax(dim=1) == label)).cpu().numpy()
    return free, hit
