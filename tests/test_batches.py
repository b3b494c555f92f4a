"""Batches, and the processor's verbs: every row once, no content lost, distances known by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from csc_gpu.backend import Augment, Batch, open_backend
from csc_gpu.backend.resident import to_float
from csc_gpu.types import Corpus

CPU = open_backend("cpu", 1)
BLACK, WHITE = -2.0, 2.0


def corpus(n: int, height: int = 2, width: int = 3) -> Corpus:
    """Row i is an even picture of colour i, labelled i % 7."""
    pixels = np.empty((n, height, width, 3), np.uint8)
    pixels[:] = np.arange(n).reshape(-1, 1, 1, 1)
    classes = tuple("abcdefg")
    return Corpus(np.arange(n) % 7, classes, np.arange(n) + 100, ("",) * n, pixels)


def dots(n: int, row: int, column: int, height: int = 8, width: int = 10) -> Corpus:
    """n black pictures with one white pixel."""
    pixels = np.zeros((n, height, width, 3), np.uint8)
    pixels[:, row, column] = 255
    return Corpus(np.zeros(n, np.int64), ("a", "b"), np.arange(n), ("",) * n, pixels)


def seen(batches: Iterator[Batch]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """All rows, and all images, in the order they came."""
    all_of_them = list(batches)
    images = np.concatenate([batch.images.numpy() for batch in all_of_them])
    return np.concatenate([batch.rows.numpy() for batch in all_of_them]), images


def places(images: NDArray[np.float32]) -> NDArray[np.int64]:
    """Where the white pixel is; exactly one in every picture, and the rest is black. (B, 2)"""
    assert np.isin(images, (BLACK, WHITE)).all()
    where = np.argwhere((images == WHITE).all(axis=1))
    assert (where[:, 0] == np.arange(len(images))).all()
    assert (images == WHITE).sum() == 3 * len(images)
    return where[:, 1:]


# -------------------------------------------------------------------------------- every row, once


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 200), size=st.integers(1, 150), shuffled=st.booleans())
@example(n=1, size=8, shuffled=True)
@example(n=5, size=8, shuffled=False)
@example(n=8, size=8, shuffled=False)
@example(n=129, size=128, shuffled=True)
def test_every_row_comes_exactly_once_and_in_order(n: int, size: int, shuffled: bool):
    order = np.random.default_rng(0).permutation(n) if shuffled else None
    batches = list(CPU.batches(corpus(n), size, order=order))
    wanted = np.arange(n) if order is None else order
    assert torch.cat([batch.rows for batch in batches]).tolist() == wanted.tolist()
    assert max(len(batch.rows) for batch in batches) <= size
    assert len(batches) == -(-n // size)


@settings(deadline=None, max_examples=150)
@given(n=st.integers(2, 300), size=st.integers(3, 150))
@example(n=129, size=128)
@example(n=4, size=3)
def test_no_batch_has_but_one_row(n: int, size: int):
    lengths = [len(batch.rows) for batch in CPU.batches(corpus(n, 1, 1), size)]
    assert min(lengths) > 1
    assert max(lengths) - min(lengths) <= 1


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 60), size=st.integers(1, 20), shift=st.integers(0, 2), flip=st.booleans())
def test_image_label_and_row_stay_together(n: int, size: int, shift: int, flip: bool):
    there, rng = corpus(n, 6, 6), np.random.default_rng(n)
    order, augment = rng.permutation(n), Augment(shift=shift, flip=flip)
    for batch in CPU.batches(there, size, order=order, augment=augment, rng=rng):
        colour = batch.images[:, :, 3, 3] * 63.75 + 127.5  # the middle is never shifted out
        assert (colour.round() == batch.rows[:, None]).all()
        assert batch.labels.tolist() == there.labels[batch.rows.numpy()].tolist()


def test_only_the_rows_asked_for_come():
    rows, images = seen(CPU.batches(corpus(9), 2, order=np.array([7, 2, 5])))
    assert rows.tolist() == [7, 2, 5]
    assert (images[:, 0, 0, 0] * 63.75 + 127.5).round().tolist() == [7, 2, 5]


def test_a_batch_has_the_shapes_and_types_it_says():
    batch = next(CPU.batches(corpus(5), 4))
    assert batch.images.shape == (3, 3, 2, 3)
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == batch.rows.dtype == torch.int64
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_the_source_is_left_as_it_was():
    there = dots(6, 2, 3)
    pixels, labels, order = there.images.copy(), there.labels.copy(), np.arange(6)[::-1].copy()
    augment = Augment(shift=2, flip=True)
    for batch in CPU.batches(there, 4, order=order, augment=augment, rng=np.random.default_rng(0)):
        batch.images.zero_()
        batch.labels.fill_(1)
    assert (there.images == pixels).all()
    assert (there.labels == labels).all()
    assert order.tolist() == [5, 4, 3, 2, 1, 0]


# ---------------------------------------------------------------------------------------- pixels


def test_a_pixel_becomes_its_share_of_255_less_a_half_times_four():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels.reshape(1, 16, 16, 1).expand(1, 16, 16, 3))
    assert floats.shape == (1, 3, 16, 16)
    assert floats.dtype == torch.float32
    wanted = (torch.arange(256, dtype=torch.float64) / 255 - 0.5) / 0.25
    assert (floats[0].double() - wanted.reshape(16, 16)).abs().max() < 1e-6
    assert floats.min() == BLACK
    assert floats.max() == WHITE


def test_height_width_and_colour_keep_their_places():
    pixels = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)
    floats = to_float(pixels)
    assert floats.shape == (2, 3, 4, 5)
    assert (floats[1, 2, 3, 1] * 63.75 + 127.5).round() == pixels[1, 3, 1, 2]


@pytest.mark.parametrize("augment", [None, Augment()])
def test_without_augmentation_pixels_stay(augment: Augment | None):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 5, 4, 3), np.uint8)
    there = Corpus(np.zeros(7, np.int64), ("a",), np.arange(7), ("",) * 7, pixels)
    rows, images = seen(CPU.batches(there, 3, order=rng.permutation(7), augment=augment, rng=rng))
    assert (images == to_float(torch.from_numpy(pixels[rows])).numpy()).all()


# ---------------------------------------------------------------------------------- augmentation


def test_a_shift_moves_the_content_by_at_most_so_many_pixels_in_every_direction():
    augment = Augment(shift=2)
    batches = CPU.batches(dots(600, 4, 5), 200, augment=augment, rng=np.random.default_rng(0))
    _, images = seen(batches)
    assert images.shape == (600, 3, 8, 10)
    at, counts = np.unique(places(images), axis=0, return_counts=True)
    there = [[row, column] for row in range(2, 7) for column in range(3, 8)]
    assert at.tolist() == there
    assert counts.min() > 0.4 * 600 / 25


def test_what_is_shifted_out_is_gone_and_black_moves_in():
    augment = Augment(shift=1)
    batches = CPU.batches(dots(300, 0, 0), 300, augment=augment, rng=np.random.default_rng(0))
    _, images = seen(batches)
    assert np.isin(images, (BLACK, WHITE)).all()
    white = (images == WHITE).all(axis=1).sum(axis=(1, 2))
    assert set(white.tolist()) == {0, 1}
    assert 0.36 < white.mean() < 0.53  # 4 of 9 shifts keep the corner


def test_a_flip_mirrors_about_half_of_the_images():
    augment = Augment(flip=True)
    batches = CPU.batches(dots(1000, 2, 1), 250, augment=augment, rng=np.random.default_rng(0))
    at = places(seen(batches)[1])
    assert (at[:, 0] == 2).all()
    assert set(at[:, 1].tolist()) == {1, 8}
    assert 0.45 < (at[:, 1] == 8).mean() < 0.55


def test_a_flip_and_a_shift_do_not_lose_the_image():
    augment = Augment(shift=1, flip=True)
    batches = CPU.batches(dots(400, 3, 1), 100, augment=augment, rng=np.random.default_rng(0))
    at = places(seen(batches)[1])
    assert set(at[:, 0].tolist()) == {2, 3, 4}
    assert set(at[:, 1].tolist()) == {0, 1, 2, 7, 8, 9}


def test_each_image_is_augmented_by_itself():
    augment = Augment(shift=2, flip=True)
    batch = next(CPU.batches(dots(50, 4, 2), 50, augment=augment, rng=np.random.default_rng(0)))
    assert len(np.unique(places(batch.images.numpy()), axis=0)) > 10


def test_the_same_dice_give_the_same_images():
    def once(seed: int) -> NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        augment = Augment(shift=2, flip=True)
        return seen(CPU.batches(dots(20, 4, 4), 8, augment=augment, rng=rng))[1]

    assert (once(3) == once(3)).all()
    assert (once(3) != once(4)).any()


# ------------------------------------------------------------------------------- the other verbs


def test_arrays_and_tensors_share_their_memory():
    array = np.arange(4, dtype=np.float32)
    CPU.tensor(array)[0] = 9
    assert array[0] == 9
    tensor = torch.zeros(3, requires_grad=True)
    CPU.array(tensor)[1] = 5
    assert tensor[1] == 5
    assert CPU.to_numpy(array).tolist() == array.tolist()


def test_a_captured_step_is_the_step():
    given = []

    def step(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        given.append((inputs, labels))
        return inputs.sum()

    run = CPU.captured(step)
    assert [run(torch.ones(2), torch.zeros(2)).item(), run(torch.ones(3), torch.zeros(3))] == [2, 3]
    assert [len(inputs) for inputs, _ in given] == [2, 3]


def test_dbscan_parts_two_chains_and_a_lonely_point():
    line = np.array([0, 1, 2, 3, 10, 11, 12, 30], np.float32)
    points = np.stack([line, np.zeros_like(line)], axis=1)
    found = CPU.dbscan(points, eps=1.5, min_samples=3)
    assert found.dtype == np.int32
    assert found.tolist() == [0, 0, 0, 0, 1, 1, 1, -1]


def test_dbscan_counts_the_point_itself_and_the_rim_of_its_ball():
    points = np.array([[0.0], [1.0], [2.0]], np.float32)
    assert CPU.dbscan(points, eps=1.0, min_samples=3).tolist() == [0, 0, 0]
    assert CPU.dbscan(points, eps=1.0, min_samples=4).tolist() == [-1, -1, -1]
    assert CPU.dbscan(points, eps=0.99, min_samples=2).tolist() == [-1, -1, -1]


def test_a_point_is_its_own_first_neighbour():
    points = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [6.0, 8.0]], np.float32)
    assert CPU.neighbors(points, 1, points).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-5)
    second = CPU.neighbors(points, 2, points)
    assert second.tolist() == pytest.approx([1, 18**0.5, 1, 5], rel=1e-5)


def test_neighbours_are_sought_among_the_points_not_the_queries():
    points = np.array([[0.0], [1.0], [5.0]], np.float32)
    queries = np.array([[0.0], [5.0]], np.float32)
    assert CPU.neighbors(points, 2, queries).tolist() == pytest.approx([1, 4], rel=1e-5)
    assert CPU.neighbors(points, 3, queries).tolist() == pytest.approx([5, 5], rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40))
def test_the_kth_distance_is_the_kth_smallest(seed: int, n: int):
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 1, (n, 3)).astype(np.float32)
    k = int(rng.integers(1, n + 1))
    every = np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=2)
    wanted = np.sort(every, axis=1)[:, k - 1]
    assert CPU.neighbors(points, k, points) == pytest.approx(wanted, abs=1e-3)


def test_the_points_are_left_as_they_were():
    points = np.random.default_rng(0).normal(0, 1, (30, 4)).astype(np.float32)
    before = points.copy()
    CPU.dbscan(points, eps=1.0, min_samples=3)
    CPU.neighbors(points, 3, points)
    assert (points == before).all()
