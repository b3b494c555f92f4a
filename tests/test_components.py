"""Principal and independent components against scikit-learn's, on both machines."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import adjusted_rand_score

from csc_gpu.backend import open_backend
from csc_gpu.components import axes, independent, principal
from tests.fake_gpu import fake_gpu
from tests.worlds import world

CPU = open_backend("cpu", 1)


def matched(one, other):
    """The least absolute correlation of a component with its best partner."""
    k = one.shape[1]
    found = abs(np.corrcoef(one.T, other.T)[:k, k:])
    return found.max(axis=1).min()


def sources(n=600, seed=0):
    """Four sources that are not normal, mixed into eight features."""
    rng = np.random.default_rng(seed)
    drawn = [rng.uniform(-1, 1, n), rng.laplace(size=n), rng.exponential(size=n)]
    hidden = np.stack([*drawn, np.sign(rng.normal(size=n))], axis=1)
    return hidden, (hidden @ rng.normal(size=(4, 8))).astype(np.float32)


def test_principal_components_are_those_of_scikit_learn():
    points = world(1).points.astype(np.float64)
    ours, variance = principal(points, 6, np)
    theirs = PCA(6, svd_solver="full")
    np.testing.assert_allclose(abs(ours), abs(theirs.fit_transform(points)), atol=2e-4)
    n = len(points)
    np.testing.assert_allclose(variance, theirs.explained_variance_ * (n - 1) / n, rtol=1e-4)


def test_no_more_components_are_given_than_rows_vary_in():
    flat = np.zeros((30, 5), np.float32)
    flat[:, 0] = np.arange(30)
    assert principal(flat, 4, np)[0].shape == (30, 1)
    assert axes(flat, 4, np)[1].shape == (5, 1)
    assert independent(flat, 4, np, seed=0).shape == (30, 1)
    assert np.isfinite(independent(np.ones((9, 3), np.float32), 2, np, seed=0)).all()


def test_independent_components_are_the_sources_and_those_of_scikit_learn():
    hidden, mixed = sources()
    ours = independent(mixed, 4, np, seed=0)
    np.testing.assert_allclose(ours.std(axis=0), 1, rtol=1e-3)
    assert matched(hidden, ours) > 0.98
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = FastICA(4, whiten="unit-variance", random_state=0).fit_transform(mixed)
    assert matched(theirs, ours) > 0.999


def test_both_machines_find_the_same_components():
    _, mixed = sources()
    gpu = fake_gpu()
    there = independent(gpu.xp.asarray(mixed), 4, gpu.xp, seed=3)
    np.testing.assert_allclose(gpu.to_numpy(there), independent(mixed, 4, np, seed=3), atol=1e-6)


@pytest.mark.parametrize("backend", [CPU, fake_gpu()], ids=["cpu", "gpu"])
def test_k_means_parts_two_blobs_on_both_machines(backend):
    rng = np.random.default_rng(0)
    points = rng.normal(0, 0.3, (50, 3)).astype(np.float32)
    points[:20] += 5
    placed = backend.xp.asarray(points)
    told = backend.to_numpy(backend.kmeans(placed, 2, seed=0, tries=3))
    assert told.dtype == np.int32
    assert len(set(told[:20])) == len(set(told[20:])) == 1
    assert told[0] != told[-1]


@pytest.mark.parametrize("backend", [CPU, fake_gpu()], ids=["cpu", "gpu"])
def test_k_means_of_overlapping_parts_is_scikit_learns_and_the_least_of_many(backend):
    rng = np.random.default_rng(1)
    points = rng.normal(0, 1, (200, 4)).astype(np.float32)
    points[:60] += 2
    points[60:90] -= 1.5
    ours = backend.to_numpy(backend.kmeans(backend.xp.asarray(points), 3, seed=0, tries=20))
    theirs = KMeans(3, n_init=20, random_state=7).fit(points)
    assert adjusted_rand_score(theirs.labels_, ours) == 1
    within = sum(((points[ours == k] - points[ours == k].mean(0)) ** 2).sum() for k in set(ours))
    assert within == pytest.approx(theirs.inertia_, rel=1e-4)


def test_k_means_of_equal_rows_is_one_part():
    assert set(CPU.kmeans(np.ones((9, 2), np.float32), 2, seed=0, tries=2).tolist()) == {0}
