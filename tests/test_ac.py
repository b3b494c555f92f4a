"""Activation Clustering: how labels are split, the three ways to decide, and the repair."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from csc_gpu.backend import open_backend
from csc_gpu.config import override
from csc_gpu.defenses import ac
from csc_gpu.errors import ConfigError
from csc_gpu.types import DefenderView
from tests.fake_gpu import fake_gpu
from tests.test_gpu_backend import digits
from tests.worlds import world

CPU = open_backend("cpu", 1)


def settings_of(**changes):
    few = {"ac.dims": 3, "ac.decide": "exclusion"} | {
        f"ac.{name}": value for name, value in changes.items()
    }
    return override(ac.Settings(), few)


@pytest.mark.parametrize("reduce", ["ica", "pca"])
@pytest.mark.parametrize("decide", ["exclusion", "size", "silhouette"])
def test_an_island_is_found_whatever_decides(decide, reduce):
    there = world(3)
    told = ac.judge(there.points, there.labels, settings_of(decide=decide, reduce=reduce), CPU)
    assert told.suspect[there.poison].mean() > 0.95
    if decide != "silhouette":
        assert told.suspect[~there.poison].mean() < 0.02
    assert told.notes["decide"] == decide


def test_without_images_size_decides_unless_another_way_is_asked_for():
    there = world(3)
    for asked_for, used in (("auto", "size"), ("silhouette", "silhouette")):
        told = ac.judge(there.points, there.labels, settings_of(decide=asked_for), CPU)
        assert told.notes["decide"] == used


def test_every_label_has_two_parts_that_hold_its_rows_once():
    there = world(3)
    parts = ac.split(there.points, there.labels, settings_of(), CPU, 0)
    assert [part.label for part in parts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [part.is_smaller for part in parts] == [False, True] * 4
    rows = np.concatenate([part.rows for part in parts])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(there.labels)))
    assert all((there.labels[part.rows] == part.label).all() for part in parts)
    island = parts[1]
    assert set(island.rows) == set(np.flatnonzero(there.poison))
    assert island.share == pytest.approx(40 / 140)
    assert (island.near > 0.5).all()


@pytest.mark.parametrize(("reduce", "found"), [("ica", 1.0), ("pca", 0.5)])
def test_the_parts_are_those_of_the_components_that_were_asked_for(reduce, found):
    """What is rare in one small direction stands out among independent components alone."""
    rng = np.random.default_rng(0)
    wide = rng.uniform(-30, 30, size=(200, 2))
    rare = (np.arange(200) < 30) + 0.02 * rng.normal(size=200)
    points = np.column_stack([wide, rare]).astype(np.float32)
    chosen = override(settings_of(reduce=reduce), {"ac.dims": 3, "ac.tries": 10})
    parts = ac.split(points, np.zeros(200, np.int64), chosen, CPU, 0)
    (small,) = [part for part in parts if part.is_smaller]
    share = (small.rows < 30).mean()
    assert share == 1 if found == 1 else share < found


def test_a_label_of_few_rows_or_of_equal_rows_is_not_split():
    labels = np.array([0] * 10 + [1] * 40)
    points = np.zeros((50, 4), np.float32)
    assert ac.split(points, labels, settings_of(), CPU, 0) == []
    told = ac.judge(points, labels, settings_of(), CPU)
    assert not told.suspect.any()


def test_silhouette_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 3)).astype(np.float32)
    second = rng.random(60) < 0.3
    points[second] += 2
    wanted = silhouette_score(points, second)
    assert ac.silhouette(points, second, np) == pytest.approx(wanted, abs=1e-5)
    alone = np.arange(60) == 5  # a row that is a part by itself counts 0
    assert ac.silhouette(points, alone, np) == pytest.approx(
        silhouette_score(points, alone), abs=1e-5
    )


def asked(there, predicted, **changes):
    """The verdict where the excluding net says this, and what was left out each time."""
    left_out = []

    def without(rows):
        left_out.append(rows)
        return predicted

    told = ac.decided(there.points, there.labels, settings_of(**changes), CPU, 0, without)
    return told, left_out


def test_a_part_that_keeps_its_label_is_clean_and_one_that_loses_it_poison():
    there = world(3)
    told, _ = asked(there, there.truth)
    np.testing.assert_array_equal(told.suspect, there.poison)
    told, _ = asked(there, there.labels)
    assert not told.suspect.any()


def test_the_ratio_is_of_the_own_label_to_the_most_frequent_other():
    """Of 40 rows 18 keep their label, 12 go to class 1 and 10 to class 2: l / p is 1.5."""
    there, rows = world(3), np.flatnonzero(world(3).poison)
    predicted = there.labels.copy()
    predicted[rows[:12]], predicted[rows[12:22]] = 1, 2
    told, _ = asked(there, predicted, ratio=1.49)
    assert not told.suspect.any() and [0, 40, 18, 12] in told.notes["label, rows, l, p"]
    np.testing.assert_array_equal(asked(there, predicted, ratio=1.51)[0].suspect, there.poison)


def test_exclusion_leaves_out_the_smaller_parts_at_once_or_each_part_by_itself():
    there = world(3)
    told, left_out = asked(there, there.labels)
    assert len(left_out) == 1 == told.notes["exclusions"]
    assert (left_out[0] >= there.poison).all()
    assert 0.2 < left_out[0].mean() < 0.5
    told, left_out = asked(there, there.labels, exclude="each")
    assert len(left_out) == 8 == told.notes["exclusions"]
    assert (np.sum(left_out, axis=0) == 1).all()
    _, left_out = asked(there, there.labels, decide="size")
    assert left_out == []


def test_poison_is_traced_to_what_each_row_is_or_to_what_most_of_its_part_are():
    there = world(3)
    told, _ = asked(there, there.truth)
    np.testing.assert_array_equal(told.table["source"][there.poison], there.truth[there.poison])
    told, _ = asked(there, there.truth, source="cluster")
    most = np.bincount(there.truth[there.poison]).argmax()
    assert set(told.table["source"][there.poison]) == {most}


def test_the_gpu_says_what_the_cpu_says():
    there, gpu = world(3), fake_gpu()
    how = settings_of(decide="silhouette", silhouette=0.3)
    here = ac.judge(there.points, there.labels, how, CPU)
    told = ac.judge(gpu.xp.asarray(there.points), there.labels, how, gpu)
    np.testing.assert_array_equal(here.suspect, told.suspect)


@pytest.mark.parametrize(("repair", "stage"), [("relabel", "repair"), ("remove", "retrain")])
def test_the_repair_is_to_relabel_and_go_on_or_to_train_anew(repair, stage):
    corpus, _ = digits()
    quick = {"train.model": "resnet8", "train.epochs": 4, "train.min_steps": 0, "train.batch": 32}
    how = override(settings_of(repair=repair, repair_epochs=1, decide="size", reduce="pca"), quick)
    outcome = ac.defend(DefenderView(corpus), how, CPU, seed=1)
    assert outcome.segregation.suspect.any()
    assert stage in outcome.seconds
    assert outcome.model is not outcome.undefended
    assert ("exclude" in outcome.seconds) == (repair == "relabel")  # sources are asked for


def test_a_setting_that_is_none_is_refused_by_name():
    for name, value in (("decide", "guess"), ("ratio", 0.0), ("dims", 0), ("size", 1.5)):
        with pytest.raises(ConfigError, match=f"ac.{name}"):
            settings_of(**{name: value})
