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
from csc_gpu.segregate import RULES, Settings, capped, looked_at, observe, segregate, voted_core
from csc_gpu.segregate.clusters import diversity, embed, own_order, purity
from csc_gpu.segregate.rules import gather
from csc_gpu.types import Clusters
from tests.worlds import oracle, world

CPU = open_backend("cpu", 1)


def look(there, rule="two-stage", witness=None, **changes):
    chosen = Settings(rule=rule, **changes)
    sighting = observe(there.points, there.labels, 1.0, chosen, CPU)
    return segregate([sighting], there.labels, chosen, CPU, witness)


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


def test_per_label_names_all_but_the_largest_cluster_of_each_label():
    there = clusters_of([[9, 0, 0], [50, 0, 0], [0, 8, 0], [0, 7, 0], [3, 0, 0], [0, 0, 4]])
    named = RULES["per_label"].names(there, Settings(rule="per_label"), np)
    assert named.tolist() == [True, False, False, True, True, False]


def test_per_label_clusters_the_rows_of_each_label_by_themselves():
    """Two labels at one place: together they are one cluster, apart they are two."""
    rng = np.random.default_rng(0)
    points = (rng.normal(0, 0.1, (80, 8)) + 1).astype(np.float32)
    labels = np.arange(80) % 2
    together = observe(points, labels, 1.0, Settings(rule="text"), CPU).clusterings[-1]
    apart = observe(points, labels, 1.0, Settings(rule="per_label"), CPU).clusterings[-1]
    assert together.labels.min(axis=1).max() > 0
    assert together.eps > 0 and np.isnan(apart.eps)  # each label has a radius of its own
    assert (apart.labels.min(axis=1) == 0).all()
    assert apart.labels.max(axis=0).min() > 30
    for clusters in (together, apart):
        inside = clusters.of_row >= 0
        held = np.zeros_like(clusters.labels)
        np.add.at(held, (clusters.of_row[inside], labels[inside]), 1)
        np.testing.assert_array_equal(clusters.labels, held)
        np.testing.assert_array_equal(clusters.size, held.sum(axis=1))


def sighted(there, moments, rule, latest=5):
    """A sighting of the world where it holds; elsewhere the poison lies where its label does."""
    calm = np.where(
        there.poison[:, None], there.points[there.labels == 0].mean(axis=0), there.points
    )
    chosen = Settings(rule=rule, latest=latest)
    scales = looked_at(range(len(moments)), chosen)
    seen = [
        observe(
            there.points if held else calm,
            there.labels,
            epoch,
            chosen,
            CPU,
            scales=scales[epoch],
        )
        for epoch, held in enumerate(moments)
    ]
    return seen, chosen


@pytest.mark.parametrize("rule", ["persistence", "text"])
def test_an_island_in_an_early_snapshot_counts_for_the_papers_rules_alone(rule):
    there = world()
    seen, chosen = sighted(there, [True, False, False], rule, latest=2)
    votes = gather(seen, RULES[rule], chosen, CPU).votes[there.poison]
    assert (votes > 0).mean() == (0.0 if rule == "persistence" else 1.0)
    seen, chosen = sighted(there, [True, False, False], rule, latest=3)
    assert (gather(seen, RULES[rule], chosen, CPU).votes[there.poison] > 0).all()


def test_the_latest_snapshots_count_for_persistence_and_all_of_them_for_the_papers_rules():
    scales, moments = (0.7, 0.1, 0.5), [1, 2, 3]

    def looks(**chosen):
        return looked_at(moments, Settings(scales=scales, coarsest=0.5, **chosen))

    evidence, every = (0.1, 0.5), (0.1, 0.5, 0.7)
    assert looks(latest=2) == {1: (), 2: evidence, 3: every}
    assert looks(latest=2, rule="persistence") == {1: (), 2: evidence, 3: evidence}
    assert looks(latest=5) == {1: evidence, 2: evidence, 3: every}
    for rule in ("text", "algorithm1", "per_label"):
        assert looks(latest=2, rule=rule) == dict.fromkeys(moments, evidence)


