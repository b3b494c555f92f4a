"""Spectral Signatures, SCAn, SPECTRE and STRIP: what only they can get wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from csc_gpu.backend import open_backend
from csc_gpu.config import override
from csc_gpu.defenses import scan, spectral, spectre, strip
from csc_gpu.defenses.outlying import deviations
from csc_gpu.models import new_model
from tests.fake_gpu import fake_gpu
from tests.test_defenses import clean
from tests.worlds import world

CPU = open_backend("cpu", 1)


def told_rate(name, module, there, **changes):
    known = {f"{name}.rate": float(there.poison.mean())}
    return override(module.Settings(), known | {f"{name}.{k}": v for k, v in changes.items()})


# ------------------------------------------------------------------------------------- spectral


def test_outlyingness_is_the_squared_projection_on_the_top_singular_vector():
    points = np.random.default_rng(0).normal(size=(50, 6)) * [3, 1, 1, 1, 1, 1] + 2
    centred = points - points.mean(axis=0)
    top = np.linalg.svd(centred)[2][0]
    np.testing.assert_allclose(spectral.outlyingness(points, np), (centred @ top) ** 2)
    loose = spectral.outlyingness(points, np, centred=False)
    np.testing.assert_allclose(loose, (points @ top) ** 2)


@pytest.mark.parametrize(
    ("changes", "removed"),
    [
        ({}, [60, 50, 50, 50]),  # 1.5 x 40 of each class, at most half of it: 70, 50, ...
        ({"unit": "class"}, [19, 13, 13, 13]),  # 1.5 x 1/11 of 140 and of 100
        ({"most": 0.1}, [14, 10, 10, 10]),
        ({"multiplier": 1.0}, [40, 40, 40, 40]),
    ],
)
def test_as_many_rows_of_a_class_go_as_the_rate_and_its_unit_say(changes, removed):
    there = world(3)
    told = spectral.judge(
        there.points, there.labels, told_rate("spectral", spectral, there, **changes), CPU
    )
    assert np.bincount(there.labels[told.suspect]).tolist() == removed


# ----------------------------------------------------------------------------------------- scan


def test_deviations_from_the_median_are_known_by_hand():
    """Median 2, deviations 1, 0, 1, 8, 0: their median is 1."""
    index = deviations(np.array([1.0, 2.0, 3.0, 10.0, 2.0]))
    np.testing.assert_allclose(index, np.array([-1, 0, 1, 8, 0]) / 1.4826)


def test_where_most_values_are_equal_the_mean_deviation_stands_in():
    """Median 2, deviations 0, 0, 0, 8: their median is 0, their mean 2."""
    index = deviations(np.array([2.0, 2.0, 2.0, 10.0]))
    np.testing.assert_allclose(index, np.array([0, 0, 0, 4]) / 1.2533)
    assert deviations(np.full(3, 0.1)).tolist() == [0, 0, 0]


def test_covariances_of_means_and_rows_are_recovered():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 40)
    means = rng.normal(size=(60, 3)) * [5, 2, 1]
    points = means[labels] + rng.normal(size=(len(labels), 3)) * [1, 0.5, 2]
    of_means, within = scan.covariances(points, labels, scan.Analysis(), CPU)
    np.testing.assert_allclose(within, np.diag([1, 0.25, 4]), atol=0.3)
    np.testing.assert_allclose(of_means, means.T @ means / 60, rtol=0.1, atol=0.3)


def test_a_class_of_few_rows_does_not_spread_the_means_by_its_own_noise():
    """Means of 2 or 400 rows: by their plain means S_u would be 1 + (1/2 + 1/400) / 2 and more."""
    rng = np.random.default_rng(5)
    counts = np.tile([2, 400], 150)
    labels = np.repeat(np.arange(300), counts)
    hidden = rng.normal(size=(300, 1))
    points = hidden[labels] + 2 * rng.normal(size=(len(labels), 1))
    means = np.array([points[labels == label].mean(axis=0) for label in range(300)])
    of_means, within = scan.covariances(points, labels, scan.Analysis(), CPU)
    # A fixed point of the E step and the M step, written out here for one feature.
    keep = of_means / (of_means + within / counts[:, None])
    again = ((keep * means) ** 2).mean()
    assert of_means.item() == pytest.approx(again, rel=1e-4)
    assert within.item() == pytest.approx(4, rel=0.02)
    assert of_means.item() < 0.6 * (means**2).mean()


def test_one_group_is_measured_from_where_its_mean_is_expected():
    """Rows -1 and 3 at S_u = S_e = 1: the mean is 1, of two rows shrunk to 2/3."""
    one = np.eye(1)
    points = np.array([[-1.0], [3.0]])
    second, gain, _ = scan._two_groups(points, one, one, one, scan.Analysis(), CPU, 0)
    assert second.sum() == 1
    assert gain == pytest.approx(((1 + 2 / 3) ** 2 + (3 - 2 / 3) ** 2) / 2)


def test_a_mean_of_few_rows_is_drawn_to_zero_and_one_of_many_is_kept():
    one = np.eye(2)
    few = scan.shrunk(np.array([4.0, 0.0]), 1, one, one, np)
    many = scan.shrunk(np.array([4.0, 0.0]), 999, one, one, np)
    np.testing.assert_allclose(few, [2, 0])
    np.testing.assert_allclose(many, [3.996, 0])


def test_covariances_come_from_the_clean_rows_alone():
    """Poison that is in the corpus and not among the clean rows is what SCAn is to find."""
    there, known = world(3), world(4, poison=0)
    told = scan.analysed(
        there.points, there.labels, known.points, known.labels, scan.Settings(), CPU, 0
    )
    np.testing.assert_array_equal(told.suspect, there.poison)
    assert max(told.notes["anomaly_index"], key=told.notes["anomaly_index"].get) == 0
    none = scan.analysed(
        known.points, known.labels, there.points[~there.poison], there.labels[~there.poison],
        scan.Settings(), CPU, 0,
    )  # fmt: skip
    assert not none.suspect.any()
    order = np.random.default_rng(1).permutation(len(there.labels))
    shuffled = scan.analysed(
        there.points[order], there.labels[order], known.points, known.labels,
        scan.Settings(), CPU, 0,
    )  # fmt: skip
    np.testing.assert_array_equal(shuffled.suspect, told.suspect[order])


# -------------------------------------------------------------------------------------- spectre


def test_only_the_label_that_scores_highest_loses_rows():
    there = world(3)
    told = spectre.judge(there.points, there.labels, told_rate("spectre", spectre, there), CPU)
    assert set(there.labels[told.suspect]) == {0}
    assert told.suspect.sum() == 60  # 1.5 x 40
    assert told.suspect[there.poison].all()
    each = told_rate("spectre", spectre, there, classes="all")
    told = spectre.judge(there.points, there.labels, each, CPU)
    assert set(there.labels[told.suspect]) == {0, 1, 2, 3}


def test_whitening_is_not_moved_by_the_rows_left_out():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 3)) * [1, 4, 9]
    points[:40] = [0, 60, 0]  # a tenth, far away
    white = spectre.whitened(points, 0.15, 10, np)
    assert np.linalg.norm(white[:40], axis=1).min() > 8
    np.testing.assert_allclose(np.cov(white[40:].T), np.eye(3), atol=0.35)
    np.testing.assert_allclose(white[40:].mean(axis=0), 0, atol=0.2)


def test_que_scores_are_squares_where_all_directions_are_alike_and_peaked_where_one_is_not():
    rng = np.random.default_rng(0)
    white = np.linalg.qr(rng.normal(size=(200, 4)))[0] * 200**0.5  # covariance exactly 1
    scores = spectre.que(white, 4.0, np)
    np.testing.assert_allclose(scores, (white**2).mean(axis=1), rtol=1e-3)
    white[:, 0] *= 5
    sharp = spectre.que(white, 50.0, np)
    np.testing.assert_allclose(sharp, white[:, 0] ** 2, rtol=1e-6)


def judged(module, points, labels, known, backend):
    """SCAn is given clean rows; the others have a judgement without."""
    points, clean_points = (backend.xp.asarray(rows) for rows in (points, known.points))
    if module is scan:
        how = clean_points, known.labels, scan.Settings(), backend, 0
        return scan.analysed(points, labels, *how)
    return module.judge(points, labels, module.Settings(), backend)


@pytest.mark.parametrize("module", [spectral, scan, spectre])
def test_the_gpu_says_what_the_cpu_says(module):
    there, known = world(3), world(4, poison=0)
    here = judged(module, there.points, there.labels, known, CPU)
    told = judged(module, there.points, there.labels, known, fake_gpu())
    np.testing.assert_array_equal(here.suspect, told.suspect)
    np.testing.assert_allclose(here.score, told.score, atol=1e-6)


# ---------------------------------------------------------------------------------------- strip


class Stubborn(torch.nn.Module):
    """Certain of class 0 where the first pixel is white, of nothing elsewhere."""

    n_outputs = 4

    def forward(self, images):
        certain = images[:, 0, 0, 0] > 1.5
        return torch.where(certain[:, None], torch.tensor([50.0, 0, 0, 0]), torch.zeros(4))


def test_entropy_is_low_where_a_trigger_outshines_what_is_laid_over():
    corpus = clean(0, 40)
    corpus.images[:, 0, 0] = 0
    corpus.images[:10, 0, 0] = 255  # (255 / 255 - .5) / .25 = 2, and clean rows have -2 there
    known = clean(300, 320)
    known.images[:, 0, 0] = 127  # about 0
    chosen = strip.Superposition(overlays=3)
    entropy = strip.entropies(Stubborn(), corpus, known, chosen, CPU, seed=0)
    np.testing.assert_allclose(entropy[:10], 0, atol=1e-6)
    np.testing.assert_allclose(entropy[10:], 2, rtol=1e-6)  # log2 of four classes


def test_about_a_tenth_of_clean_rows_is_flagged_by_design():
    model = new_model("resnet8", 4, 8, seed=0)
    chosen = strip.Superposition(overlays=8)
    known, rest = clean(0, 150), clean(150, 400)
    limit = np.quantile(strip.entropies(model, known, known, chosen, CPU, seed=0), 0.1)
    flagged = strip.entropies(model, rest, known, chosen, CPU, seed=1) < limit
    assert 0.02 < flagged.mean() < 0.25
