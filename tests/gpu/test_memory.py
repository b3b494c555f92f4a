"""Too little memory is borne, or told."""

from __future__ import annotations

import numpy as np
import pytest

from csc_gpu.errors import DeviceTooSmall

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def blobs(rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(0, 1, (rows, 8)) + 9 * (np.arange(rows) % 4)[:, None]).astype(np.float32)


def test_clustering_that_runs_out_of_memory_is_tried_with_smaller_batches(open_gpu, monkeypatch):
    """40,000 rows at once take 1.6 GB, 1 GB is allowed: told otherwise, the first try fails."""
    gpu = open_gpu(memory=1.0)
    points = gpu.xp.asarray(blobs(40_000))
    told = gpu.to_numpy(gpu.dbscan(points, eps=2.0, min_samples=10))
    tried = []
    cluster = gpu._driver.dbscan

    def note(points, eps, min_samples, space):
        tried.append(space.batch)
        return cluster(points, eps, min_samples, space)

    monkeypatch.setattr(gpu._driver, "dbscan", note)
    monkeypatch.setattr(gpu._driver, "free_bytes", lambda: 100 * 10**9)
    again = gpu.to_numpy(gpu.dbscan(points, eps=2.0, min_samples=10))
    assert tried[0] == 40_000
    assert len(tried) > 1
    assert tried == sorted(tried, reverse=True)
    assert told.max() >= 3
    np.testing.assert_array_equal(told == -1, again == -1)


def test_a_gpu_that_is_too_small_is_told_in_one_line(open_gpu):
    gpu = open_gpu(memory=0.25)  # less than is never handed out
    points = gpu.xp.asarray(blobs(1000))
    with pytest.raises(DeviceTooSmall, match="clustering 1000 rows") as told:
        gpu.dbscan(points, eps=2.0, min_samples=10)
    assert "\n" not in str(told.value)
    assert str(told.value).endswith("or pass --cpu")


def test_what_is_free_shrinks_by_what_is_taken(gpu):
    before = gpu.free_bytes()
    taken = gpu.xp.zeros(500_000_000, gpu.xp.uint8)
    after = gpu.free_bytes()
    assert before - after >= 0.9 * taken.nbytes
    del taken
    assert gpu.free_bytes() >= after


def test_no_limit_is_exceeded(open_gpu):
    gpu = open_gpu(memory=1.0)
    assert gpu.free_bytes() <= 10**9
    with pytest.raises(MemoryError):
        gpu.xp.zeros(2 * 10**9, gpu.xp.uint8)
