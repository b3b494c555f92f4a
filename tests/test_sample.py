"""Clustering a sample that the other rows join: the same as all where it is all, islands found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from csc_gpu.backend import open_backend
from csc_gpu.errors import ConfigError
from csc_gpu.segregate import RULES, Settings, observe, segregate, to_sighting
from csc_gpu.segregate.records import of_sighting
from csc_gpu.segregate.sample import Joined, nearest
from csc_gpu.segregate.settings import ALL_PAIRS
from tests.fake_gpu import fake_gpu
from tests.worlds import oracle, world

CPU = open_backend("cpu", 1)
THERE = world(rows=400, poison=120)


def look(there, backend=CPU, witness=None, **changes):
    chosen = Settings(**changes)
    points = backend.xp.asarray(there.points)
    seen = observe(points, there.labels, 1.0, chosen, backend)
    return seen, segregate([seen], there.labels, chosen, backend, witness)


@pytest.mark.parametrize("rule", ["persistence", "per_label"])
@pytest.mark.parametrize("sample", [len(THERE.labels), 10**6])
def test_a_sample_of_all_rows_is_all_rows(rule, sample):
    whole, told = look(THERE, rule=rule, mode="all")
    some, said = look(THERE, rule=rule, mode="sample", sample=sample)
    assert some.sampled == said.notes["sampled"] == 0
    for one, two in zip(whole.clusterings, some.clusterings, strict=True):
        assert one.eps == two.eps or rule == "per_label"
        for name in ("of_row", "size", "labels", "density"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_array_equal(told.suspect, said.suspect)
    np.testing.assert_array_equal(told.score, said.score)


def test_a_sample_finds_the_island_and_its_clusters_are_of_all_rows():
    seen, told = look(THERE, rule="persistence", mode="sample", sample=400)
    assert seen.sampled == told.notes["sampled"] == 400
    assert seen.min_samples == 8
    assert told.suspect[THERE.poison].mean() >= 0.9
    assert told.suspect[~THERE.poison].mean() <= 0.02
    assert (
        told.table["cluster_size"][THERE.poison] >= 100
    ).mean() > 0.9  # of 120; 28 in the sample
    for clusters in seen.clusterings:
        inside = clusters.of_row >= 0
        held = np.zeros_like(clusters.labels)
        np.add.at(held, (clusters.of_row[inside], THERE.labels[inside]), 1)
        np.testing.assert_array_equal(clusters.labels, held)
        np.testing.assert_array_equal(clusters.size, held.sum(axis=1))


def test_each_label_is_sampled_by_itself_where_it_is_clustered_by_itself():
    seen, told = look(THERE, rule="per_label", mode="sample", sample=200)
    assert seen.sampled == 4 * 200
    assert told.suspect[THERE.poison].mean() >= 0.9


def test_the_witnesses_are_heard_about_all_rows():
    _, told = look(THERE, witness=oracle(THERE), mode="sample", sample=400)
    assert told.notes["suspected_labels"] == [0]
    np.testing.assert_array_equal(told.suspect, THERE.poison)


@pytest.mark.parametrize("rule", ["persistence", "per_label"])
def test_shuffling_the_rows_shuffles_the_verdict_on_a_sample(rule):
    there = replace(THERE, points=THERE.points.copy())
    there.points[:300] = there.points[300:600]  # equal rows, some of them in the sample
    there.labels[:300] = there.labels[300:600]
    order = np.random.default_rng(1).permutation(len(there.labels))
    how = {"rule": rule, "mode": "sample", "sample": 300}
    (one, told), (two, said) = look(there, **how), look(there.take(order), **how)
    assert told.suspect.any()
    np.testing.assert_array_equal(told.suspect[order], said.suspect)
    np.testing.assert_array_equal(told.score[order], said.score)
    for here, shuffled in zip(one.clusterings, two.clusterings, strict=True):
        np.testing.assert_array_equal(here.of_row[order], shuffled.of_row)


@pytest.mark.parametrize("rule", ["two-stage", "per_label"])
def test_the_sample_of_a_gpu_is_that_of_the_processor(rule):
    how = {"rule": rule, "mode": "sample", "sample": 400}
    here, told = look(THERE, **how)
    there, said = look(THERE, fake_gpu(), **how)
    np.testing.assert_array_equal(told.suspect, said.suspect)
    for one, two in zip(here.clusterings, there.clusterings, strict=True):
        np.testing.assert_array_equal(one.of_row, two.of_row.get())


def test_a_row_joins_its_nearest_core_row_within_the_radius():
    #                core 0    core 1  no core, too far for its k-distance
    z = np.array([[0.0], [10.0], [4.0], [1.0], [8.5], [5.5]], np.float32)
    joined = Joined(z, np.array([0, 1, 2]), np.array([0.5, 1.0, 9.0]), np)
    assert joined.clusters(np.array([0, -1, 0]), 0.5).tolist() == [0, -1, -1, -1, -1, -1]
    assert joined.clusters(np.array([0, 1, 0]), 2.0).tolist() == [0, 1, -1, 0, 1, -1]
    assert joined.clusters(np.array([0, 1, 2]), 9.0).tolist() == [0, 1, 2, 0, 1, 2]


def test_the_nearest_point_is_that_of_brute_force(monkeypatch):
    monkeypatch.setattr("csc_gpu.segregate.sample.AT_A_TIME", 1000)  # several blocks
    rng = np.random.default_rng(0)
    rows, points = (rng.normal(0, 1, (n, 5)).astype(np.float32) for n in (130, 40))
    every = np.linalg.norm(rows[:, None] - points, axis=2)
    found = list(nearest(rows, points, np))
    assert len(found) > 2
    np.testing.assert_array_equal(np.concatenate([row for *_, row in found]), every.argmin(axis=1))
    np.testing.assert_allclose(np.concatenate([d for _, d, _ in found]), every.min(axis=1), 1e-5)
    assert list(nearest(rows, points[:0], np)) == []


def test_auto_samples_above_its_limit_alone():
    auto, some, every = (Settings(mode=mode, sample=1000) for mode in ("auto", "sample", "all"))
    assert auto.seen(ALL_PAIRS) == ALL_PAIRS
    assert auto.seen(ALL_PAIRS + 1) == some.seen(5000) == 1000
    assert every.seen(10**7) == 10**7
    assert some.seen(10) == 10


def test_a_sighting_of_a_sample_is_put_down_and_found_again():
    seen, _ = look(THERE, rule="persistence", mode="sample", sample=400)
    assert to_sighting(of_sighting(seen, None, CPU), CPU).sampled == 400


@pytest.mark.parametrize(
    ("change", "name"), [({"mode": "some"}, "mode"), ({"sample": 0}, "sample")]
)
def test_a_sample_that_is_none_is_refused(change, name):
    with pytest.raises(ConfigError, match=f"segregate.{name} must be") as fault:
        Settings(**change)
    assert "\n" not in str(fault.value)


def test_every_rule_knows_samples():
    for rule in RULES:
        assert look(THERE, rule=rule, mode="sample", sample=300)[0].sampled > 0
