"""The corpus without its poison: as reviewed, in every form, and the source as it was."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from csc_gpu import data, run, sources
from csc_gpu.cli import cli
from csc_gpu.types import Segregation

CLASSES = ("cat", "=dog")
BAD = (1, 4, 13)


def call(*words: object):
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two classes of ten photos to train on and two to test, and a run that suspects three."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 2)):
        for name in CLASSES:
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for row in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{row} ü.png")
    judged(tmp_path / "run", str(tmp_path / "photos"))
    return tmp_path


def judged(folder: Path, source: str) -> None:
    """A run on this source, as far as `clean` reads one."""
    corpus = data.open_source(source, data.Settings()).train
    n = len(corpus)
    suspect = np.isin(np.arange(n), BAD)
    table = {name: np.zeros(n, int) for name in run.COLUMNS}
    folder.mkdir()
    told = Segregation(suspect, suspect.astype(np.float32), table, {})
    run.save_suspects(folder / "suspects.csv", run.names(corpus), told)
    run.write_text(folder / "settings.toml", "")
    about = {"model": "resnet8", "n_classes": 2, "n_outputs": 3, "image_size": [8, 8]}
    about |= {"classes": list(corpus.classes)}
    verdict = {"backend": "cpu", "verdict": "poison suspected", "broken": [], "source": source}
    run.write_json(folder / "summary.json", about | verdict)


def paths(place: Path) -> list[str]:
    return list(run.load_suspects(place / "run" / "suspects.csv").paths)


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """What a folder holds: of each file its hash and date."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def cleaned(place: Path, *how: object):
    before = state(place / "photos")
    done = call("clean", place / "run", place / "photos", place / "out", *how)
    assert state(place / "photos") == before
    return done


@pytest.mark.parametrize("kind", ["manifest", "folder", "shards"])
def test_every_form_opens_again_and_lacks_the_suspects_alone(place, kind):
    done = cleaned(place, "--as", kind)
    assert done.exit_code == 0, done.output
    assert "3 of 20 rows left out" in done.output
    at = place / "out" / "manifest.csv" if kind == "manifest" else place / "out"
    before = sources.load(str(place / "photos"), data.Settings())
    after = sources.load(str(at), data.Settings())
    kept = np.setdiff1d(np.arange(20), BAD)

    def contents(corpus, rows):
        return sorted(corpus.images[row].tobytes() for row in rows)

    assert contents(after.train, range(17)) == contents(before.train, kept)
    assert contents(after.test, range(4)) == contents(before.test, range(4))
    assert after.train.classes == before.train.classes
    recipe = json.loads((place / "out" / "recipe.json").read_text())
    assert recipe["left_out"] == 3 and recipe["as"] == kind and recipe["reviews"] == []
    with (place / "out" / "removed.csv").open(newline="") as file:
        assert [int(line["row"]) for line in csv.DictReader(file)] == list(BAD)


def test_a_cleaned_corpus_can_be_trained_on(place):
    assert cleaned(place, "--as", "folder", "--copy").exit_code == 0
    done = call("train", place / "out", "--out", place / "again", "--cpu", "--threads", 1,
                "--set", "train.epochs=1", "--set", "train.min_steps=1", "--set", "train.batch=8",
                "--defense", "plain", "--no-report")  # fmt: skip
    assert done.exit_code == 0, done.output


def test_a_folder_holds_hard_links_or_copies(place):
    assert cleaned(place, "--as", "folder").exit_code == 0
    original = place / "photos" / "train" / "cat" / "3 ü.png"
    linked = place / "out" / "train" / "cat" / "3 ü.png"
    assert os.path.samefile(original, linked)
    assert cleaned(place, "--as", "folder", "--copy", "--force").exit_code == 0
    assert not os.path.samefile(original, linked)


def test_arrays_become_folders_and_shards_but_no_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    judged(tmp_path / "run", "digits")
    for kind in ("folder", "shards"):
        done = call("clean", tmp_path / "run", "digits", tmp_path / kind, "--as", kind)
        assert done.exit_code == 0, done.output
        after = sources.load(str(tmp_path / kind), data.Settings())
        assert len(after.train) == 1438 - len(BAD)
    done = call("clean", tmp_path / "run", "digits", tmp_path / "m")
    assert done.exit_code == 2 and "--as folder" in done.stderr


def test_lists_of_rows_that_people_reviewed_are_honoured_and_recorded(place):
    names = paths(place)
    (place / "keep.txt").write_text(f"# fine\n{names[4]}\n\n")
    (place / "drop.txt").write_text("7\n")
    lists = ("--keep", place / "keep.txt", "--drop", place / "drop.txt")
    done = cleaned(place, "--as", "folder", *lists)
    assert "3 of 20 rows left out (1 suspects kept, 1 others" in done.output, done.output
    with (place / "out" / "removed.csv").open(newline="") as file:
        told = {int(line["row"]): line["on_the_word_of"] for line in csv.DictReader(file)}
    assert told == {1: "run", 7: "review", 13: "run"}
    recipe = json.loads((place / "out" / "recipe.json").read_text())
    assert [one["role"] for one in recipe["reviews"]] == ["keep", "drop"]
    assert recipe["said"] == {names[4]: "fine", names[7]: "poison"}
    assert (
        recipe["reviews"][0]["sha256"]
        == hashlib.sha256((place / "keep.txt").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    ("text", "words"), [("nobody.png\n", "line 1: 'nobody.png' is neither"), ("20\n", "neither")]
)
def test_a_list_of_strangers_is_refused(place, text, words):
    (place / "keep.txt").write_text(text)
    done = cleaned(place, "--keep", place / "keep.txt")
    assert done.exit_code == 2 and words in done.stderr and not (place / "out").exists()


def test_a_row_in_dispute_is_refused(place):
    (place / "list.txt").write_text("4\n")
    done = cleaned(place, "--keep", place / "list.txt", "--drop", place / "list.txt")
    assert done.exit_code == 2 and "both to be kept and to be dropped" in done.stderr


def test_another_corpus_is_refused(place):
    gone = place / "photos" / "train" / "cat" / "3 ü.png"
    content = gone.read_bytes()
    gone.unlink()
    assert "is not what the run was trained on" in cleaned(place).stderr
    gone.write_bytes(content)
    (place / "photos" / "train" / "cat" / "99.png").write_bytes(content)
    assert "has not seen" in cleaned(place).stderr
    (place / "photos" / "train" / "cat" / "99.png").unlink()
    assert cleaned(place).exit_code == 0


def test_nothing_is_written_into_the_source(place):
    before = state(place / "photos")
    done = call(
        "clean", place / "run", place / "photos", place / "photos" / "new", "--as", "folder"
    )
    assert done.exit_code == 2 and "lies in the source" in done.stderr
    assert state(place / "photos") == before


def test_other_results_are_not_replaced(place):
    done = call("clean", place / "run", place / "photos", place / "run", "--force")
    assert done.exit_code == 2 and (place / "run" / "suspects.csv").exists()
