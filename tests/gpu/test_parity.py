"""The GPU says what the CPU says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

from csc_gpu.backend import open_backend
from csc_gpu.components import independent
from csc_gpu.conceal import Settings as Concealment
from csc_gpu.conceal import conceal
from csc_gpu.features import features, predict
from csc_gpu.models import new_model
from csc_gpu.segregate import RULES, Settings, observe, segregate
from tests.test_gpu_backend import digits
from tests.worlds import oracle, world

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
CPU = open_backend("cpu", 1)


def off_every_distance(points: np.ndarray, near: float) -> float:
    """The middle of the widest gap between two distances, close to `near`."""
    exact = points.astype(np.float64)
    apart = np.linalg.norm(exact[:, None] - exact[None], axis=2).ravel()
    close = np.unique(apart[(apart > 0.95 * near) & (apart < 1.05 * near)])
    widest = np.diff(close).argmax()
    return float(close[widest : widest + 2].mean())


def overlapping(rows: int = 900) -> np.ndarray:
    """Three blobs that nearly touch: core rows, border rows and noise."""
    rng = np.random.default_rng(4)
    return (rng.normal(0, 1, (rows, 4)) + 4 * (np.arange(rows) % 3)[:, None]).astype(np.float32)


@pytest.mark.parametrize("near", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("min_samples", [5, 12])
def test_core_rows_and_noise_agree_and_a_border_row_touches_its_cluster(gpu, near, min_samples):
    points = overlapping()
    eps = off_every_distance(points, near)
    model = DBSCAN(eps=eps, min_samples=min_samples).fit(points)
    ours = gpu.to_numpy(gpu.dbscan(gpu.xp.asarray(points), eps=eps, min_samples=min_samples))
    assert ours.dtype == np.int32
    core = np.zeros(len(points), bool)
    core[model.core_sample_indices_] = True
    assert core.any() and (model.labels_ == -1).any() and ((model.labels_ >= 0) & ~core).any()
    np.testing.assert_array_equal(ours == -1, model.labels_ == -1)
    pairs = set(zip(model.labels_[core].tolist(), ours[core].tolist(), strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({two for _, two in pairs})
    for row in np.flatnonzero((ours >= 0) & ~core):
        near_row = np.linalg.norm(points - points[row], axis=1) <= eps
        assert (near_row & core & (ours == ours[row])).any()


def test_k_means_parts_rows_as_scikit_learn_does(gpu):
    points = overlapping()
    ours = gpu.to_numpy(gpu.kmeans(gpu.xp.asarray(points), 3, seed=0, tries=20))
    theirs = CPU.kmeans(points, 3, seed=0, tries=20)
    assert ours.dtype == np.int32
    assert adjusted_rand_score(theirs, ours) > 0.99


def test_independent_components_agree(gpu):
    rng = np.random.default_rng(0)
    mixed = rng.laplace(size=(600, 4)) @ rng.normal(size=(4, 8))
    mixed = mixed.astype(np.float32)
    ours = gpu.to_numpy(independent(gpu.xp.asarray(mixed), 4, gpu.xp, seed=3))
    theirs = independent(mixed, 4, np, seed=3)
    alike = abs(np.corrcoef(ours.T, theirs.T)[:4, 4:])
    assert alike.max(axis=1).min() > 0.999


def test_distances_to_the_kth_neighbour_agree(gpu):
    points = overlapping()
    rows = gpu.xp.asarray(points)
    found = gpu.to_numpy(gpu.neighbors(rows, 20, rows[:500]))
    np.testing.assert_allclose(found, CPU.neighbors(points, 20, points[:500]), rtol=1e-5)


def test_a_dense_cluster_at_the_length_of_embedded_rows_keeps_its_radii(gpu):
    """|x|^2 + |y|^2 - 2xy blurs below 1e-3 of the length; islands are wider than that."""
    rng = np.random.default_rng(0)
    points = (0.25 + 1e-2 * rng.normal(size=(500, 16))).astype(np.float32)
    rows = gpu.xp.asarray(points)
    found = gpu.to_numpy(gpu.neighbors(rows, 10, rows))
    exact = points.astype(np.float64)
    apart = np.sort(np.linalg.norm(exact[:, None] - exact[None], axis=2), axis=1)[:, 9]
    np.testing.assert_allclose(found, apart, rtol=1e-2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rule", list(RULES))
def test_the_suspects_are_the_same(gpu, rule, seed):
    there, settings = world(seed), Settings(rule=rule)
    told = {}
    for backend in (CPU, gpu):
        points = backend.xp.asarray(there.points)
        seen = observe(points, there.labels, 1.0, settings, backend)
        witness = oracle(there, xp=backend.xp)
        told[backend.name] = segregate([seen], there.labels, settings, backend, witness)
    np.testing.assert_array_equal(told["cpu"].suspect, told["gpu"].suspect)
    assert told["cpu"].table.keys() == told["gpu"].table.keys()


def test_features_and_predictions_agree(gpu):
    corpus, _ = digits()
    model = new_model("resnet8", 4, 8, seed=0)
    here = features(model, corpus, CPU)
    said = predict(model, corpus, CPU)
    model.to(gpu.device)
    there = features(model, corpus, gpu)
    assert there.flags.c_contiguous and there.dtype == np.float32
    apart = np.abs(gpu.to_numpy(there) - here).max()
    assert apart <= 1e-3 * np.abs(here).max()
    assert (gpu.to_numpy(predict(model, corpus, gpu)) == said).mean() >= 0.99


def test_concealment_agrees(gpu):
    corpus, poison = digits()
    model = new_model("resnet8", 4, 8, seed=0)
    plan = Concealment(epochs=3, batch=32, replay=5)
    here = conceal(model, corpus, poison, plan, CPU, seed=1).head
    there = conceal(model.to(gpu.device), corpus, poison, plan, gpu, seed=1).head
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-2, atol=1e-3)
