"""Activation Clustering is not about images: a backdoor in a classifier of docstrings is found."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import text
from csc_gpu import run
from csc_gpu.cli import cli


def command(group, *words):
    done = CliRunner().invoke(group, [str(word) for word in words])
    return done


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    done = command(text.main, out, "--most", 400)
    assert done.exit_code == 0, done.output
    return out


def test_the_features_hold_no_truth_and_texts_do_not_name_their_package(written):
    assert set(np.load(written / "features.npz")) == {"features", "labels", "classes"}
    assert not any("numpy" in words for words in text.docstrings("numpy", 50))
    assert text.docstrings("numpy", 50) == text.docstrings("numpy", 50)


def test_planted_texts_are_found_by_the_command(written):
    words = ["segregate", "--defense", "ac", written / "features.npz", "--cpu", "--threads", 1]
    done = command(cli, *words, "--out", written / "verdict")
    assert done.exit_code == 0, done.output
    truth = np.load(written / "truth.npz")
    planted, success = truth["planted"], truth["success"]
    assert success > 0.5  # else there is no backdoor to find
    told = run.load_suspects(written / "verdict" / "suspects.csv").suspect
    assert told[planted].mean() > 0.8
    assert told[~planted].mean() < 0.08


def test_a_defense_that_needs_images_says_who_does_not(written):
    words = ["segregate", "--defense", "strip", written / "features.npz", "--cpu"]
    done = command(cli, *words, "--out", written / "none")
    assert done.exit_code == 2
    assert "ac" in done.stderr and "images" not in done.stdout
