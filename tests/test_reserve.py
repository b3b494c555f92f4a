"""Clean images for the defenses that need some: how they are read; nobody is scored on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from csc_gpu import answers, sources
from csc_gpu.cli import cli
from csc_gpu.errors import CorpusError
from tests.test_defenses import clean

QUICK = ("train.epochs=1", "train.min_steps=1", "train.batch=32", "strip.overlays=2")


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def arrays(path, train, test, more=0):
    rows = {"x_train": train.images, "y_train": train.labels + more}
    np.savez(path, **rows, x_test=test.images, y_test=test.labels + more)
    return path


def test_all_images_of_a_source_are_clean_ones_by_the_corpus_own_labels(tmp_path):
    corpus = clean(0, 100)
    path = arrays(tmp_path / "r.npz", clean(100, 120), clean(120, 130))
    found = sources.reserve(str(path), corpus)
    assert len(found) == 30 and found.classes == corpus.classes
    wanted = np.concatenate([clean(100, 120).labels, clean(120, 130).labels])
    np.testing.assert_array_equal(found.labels, wanted)


def test_clean_images_of_a_class_that_is_not_there_are_refused(tmp_path):
    path = arrays(tmp_path / "r.npz", clean(100, 120), clean(120, 130), more=1)
    with pytest.raises(CorpusError, match="'4'"):
        sources.reserve(str(path), clean(0, 100))


def test_a_key_without_some_held_out_images_keeps_the_rest_in_step(tmp_path):
    path = arrays(tmp_path / "c.npz", clean(0, 100), clean(100, 140))
    call("poison", path, tmp_path / "p", "--attack", "badnets", "--rate", 0.1)
    key = answers.load_key(tmp_path / "p" / "key.npz")
    gone = answers.is_among(key.test, {answers.digest(image) for image in key.test[:7]})
    assert gone[:7].all()
    rest = answers.without_test(key, gone)
    kept = np.flatnonzero(~gone)
    np.testing.assert_array_equal(rest.test, key.test[kept])
    np.testing.assert_array_equal(rest.test_labels, key.test_labels[kept])
    np.testing.assert_array_equal(rest.triggered, key.triggered[kept])  # all are under attack
    assert (rest.is_poison == key.is_poison).all()


def test_a_run_is_not_scored_on_its_clean_images(tmp_path):
    path = arrays(tmp_path / "c.npz", clean(0, 160), clean(160, 240))
    spare = arrays(tmp_path / "r.npz", clean(160, 190), clean(190, 200))  # half of the test part
    assert call("poison", path, tmp_path / "p", "--attack", "badnets", "--rate", 0.1).exit_code == 0
    sets = [word for change in QUICK for word in ("--set", change)]
    words = ["train", tmp_path / "p", "--cpu", "--threads", 1, "--defense", "strip", *sets]
    refused = call(*words, "--out", tmp_path / "none")
    assert refused.exit_code == 2 and "--reserve" in refused.stderr
    done = call(*words, "--out", tmp_path / "run", "--reserve", spare)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["reserve_rows"] == 40
    done = call("score", tmp_path / "run", "--key", tmp_path / "p" / "key.npz", "--cpu")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run" / "score.json").read_text())
    assert told["test_left_out"] == 40
    assert told["after"]["counts"]["acc"][1] == told["before"]["counts"]["acc"][1] == 40


def test_clean_images_for_a_defense_that_has_no_use_for_them_are_refused(tmp_path):
    done = call("train", "digits", "--out", tmp_path / "r", "--cpu", "--reserve", "digits")
    assert done.exit_code == 2 and "leave --reserve out" in done.stderr
