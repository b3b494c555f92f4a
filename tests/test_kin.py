"""The probe: scikit-learn's regression, and from half of a blob to the whole of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from csc_gpu.backend import open_backend
from csc_gpu.segregate.kin import kin, logistic, unseen
from tests.worlds import world

CPU = open_backend("cpu", 1)


def rows_of(there, number, *, of=None):
    """The first so many rows of a mask (the poison), as a mask."""
    rows = np.flatnonzero(there.poison if of is None else of)[:number]
    return np.isin(np.arange(len(there.labels)), rows)


def asked(there, core, firm=None):
    firm = np.zeros(len(there.labels), bool) if firm is None else firm
    return kin(there.points, there.labels, 0, core, firm, CPU)


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
    found = asked(there, core)
    np.testing.assert_array_equal(found.rows, there.poison)
    assert found.belief.dtype == np.float32
    assert found.belief[there.poison].min() > 0.5 > found.belief[~there.poison].max()
    assert (found.belief[there.labels != 0] == 0).all()  # nobody asked about them


def test_wrong_rows_of_a_core_are_dropped_unless_they_are_firm():
    there = world()
    wrong = rows_of(there, 4, of=(there.labels == 0) & ~there.poison)
    core = rows_of(there, 30) | wrong
    np.testing.assert_array_equal(asked(there, core).rows, there.poison)
    np.testing.assert_array_equal(asked(there, core, firm=core).rows, there.poison | wrong)


def test_a_core_of_too_few_rows_stays_as_it_is():
    there = world()
    core = rows_of(there, 4)
    np.testing.assert_array_equal(asked(there, core).rows, core)
    nobody = np.zeros_like(core)
    assert not asked(there, nobody).rows.any()


def test_the_order_of_the_rows_decides_nothing():
    there = world(seed=2)
    core = rows_of(there, 15) | rows_of(there, 3, of=(there.labels == 0) & ~there.poison)
    order = np.random.default_rng(1).permutation(len(core))
    one, two = asked(there, core), asked(there.take(order), core[order])
    np.testing.assert_array_equal(one.rows[order], two.rows)
    np.testing.assert_array_equal(one.belief[order], two.belief)


def test_of_many_other_rows_an_even_share_is_seen(monkeypatch):
    there, core = world(), rows_of(world(), 20)
    seen = []
    real = unseen
    monkeypatch.setattr("csc_gpu.segregate.kin.OTHERS", 30)
    monkeypatch.setattr(
        "csc_gpu.segregate.kin.unseen", lambda z, found: (seen.append(len(z)), real(z, found))[1]
    )
    np.testing.assert_array_equal(asked(there, core).rows, there.poison)
    assert set(seen) == {int((there.labels == 0).sum()) + 30}
