"""The probe: scikit-learn's regression, and from half of a blob to the whole of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from csc_gpu.backend import open_backend
from csc_gpu.segregate.kin import Probe, coherent, kin, logistic, unseen
from tests.worlds import world

CPU = open_backend("cpu", 1)


def rows_of(there, number, *, of=None):
    """The first so many rows of a mask (the poison), as a mask."""
    rows = np.flatnonzero(there.poison if of is None else of)[:number]
    return np.isin(np.arange(len(there.labels)), rows)


def grown(there, core, most=0.75):
    return kin(there.points, there.labels, 0, core, most, CPU)


def cleaned(there, group):
    return coherent(there.points, there.labels, 0, group, CPU)


def with_constant(points):
    points = torch.from_numpy(points.astype(np.float64))
    return torch.cat([points, torch.ones_like(points[:, :1])], dim=1)


@pytest.mark.parametrize("spread", [0.3, 3.0])  # nearly apart, and far from it
def test_the_regression_is_that_of_scikit_learn(spread):
    rng = np.random.default_rng(0)
    wanted = rng.random(300) < 0.2
    points = rng.normal(0, 1, (300, 6)) + wanted[:, None] / spread
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(points, wanted)
    z = with_constant(points)
    ours = torch.sigmoid(z @ logistic(z, torch.from_numpy(wanted).double()))
    np.testing.assert_allclose(ours, theirs.predict_proba(points)[:, 1], atol=1e-3)


def test_the_constant_is_not_held_small():
    """A thousandth of all rows, and features that say nothing: the constant alone can tell."""
    z = with_constant(np.zeros((2000, 1)))
    wanted = torch.zeros(2000, dtype=torch.float64)
    wanted[:2] = 1
    chance = torch.sigmoid(z @ logistic(z, wanted))
    assert chance.mean() == pytest.approx(1e-3, rel=1e-2)


def test_a_row_does_not_vouch_for_itself():
    """Random features, more than rows: a probe that saw the row would know it by heart."""
    points = np.random.default_rng(0).normal(0, 1, (60, 200))
    positive = np.arange(60) < 20
    z = with_constant(points)
    known = torch.sigmoid(z @ logistic(z, torch.from_numpy(positive).double())).numpy()
    assert (known[positive] > 0.8).all()
    assert unseen(z, positive)[positive].mean() < 0.5


def test_half_of_a_blob_grows_to_all_of_it_and_takes_no_benign_row():
    there = world()
    core = rows_of(there, 20)
    assert core.sum() == 20 < there.poison.sum()
    np.testing.assert_array_equal(grown(there, core), there.poison)


def test_a_core_whose_kin_would_be_most_of_its_label_stays_as_it_is():
    there = world()
    core = rows_of(there, 20)
    ours = (there.labels == 0).sum()
    np.testing.assert_array_equal(grown(there, core, most=39 / ours), core)
    np.testing.assert_array_equal(grown(there, core, most=40 / ours), there.poison)


def test_rows_of_a_mixed_group_that_are_not_like_most_of_it_are_dropped():
    there = world()
    benign = rows_of(there, 12, of=(there.labels == 0) & ~there.poison)
    group = rows_of(there, 30) | benign
    known = cleaned(there, group)
    np.testing.assert_array_equal(known.rows, group & there.poison)  # and nothing is added
    assert known.belief.dtype == np.float32
    assert known.belief[there.poison].min() > known.belief[~there.poison].max()
    assert (known.belief[there.labels != 0] == 0).all()  # nobody asked about them


def test_few_rows_have_kin_though_their_chances_are_small():
    """Twelve rows in a thousand: the probe gives them .2, and that is far above their share."""
    there = world(rows=1000, poison=24)
    there.points[there.poison] = there.points[there.poison] * 0.5 + there.points[:24] * 0.4
    core = rows_of(there, 12)
    assert Probe(there.points, there.labels, there.labels == 0, CPU).chance(core)[core].mean() < 0.3
    found = grown(there, core)
    assert (found & there.poison).sum() >= 20
    assert (found & ~there.poison).sum() <= 2


def test_a_core_of_too_few_rows_stays_as_it_is():
    there = world()
    core = rows_of(there, 4)
    np.testing.assert_array_equal(grown(there, core), core)
    np.testing.assert_array_equal(cleaned(there, core).rows, core)
    nobody = np.zeros_like(core)
    assert not grown(there, nobody).any()
    assert not cleaned(there, nobody).rows.any()


def test_a_mixed_group_is_measured_by_its_likeliest_rows():
    class Told(Probe):
        def __init__(self):
            pass

        def chance(self, positive):
            return np.array([0.9, 0.9, 0.2, 0.2, 0.2, 0.3], np.float32)

    group = np.arange(6) < 5
    assert np.flatnonzero(Told().like(group, 0.3, 0.9)).tolist() == [0, 1]  # more than .45
    assert np.flatnonzero(Told().like(group, 0.3)).tolist() == [0, 1, 5]  # than .24, half the mean


def test_rows_that_have_nothing_in_common_have_no_kin():
    """Every tenth benign row: the probe does not know them again."""
    there = world(poison=0)
    core = rows_of(there, 100, of=there.labels == 0) & (np.arange(len(there.labels)) % 10 == 0)
    assert core.any()
    np.testing.assert_array_equal(grown(there, core), core)


def test_the_order_of_the_rows_decides_nothing():
    there = world(seed=2)
    core = rows_of(there, 15) | rows_of(there, 3, of=(there.labels == 0) & ~there.poison)
    order = np.random.default_rng(1).permutation(len(core))
    one, two = cleaned(there, core), cleaned(there.take(order), core[order])
    np.testing.assert_array_equal(one.rows[order], two.rows)
    np.testing.assert_array_equal(one.belief[order], two.belief)
    np.testing.assert_array_equal(grown(there, core)[order], grown(there.take(order), core[order]))


def test_of_many_other_rows_an_even_share_is_seen(monkeypatch):
    there, core = world(), rows_of(world(), 20)
    seen = []
    real = unseen
    monkeypatch.setattr("csc_gpu.segregate.kin.OTHERS", 30)
    monkeypatch.setattr(
        "csc_gpu.segregate.kin.unseen", lambda z, found: (seen.append(len(z)), real(z, found))[1]
    )
    np.testing.assert_array_equal(grown(there, core), there.poison)
    assert set(seen) == {int((there.labels == 0).sum()) + 30}