def test_a_row_nearer_to_another_labels_mean_is_a_stray_whether_clustered_or_not():
    there = world()
    labels = there.labels.copy()
    moved = np.flatnonzero(labels == 2)[:7]
    labels[moved] = 3
    for scales in (None, (0.5, 0.2), ()):
        seen = observe(there.points, labels, 1.0, Settings(), CPU, scales=scales)
        wanted = sorted(Settings().scales if scales is None else scales)
        assert [clusters.scale for clusters in seen.clusterings] == wanted
        assert set(moved) <= set(np.flatnonzero(seen.stray))
        assert not seen.stray[(labels == 1) | (labels == 2)].any()


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
    if rule in ("two-stage", "persistence"):  # others believe one scale, and name benign rows too
        assert told.suspect[~there.poison].mean() <= 0.02


def test_nothing_is_found_where_nothing_is():
    there = world(poison=0)
    told = look(there, witness=oracle(there))
    assert not told.suspect.any()
    assert told.notes["suspected_labels"] == []


def test_the_check_clears_a_benign_island():
    there = world()
    benign = replace(there, truth=there.labels)  # the island is a true mode of label 0
    told = look(benign, witness=oracle(benign, commands=0.0))
    assert told.notes["suspected_labels"] == [0]
    assert told.notes["cleared_labels"] == [0]
    assert not told.suspect.any()


def test_an_unsure_check_adds_no_single_rows():
    there = world(rows=200)
    sure = look(there, witness=oracle(there))
    unsure = look(there, witness=oracle(there, wrong=0.4))
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
    told = look(world(), witness=oracle(world()))
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
    look(there, witness=oracle(there))
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
        told = segregate([sighting], there.labels, chosen, thin, oracle(there, commands=0.0))
        assert not told.suspect.any()
        assert (told.table["cluster"] == -1).all()


def test_no_snapshot_is_an_error():
    with pytest.raises(CorpusError, match="no snapshot"):
        segregate([], np.zeros(3, np.int64), Settings(), CPU)


@pytest.mark.parametrize(
    ("labels", "dims", "least"),
    [(10, 16, 0.002), (43, 16, 0.002), (100, 20, 0.002), (1000, 64, 0.0002)],
)
def test_many_labels_need_more_components_and_smaller_islands(labels, dims, least):
    suited = Settings().suited(labels)
    assert (suited.pca, suited.min_share) == (dims, pytest.approx(least))
    assert suited.suited(labels) == suited
    told = Settings(pca=5, min_share=0.01).suited(labels)  # what is asked for stands
    assert (told.pca, told.min_share) == (5, 0.01)
    assert Settings(rule="per_label").suited(labels).min_share == 0.002


def test_each_of_many_labels_has_a_cluster_of_its_own():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(250), 60)
    centre = rng.standard_normal((250, 96)).astype(np.float32)
    points = centre[labels] + 0.2 * rng.standard_normal((len(labels), 96), np.float32)
    seen = observe(points, labels, 1.0, Settings(rule="persistence"), CPU, scales=(0.5, 0.9))
    assert seen.min_samples == 12  # a fifth of a label's 60 rows; .002 of all would be 30
    notes = segregate([seen], labels, Settings(rule="persistence"), CPU).notes
    assert (notes["pca"], notes["min_share"]) == (32, pytest.approx(0.2 / 250))
    there = observe(points, labels * 7, 1.0, Settings(rule="persistence"), CPU, scales=(0.5,))
    assert there.min_samples == 12  # labels that nobody has do not count
    assert len(seen.clusterings[-1].size) == 250
    assert purity(seen.clusterings[-1]).min() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "tow-stage"}, "segregate.rule"),
        ({"scales": ()}, "segregate.scales"),
        ({"scales": (0.5, 1.5)}, "segregate.scales"),
        ({"purity": 0.0}, "segregate.purity"),
        ({"max_share": 1.5}, "segregate.max_share"),
        ({"min_rows": 0}, "segregate.min_rows"),
        ({"pca": -2}, "segregate.pca"),
        ({"coarsest": 0.01}, "segregate.coarsest"),
    ],
)
def test_a_setting_out_of_range_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**change)


def test_a_label_without_rows_is_no_fault():
    there = world()
    labels = np.where(there.labels > 1, there.labels + 1, there.labels)  # nobody is labelled 2
    seen = observe(there.points, labels, 1.0, Settings(), CPU)
    told = segregate([seen], labels, Settings(), CPU)
    np.testing.assert_array_equal(seen.stray & (labels != 0), np.zeros(len(labels), bool))
    assert told.suspect[there.poison].mean() >= 0.9
