"""What an attack does to some images, as one picture to look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from csc_gpu.attacks.attack import Pixels
from csc_gpu.attacks.pictures import rounded
from csc_gpu.attacks.poisoning import Trigger
from csc_gpu.types import Corpus

SAMPLES = 8
LEAST = 64
"""Images are drawn at least so high, in pixels."""
GAP = 2


def preview(corpus: Corpus, trigger: Trigger) -> Pixels:
    """Samples, one a column: clean, as poison, the difference, as a triggered test image, and as a
    cover where the attack has any. Differences are stretched until the largest is white, and half
    of grey is none. (height, width, 3)"""
    rows = np.flatnonzero(trigger.may_take(corpus))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLES)).astype(int)]
    clean, true = corpus.images[rows], corpus.labels[rows]
    wanted = trigger.aims(true, corpus.classes)
    poison = trigger.poison(clean, wanted)
    lines = [clean, poison, stretched(clean, poison), trigger.test(clean, wanted)]
    lines += [trigger.cover(clean)] if trigger.whom.covers else []
    return sheet(lines)


def stretched(clean: Pixels, stamped: Pixels) -> Pixels:
    """The difference of images, grey where there is none. (B, H, W, 3)"""
    difference = stamped.astype(np.float32) - clean
    largest = max(float(np.abs(difference).max()), 1.0)
    return rounded(127.5 + 127.5 * difference / largest)


def sheet(lines: list[Pixels]) -> Pixels:
    """Lines of images (B, H, W, 3) below each other on white. (height, width, 3)"""
    times = max(1, -(-LEAST // lines[0].shape[1]))
    return np.concatenate([_line(images, times) for images in lines])


def _line(images: Pixels, times: int) -> NDArray[np.uint8]:
    large = images.repeat(times, axis=1).repeat(times, axis=2)
    edge = ((0, 0), (0, GAP), (0, GAP), (0, 0))
    return np.concatenate(list(np.pad(large, edge, constant_values=255)), axis=1)
