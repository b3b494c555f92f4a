"""Batches beside the loop's: every row once a pass, the same batch for the same number."""

from __future__ import annotations

import numpy as np
import torch

from csc_gpu.backend import Augment, open_backend
from csc_gpu.defenses.streams import Stream
from tests.test_train import corpus

CPU = open_backend("cpu", 1)
SOME = np.array([1, 2, 5, 8, 13, 17, 19])


def stream(seed: tuple[int, ...] = (1, 2), **more: object) -> Stream:
    return Stream(corpus(), 3, CPU, seed=seed, **more)


def test_a_pass_brings_every_row_once_and_the_next_in_another_order():
    there = stream(rows=SOME)
    passes = [np.concatenate([there[3 * turn + i].rows for i in range(3)]) for turn in range(2)]
    for rows in passes:
        np.testing.assert_array_equal(np.sort(rows), SOME)
    assert (passes[0] != passes[1]).any()


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    how = {"augment": Augment(shift=1)}
    whole = stream(**how)
    in_order = [whole[number].images.clone() for number in range(20)]
    for number in (11, 4, 5, 19):
        assert torch.equal(stream(**how)[number].images, in_order[number])
    again = stream(**how)
    for number in (19, 5, 6, 7, 8, 3):  # a pass of 7 batches begins anew in between
        assert torch.equal(again[number].images, in_order[number])


def test_another_seed_gives_other_batches():
    assert not torch.equal(stream()[0].rows, stream((1, 3))[0].rows)
