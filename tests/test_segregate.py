from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_gpu.backend import Settings as BackendSettings
from csc_gpu.backend import open_backend
from csc_gpu.backend.cpu import CpuBackend
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.segregate import (
    RULES,
    Settings,
    capped,
    diversity,
    embed,
    judge,
    observe,
    own_order,
    purity,
    segregate,
    voted_core,
)
from csc_gpu.types import Clusters, Reclassified
from tests.worlds import oracle, world

CPU = open_backend("cpu", 1)


def look(there, rule="two-stage", reclassify=None, **changes):
    chosen = Settings(rule=rule, **changes)
    sighting = observe(there.points, there.labels, 1.0, chosen, CPU)
    return segregate([sighting], there.labels, chosen, CPU, reclassify)


def clusters_of(labels_in_clusters, density=None):
    held = np.array(labels_in_clusters)
    size = held.sum(axis=1)
    density = np.ones(len(held)) if density is None else np.array(density)
    return Clusters(np.zeros(0, np.int32), size, held, density, eps=1.0, scale=0.5)


def test_diversity_is_the_entropy_of_the_labels_in_bits():
    there = clusters_of([[8, 0, 0, 0], [4, 4, 0, 0], [2, 2, 2, 2]])
    np.testing.assert_allclose(diversity(there, np), [0, 1, 2])
    np.testing.assert_allclose(purity(there), [1, 0.5, 0.25])


def test_algorithm1_names_every_cluster_but_the_largest():
    there = clusters_of([[9, 9], [9, 0], [3, 3]])
    assert RULES["algorithm1"].names(there, Settings(), np).tolist() == [False, True, True]


def test_text_wants_a_cluster_pure_and_as_dense_as_the_largest():
    there = clusters_of([[50, 50], [9, 0], [0, 9], [5, 4]], density=[1.0, 1.0, 0.5, 2.0])
    assert RULES["text"].names(there, Settings(), np).tolist() == [False, True, False, False]


def test_persistence_names_a_pure_cluster_away_from_its_labels_home():
    #      label 0 is at home in cluster 0, label 1 in 1; cluster 2 is a second island of label 0
    there = clusters_of([[50, 0], [0, 50], [9, 0], [5, 4]])
    assert RULES["persistence"].names(there, Settings(), np).tolist() == [False, False, True, False]


def test_persistence_names_a_pure_home_where_homes_are_mixtures():
    labels = np.full((2, 10), 10)
    labels[1] = 0
    labels[1, 3] = 50  # label 3 alone has a home of its own: one of ten
    assert RULES["persistence"].names(clusters_of(labels), Settings(), np).tolist() == [False, True]


def test_embed_gives_the_same_distances_when_no_dimension_is_dropped():
    points = world().points
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    for dims in (0, 19):
        z = embed(points, np.arange(len(points)), dims, np)
        assert z.dtype == np.float32
        if dims == 0:
            np.testing.assert_allclose(
                np.linalg.norm(z[3] - z[7]), np.linalg.norm(unit[3] - unit[7]), rtol=1e-4
            )
    assert embed(points, np.arange(len(points)), 16, np).shape == (len(points), 16)


def test_embed_keeps_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    points = np.abs(rng.normal(5, 1, (200, 6))).astype(np.float32)
    z = embed(points, np.arange(len(points)), 2, np)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(unit.T, bias=True))[::-1]
    np.testing.assert_allclose(np.sort(z.var(axis=0))[::-1], values[:2], rtol=1e-3)


def test_a_row_of_zeros_is_no_fault():
    points = world().points
    points[0] = 0
    assert np.isfinite(embed(points, np.arange(len(points)), 16, np)).all()


@pytest.mark.parametrize("rule", list(RULES))
def test_an_island_with_a_label_whose_home_is_elsewhere_is_found(rule):
    there = world()
    told = look(there, rule, oracle(there))
    if rule == "algorithm1":  # flags whole benign classes too, but for the cap on each
        assert len(told.notes["freed_labels"]) == 3
        return
    assert told.suspect[there.poison].mean() >= 0.9
    if rule != "text":  # where classes part, the paper's text names benign ones, too
        assert told.suspect[~there.poison].mean() <= 0.02


