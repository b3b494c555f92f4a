"""What the page draws of a run: the poison lies apart, on either machine, and little comes down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from csc_gpu.backend import open_backend
from csc_gpu.evaluate import curves
from csc_gpu.features import fitted
from csc_gpu.models import new_model
from csc_gpu.segregate import Settings, drawing, observe, of_sighting, to_sighting
from csc_gpu.segregate.drawing import OTHERS, SUSPECTS, drawn
from tests.fake_gpu import FakeDriver, fake_gpu
from tests.test_evaluate import rows_key
from tests.worlds import world

CPU = open_backend("cpu", 1)
PERSISTENCE = Settings(rule="persistence")


def look(there, backend=CPU, settings=PERSISTENCE):
    return observe(backend.xp.asarray(there.points), there.labels, 1.0, settings, backend)


def test_poison_is_drawn_apart_and_in_a_cluster_of_its_own():
    there = world()
    seen = look(there)
    told = drawing([seen], there.poison, PERSISTENCE, CPU)
    assert told.rows.tolist() == list(range(len(there.labels)))
    cluster = told.cluster[0]
    (island,) = set(cluster[there.poison]) - {-1}
    assert (cluster[~there.poison] != island).all()
    assert told.plane.shape == (1, len(there.labels), 2) and told.plane.dtype == np.float16


def test_the_curve_gives_the_radii():
    seen = look(world())
    at = np.linspace(0, 1, len(seen.reach))
    for clusters in seen.clusterings:
        assert clusters.eps == pytest.approx(np.interp(clusters.scale, at, seen.reach), rel=1e-4)


def test_rows_are_drawn_by_their_own_number():
    there = world()
    order = np.random.default_rng(1).permutation(len(there.labels))
    here, shuffled = look(there).plane, look(there.take(order)).plane
    np.testing.assert_allclose(np.abs(here[order]), np.abs(shuffled), atol=1e-2)  # signs are free


@pytest.mark.parametrize("pca", [0, 1, 2])
def test_there_are_two_dimensions_whatever_clusters_were_sought_in(pca):
    there = world()
    seen = look(there, settings=replace(PERSISTENCE, pca=pca))
    usual = look(there).plane
    np.testing.assert_allclose(np.abs(seen.plane), np.abs(usual), atol=1e-2)


def test_features_of_one_dimension_lie_on_a_line():
    there = world()
    thin = replace(there, points=there.points[:, :1])
    assert (look(thin).plane[:, 1] == 0).all()


def test_many_rows_are_drawn_as_a_sample_that_holds_suspects():
    suspect = np.arange(20_000) < 2_000
    rows = drawn(suspect)
    assert (np.diff(rows) > 0).all()
    assert suspect[rows].sum() == SUSPECTS and (~suspect[rows]).sum() == OTHERS


def test_a_snapshot_that_was_not_clustered_is_not_drawn():
    there = world()
    seen = observe(there.points, there.labels, 1.0, PERSISTENCE, CPU, scales=())
    assert drawing([seen], there.poison, PERSISTENCE, CPU) is None


def test_what_is_drawn_survives_a_checkpoint():
    seen = look(world())
    back = to_sighting(of_sighting(seen, None, CPU), CPU)
    assert (back.plane == seen.plane).all() and (back.reach == seen.reach).all()


def test_both_machines_draw_the_same_and_little_comes_down():
    there, driver = world(rows=400), FakeDriver()
    gpu = fake_gpu(driver)
    here = drawing([look(there)], there.poison, PERSISTENCE, CPU)
    seen = look(there, gpu)
    with driver.traffic.during("drawing"):
        fake = drawing([seen], there.poison, PERSISTENCE, gpu)
    np.testing.assert_array_equal(here.cluster, fake.cluster)
    np.testing.assert_allclose(np.abs(here.plane), np.abs(fake.plane), atol=1e-2)
    n = len(here.rows)
    assert sum(driver.traffic.sizes(down=True, label="drawing")) <= 8 * n + 2048


def test_accuracy_counts_the_rows_whose_label_the_head_gives():
    model = new_model("resnet8", 4, 32, seed=0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[:, :4] = torch.eye(4)
    points = np.zeros((8, model.n_features), np.float32)
    points[np.arange(8), np.arange(8) % 4] = 1
    labels = np.arange(8) % 4
    assert fitted(model, points, labels, CPU) == 1
    assert fitted(model, points, np.where(np.arange(8) < 2, 3, labels), CPU) == 0.75


def test_curves_of_four_rows_are_known_by_hand():
    key = rows_key([1, 0, 1, 0])
    told = curves(np.array([0.9, 0.8, 0.7, 0.1]), key)
    assert told["fpr"] == [0, 0, 0.5, 0.5, 1] and told["tpr"] == [0, 0.5, 0.5, 1, 1]
    assert told["precision"][0] == 0.5 and told["recall"][0] == 1 and told["precision"][-1] == 1
    assert curves(np.ones(2), rows_key([0, 0])) is None


def test_long_curves_are_thinned_and_keep_their_ends():
    rng = np.random.default_rng(0)
    poison = rng.random(5000) < 0.3
    told = curves(rng.random(5000), rows_key(poison))
    assert all(len(line) <= 200 for line in told.values())
    assert (told["fpr"][0], told["fpr"][-1], told["tpr"][-1]) == (0, 1, 1)
