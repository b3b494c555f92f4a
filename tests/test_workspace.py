"""How cuML's memory is planned: cuML's own arithmetic, as `dbscan.cuh` of 26.10 has it."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_gpu.backend.workspace import LARGEST_INT32, Workspace, needed, with_less, workspace
from csc_gpu.errors import DeviceTooSmall

H200 = 139 * 2**30
"""Bytes."""
IMAGENET = 1_281_167
"""Rows."""


def batch_in_cuml(n: int, mbytes: int, index: int) -> int:
    """Rows of a batch, as cuML computes them."""
    per_row = n * 1 + (n + 2) * index
    fixed = n * (index + 1)
    batch = min(n, (mbytes * 1_000_000 - fixed) // per_row)
    return min(batch, LARGEST_INT32 // n) if index == 4 else batch


def cumls_own_budget(n: int, d: int) -> int:
    """What cuML plans with if nobody tells it: 80 % of all memory less the data. MB"""
    return int(0.8 * H200 - 4 * n * d) // 1_000_000


@pytest.mark.parametrize(
    ("n", "d", "dtype", "rows", "batches", "passes"),
    [
        (50_000, 512, "int32", 42_949, 2, 1.14),
        (50_000, 512, "int64", 50_000, 1, 1.00),
        (100_000, 512, "int32", 21_474, 5, 1.79),
        (100_000, 512, "int64", 100_000, 1, 1.00),
        (200_000, 512, "int32", 10_737, 19, 1.95),
        (200_000, 512, "int64", 66_104, 4, 1.67),
        (IMAGENET, 512, "int32", 1_676, 765, 2.00),
        (IMAGENET, 512, "int64", 10_126, 127, 1.99),
        (IMAGENET, 2048, "int64", 9_443, 136, 1.99),
    ],
)
def test_the_table_of_batches_on_an_h200(n, d, dtype, rows, batches, passes):
    space = Workspace(n, cumls_own_budget(n, d), dtype)
    assert space.batch == pytest.approx(rows, abs=1)  # the table was made without whole MB
    assert -(-n // space.batch) == batches
    assert space.passes == pytest.approx(passes, abs=0.006)


@pytest.mark.parametrize(
    ("n", "d", "room", "dtype"),
    [
        (40_000, 16, H200, "int32"),  # all rows at once either way: the smaller indices
        (46_340, 16, H200, "int32"),
        (46_342, 16, H200, "int64"),  # the largest square of int32 is 46,340
        (50_000, 16, H200, "int64"),
        (50_000, 16, 8 * 10**9, "int32"),  # little memory: smaller indices, larger batches
        (IMAGENET, 16, H200, "int64"),
        (IMAGENET, 16, 8 * 10**9, "int32"),
        (IMAGENET, 2048, 8 * 10**9, "int64"),  # n * d does not fit into int32, so cuML takes int64
        (1_000_000, 2147, 20 * 10**9, "int32"),
        (1_000_000, 2148, 20 * 10**9, "int64"),
    ],
)
def test_indices_are_those_that_allow_larger_batches(n, d, room, dtype):
    space = workspace(n, d, room)
    assert space.dtype == dtype
    if n * d <= LARGEST_INT32:
        budget = int(0.8 * room) // 1_000_000
        assert space.batch == max(batch_in_cuml(n, budget, 4), batch_in_cuml(n, budget, 8))


sizes = st.integers(2, 3_000_000)
megabytes = st.integers(1, 200_000)
dtypes = st.sampled_from(["int32", "int64"])


@given(n=sizes, mbytes=megabytes, dtype=dtypes)
@settings(max_examples=300, deadline=None)
def test_a_batch_fits_and_one_more_row_would_not(n, mbytes, dtype):
    space = Workspace(n, mbytes, dtype)
    index = {"int32": 4, "int64": 8}[dtype]
    assert space.batch == max(0, batch_in_cuml(n, mbytes, index))
    if space.batch:
        assert needed(n, space.batch, dtype) <= mbytes
        assert 1 <= space.passes < 2
    largest = n if dtype == "int64" else min(n, LARGEST_INT32 // n)
    assert space.batch <= largest
    if space.batch < largest:
        assert needed(n, space.batch + 1, dtype) > mbytes


@given(n=sizes, rows=st.integers(1, 3_000_000), dtype=dtypes)
@settings(max_examples=200, deadline=None)
def test_what_is_needed_is_enough(n, rows, dtype):
    rows = min(n, rows)
    batch = Workspace(n, needed(n, rows, dtype), dtype).batch
    assert batch >= (rows if dtype == "int64" else min(rows, LARGEST_INT32 // n))


@given(n=sizes, d=st.integers(1, 4096), room=st.integers(0, 200 * 10**9))
@settings(max_examples=300, deadline=None)
def test_no_more_is_taken_than_a_share_of_the_room(n, d, room):
    try:
        space = workspace(n, d, room)
    except DeviceTooSmall as told:
        numbers = [int(word) for word in str(told).split() if word.isdigit()]
        assert numbers[0] == n
        assert numbers[1] > numbers[2]  # MB: what it takes, what there is
        return
    assert space.batch >= 1
    assert space.mbytes * 1_000_000 <= 0.8 * room
    assert space.mbytes == needed(n, space.batch, space.dtype)
    if n * d > LARGEST_INT32:
        assert space.dtype == "int64"


def test_no_room_is_told_in_one_line_that_says_what_would_help():
    with pytest.raises(DeviceTooSmall) as told:
        workspace(IMAGENET, 16, 10_000_000)
    assert str(told.value) == (
        "clustering 1281167 rows needs 17 MB of GPU memory at least, and 10 MB are left beside the "
        "rest; end other programs on this GPU, raise gpu.memory, or pass --cpu"
    )


class Full(MemoryError):
    """The device has no memory left."""


@given(n=sizes, room=st.integers(10**8, 200 * 10**9), fits=st.integers(0, 200_000) | st.just(0))
@settings(max_examples=200, deadline=None)
def test_less_is_asked_for_each_time_until_it_fits(n, room, fits):
    """The device holds `fits` MB: less than that was promised, perhaps nothing at all."""
    asked: list[Workspace] = []

    def run(space: Workspace) -> str:
        asked.append(space)
        if space.mbytes > fits:
            raise Full
        return "done"

    space = workspace(n, 8, room)
    if fits >= space.mbytes // 4 > needed(n, 2, space.dtype):
        assert with_less(run, space) == "done"
    elif fits == 0:
        with pytest.raises(DeviceTooSmall):
            with_less(run, space)
        assert asked[-1].batch <= 1 or asked[-1].mbytes - 1 < needed(n, 1, asked[-1].dtype)
    else:
        with suppress(DeviceTooSmall):
            with_less(run, space)
    assert len(asked) <= 40
    for before, after in pairwise(asked):
        assert after.mbytes < before.mbytes
        assert 1 <= after.batch <= before.batch
        assert (after.n, after.dtype) == (before.n, before.dtype)


def test_batches_are_halved():
    asked: list[int] = []

    def run(space: Workspace) -> None:
        asked.append(space.batch)
        if len(asked) < 4:
            raise Full

    with_less(run, workspace(50_000, 16, H200))
    assert asked[0] == 50_000
    for before, after in pairwise(asked):
        assert after == pytest.approx(before / 2, rel=0.01)


def test_another_fault_is_not_tried_again():
    asked: list[Workspace] = []

    def run(space: Workspace) -> None:
        asked.append(space)
        raise KeyError("ours")

    with pytest.raises(KeyError):
        with_less(run, workspace(1000, 8, H200))
    assert len(asked) == 1