def test_nothing_is_found_where_nothing_is():
    there = world(poison=0)
    told = look(there, reclassify=oracle(there))
    assert not told.suspect.any()
    assert told.notes["suspected_labels"] == []


def test_the_check_clears_a_benign_island():
    there = world()
    benign = replace(there, truth=there.labels)  # the island is a true mode of label 0
    told = look(benign, reclassify=oracle(benign))
    assert told.notes["suspected_labels"] == [0]
    assert told.notes["cleared_labels"] == [0]
    assert not told.suspect.any()


def test_an_unsure_check_adds_no_single_rows():
    there = world(rows=200)
    sure = look(there, reclassify=oracle(there))
    unsure = look(there, reclassify=oracle(there, wrong=0.4))
    assert unsure.suspect[~there.poison].mean() <= sure.suspect[~there.poison].mean() + 0.005
    assert unsure.suspect[there.poison].mean() >= 0.9


def test_without_a_model_two_stage_says_that_only_stage_one_ran():
    told = look(world())
    assert told.notes["verified"] is False
    assert told.suspect.any()


@pytest.mark.parametrize("rule", list(RULES))
def test_shuffling_the_rows_shuffles_the_verdict(rule):
    there = world(seed=3)
    order = np.random.default_rng(1).permutation(len(there.labels))
    shuffled = replace(
        there,
        points=there.points[order],
        labels=there.labels[order],
        truth=there.truth[order],
        poison=there.poison[order],
    )
    one, two = look(there, rule), look(shuffled, rule)
    assert one.suspect.any()
    np.testing.assert_array_equal(one.suspect[order], two.suspect)
    np.testing.assert_array_equal(one.score[order], two.score)
    for column, values in one.table.items():
        np.testing.assert_array_equal(values[order], two.table[column])


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_own_order_does_not_depend_on_the_order_of_the_rows(seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 3, (40, 3)).astype(np.float32)  # many equal rows
    labels = rng.integers(0, 2, 40)
    order = rng.permutation(40)
    one = own_order(points, labels, np)
    two = own_order(points[order], labels[order], np)
    np.testing.assert_array_equal(points[one], points[order][two])
    np.testing.assert_array_equal(labels[one], labels[order][two])


def test_scores_are_fractions_and_suspects_score_half_or_more():
    told = look(world(), reclassify=oracle(world()))
    assert told.score.dtype == np.float32
    assert ((told.score >= 0) & (told.score <= 1)).all()
    assert (told.score[told.suspect] >= 0.5).all()
    assert (told.score[~told.suspect] < 0.5).all()


def test_the_cap_keeps_the_highest_scores_and_frees_ties():
    suspect = np.array([True, True, True, True, False])
    belief = np.array([0.9, 0.5, 0.5, 0.8, 1.0], np.float32)
    labels = np.arange(5)
    kept, over = capped(suspect, belief, labels, Settings(max_share=0.6, max_label_share=1.0))
    assert over
    assert kept.tolist() == [True, False, False, True, False]
    kept, over = capped(suspect, belief, labels, Settings(max_share=0.8, max_label_share=1.0))
    assert not over
    assert kept.tolist() == suspect.tolist()


def test_the_cap_holds_for_each_label():
    suspect = np.array([True, True, True, True, False, False])
    belief = np.array([0.9, 0.5, 0.8, 0.7, 0, 0], np.float32)
    labels = np.array([0, 0, 0, 0, 1, 1])
    kept, over = capped(suspect, belief, labels, Settings(max_share=1.0, max_label_share=0.5))
    assert over
    assert kept.tolist() == [True, False, True, False, False, False]


def test_a_label_is_never_taken_whole():
    labels = np.repeat([0, 1, 2], 10)
    votes = np.array([3] * 5 + [1] * 5 + [2] * 10 + [1] * 4 + [0] * 6)
    core, freed = voted_core(votes, labels, Settings(max_label_share=0.75))
    assert core.tolist() == [True] * 5 + [False] * 15 + [True] * 4 + [False] * 6
    assert freed == [1]


