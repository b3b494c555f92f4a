"""Activation Clustering and Spectral Signatures against ART's, on the same features.

ART's verdicts were recorded by tests/art_verdicts.py; the file names the versions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from csc_gpu.backend import open_backend
from csc_gpu.config import override
from csc_gpu.defenses import ac, spectral

CPU = open_backend("cpu", 1)


@pytest.fixture(scope="module")
def art():
    return dict(np.load(Path(__file__).parent / "art_verdicts.npz"))


def test_the_record_names_its_versions(art):
    assert str(art["versions"]).startswith("adversarial-robustness-toolbox 1.20.1")


def test_relative_size_flags_the_rows_that_art_flags(art):
    how = override(ac.Settings(), {"ac.decide": "size", "ac.reduce": "pca", "ac.size": 0.35})
    told = ac.judge(art["features"], art["labels"], how, CPU, seed=0)
    np.testing.assert_array_equal(told.suspect, art["ac_relative_size"])
    assert told.suspect[art["stamped"]].all()


def test_the_smaller_parts_are_those_of_art(art):
    """ART's usual analysis flags the smaller part of every class, clean or not."""
    how = override(ac.Settings(), {"ac.decide": "size", "ac.reduce": "pca"})
    smaller = np.zeros(len(art["labels"]), bool)
    for part in ac.split(art["features"], art["labels"], how, CPU, 0):
        smaller[part.rows] = part.is_smaller
    np.testing.assert_array_equal(smaller, art["ac_smaller"])


def test_signatures_flag_the_rows_that_art_flags(art):
    """ART projects features that are not centred, and takes its rate of each class."""
    changes = {"spectral.centred": False, "spectral.unit": "class"}
    changes |= {"spectral.rate": float(art["rate_in_class"])}
    told = spectral.judge(
        art["features"], art["labels"], override(spectral.Settings(), changes), CPU
    )
    differ = told.suspect != art["spectral"]
    # ART removes what lies above a quantile, we a whole number of rows: one row of each class
    for label in np.unique(art["labels"]):
        assert differ[art["labels"] == label].sum() <= 1
    assert abs(int(told.suspect.sum()) - int(art["spectral"].sum())) <= 4