def test_the_inputs_are_left_as_they_were():
    there = world()
    points, labels = there.points.copy(), there.labels.copy()
    look(there, reclassify=oracle(there))
    np.testing.assert_array_equal(points, there.points)
    np.testing.assert_array_equal(labels, there.labels)


def test_rows_too_thinly_spread_for_any_cluster_are_no_poison():
    class AllNoise(CpuBackend):
        def dbscan(self, points, *, eps, min_samples):
            return np.full(len(points), -1, np.int32)

    there, thin = world(), AllNoise(1, BackendSettings())
    for rule in RULES:
        chosen = Settings(rule=rule)
        sighting = observe(there.points, there.labels, 1.0, chosen, thin)
        told = segregate([sighting], there.labels, chosen, thin, oracle(there))
        assert not told.suspect.any()
        assert (told.table["cluster"] == -1).all()


def test_no_snapshot_is_an_error():
    with pytest.raises(CorpusError, match="no snapshot"):
        segregate([], np.zeros(3, np.int64), Settings(), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "tow-stage"}, "segregate.rule"),
        ({"scales": ()}, "segregate.scales"),
        ({"scales": (0.5, 1.5)}, "segregate.scales"),
        ({"purity": 0.0}, "segregate.purity"),
        ({"max_share": 1.5}, "segregate.max_share"),
        ({"min_rows": 0}, "segregate.min_rows"),
        ({"pca": -1}, "segregate.pca"),
        ({"coarsest": 0.01}, "segregate.coarsest"),
    ],
)
def test_a_setting_out_of_range_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**change)


def check_of(labels, differs, controls):
    predicted = np.where(differs, labels + 1, labels)
    return Reclassified(np.zeros(len(labels), bool), controls, predicted)


def test_rows_the_model_trained_on_are_not_added_because_it_errs_now_and_then():
    labels = np.zeros(400, np.int64)
    core = np.arange(400) < 100
    controls = np.arange(400) >= 300
    differs = core | (np.arange(400) % 10 == 0)  # all of the core, a tenth of everything else
    verdict = judge(0, labels, core, core, check_of(labels, differs, controls), Settings())
    assert not verdict.is_clear
    np.testing.assert_array_equal(verdict.poison, core)


def test_a_reliable_model_adds_candidates_that_differ_and_frees_core_rows_that_do_not():
    labels = np.zeros(400, np.int64)
    row = np.arange(400)
    core, rest, controls = row < 100, (row >= 100) & (row < 200), row >= 300
    differs = (row < 90) | ((row >= 100) & (row < 150))
    verdict = judge(0, labels, core, core | rest, check_of(labels, differs, controls), Settings())
    np.testing.assert_array_equal(verdict.poison, differs)


def test_a_model_wrong_on_every_third_control_keeps_a_core_whole_and_adds_nothing():
    labels = np.zeros(400, np.int64)
    row = np.arange(400)
    core, rest, controls = row < 100, (row >= 100) & (row < 200), row >= 300
    differs = (row < 98) | rest | (controls & (row % 3 == 0))
    verdict = judge(0, labels, core, core | rest, check_of(labels, differs, controls), Settings())
    np.testing.assert_array_equal(verdict.poison, core)


def test_an_unsure_model_that_mostly_confirms_a_core_keeps_it_whole():
    labels = np.zeros(400, np.int64)
    row = np.arange(400)
    differs = (row < 96) | ((row >= 300) & (row % 6 != 0))  # wrong on five of six controls
    check = check_of(labels, differs, row >= 300)
    verdict = judge(0, labels, row < 100, row < 100, check, Settings())
    assert not verdict.is_clear
    np.testing.assert_array_equal(verdict.poison, row < 100)


def test_a_core_that_keeps_its_label_is_clear():
    labels = np.zeros(400, np.int64)
    row = np.arange(400)
    check = check_of(labels, row < 20, row >= 300)
    verdict = judge(0, labels, row < 100, row < 100, check, Settings())
    assert verdict.is_clear
