"""Broken images found while all are read for the first time: left out, listed, and not too many."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file

from csc_gpu.backend import Augment, loader
from csc_gpu.backend.cpu import CpuBackend
from csc_gpu.checkpoint import Folder, Record
from csc_gpu.cli import cli
from csc_gpu.errors import CorpusError
from csc_gpu.tolerance import Tolerance
from tests.test_stream import at_rest, both, installed, on_disk, streamed  # noqa: F401

SETS = ("train.epochs=2", "train.min_steps=1", "train.batch=9", "checkpoint.minutes=1e-9")
WORDS = ("--cpu", "--threads", "1", *(word for change in SETS for word in ("--set", change)))


class Told:
    """What a log was told."""

    def __init__(self) -> None:
        self.images: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        assert event == "broken" and fields["reason"]
        self.images.append(fields["image"])


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "bmp":  # which DALI would decode
        Image.new("RGB", (10, 8)).save(path, "BMP")


# --- a pass ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("files", [1, 100])
def test_a_pass_is_as_it_was_but_for_the_broken(tmp_path: Path, files: int, monkeypatch):
    """Rows 2 and 9 lie in one batch, or are read ahead of each other; 0 and 23 are the ends."""
    told = Told()
    corpus = replace(on_disk(tmp_path, 24), file_bytes=1000)
    monkeypatch.setattr(loader, "DECODED_BYTES", 1000 * files)
    how = {"order": np.random.default_rng(3).permutation(24), "augment": Augment(2, True)}
    wanted = list(at_rest(corpus, 5, **how))
    for row, kind in {0: "half", 2: "half", 9: "missing", 14: "bmp", 23: "half"}.items():
        spoil(corpus.files[row], kind)
    corpus = replace(corpus, tolerance=Tolerance(5, told))
    for _ in range(2):  # the second pass knows
        for got, whole in zip(streamed(corpus, 5, **how), wanted, strict=True):
            kept = [row not in (0, 2, 9, 14, 23) for row in whole.rows.tolist()]
            assert got.rows.tolist() == whole.rows[kept].tolist()
            assert got.labels.tolist() == whole.labels[kept].tolist()
            assert (got.images == whole.images[kept]).all()
        assert sorted(told.images) == sorted(f"{row}.png" for row in (0, 2, 9, 14, 23))
    assert corpus.tolerance is not None and corpus.tolerance.broken[9] == ("9.png", "missing")
    sound = corpus.sound()
    assert sound.ids.tolist() == [r for r in range(24) if r not in (0, 2, 9, 14, 23)]
    assert sound.sound() is sound and len(list(streamed(sound, 5))) == 4


@both
def test_one_too_many_is_one_line(tmp_path: Path):
    corpus = on_disk(tmp_path, 12)
    for row in (3, 5, 7):
        spoil(corpus.files[row], "half")
    said = r"3\.png \(truncated PNG\), 5.*, 7.* do not decode: more than --max-bad 2 allows; "
    with pytest.raises(CorpusError, match=said):
        list(streamed(replace(corpus, tolerance=Tolerance(2, Told())), 4))


@both
def test_what_breaks_later_is_an_error(tmp_path: Path):
    corpus = replace(on_disk(tmp_path, 12), tolerance=Tolerance(9, Told()))
    list(streamed(corpus, 4))
    corpus.tolerance.settle({})
    spoil(corpus.files[3], "half")
    with pytest.raises(CorpusError, match=r"cannot decode .*3\.png: truncated PNG"):
        list(streamed(corpus, 4))


@both
def test_a_batch_of_nothing_is_one_line_and_no_endless_search(tmp_path: Path):
    corpus = replace(on_disk(tmp_path, 8), tolerance=Tolerance(9, Told()))
    for row in range(4):
        spoil(corpus.files[row], "half")
    with pytest.raises(CorpusError, match=r"of a batch of 4 images 0 decode; .*0\.png"):
        list(streamed(corpus, 4))


@both
def test_a_file_named_twice_is_broken_twice(tmp_path: Path):
    corpus = on_disk(tmp_path, 8)
    spoil(corpus.files[1], "missing")
    twice = corpus.take(np.array([0, 1, 2, 3, 1, 4, 5, 6]))
    twice = replace(twice, ids=np.arange(8), tolerance=Tolerance(2, Told()))
    assert [b.rows.tolist() for b in streamed(twice, 4)] == [[0, 2, 3], [5, 6, 7]]


# --- the command ----------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    """40 to train on and 8 to test, of two classes."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 8)):
        for row in range(n):
            path = folder / part / "ab"[row % 2] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            dots = rng.integers(0, 100, (16, 16, 3)) + 100 * (row % 2)
            Image.fromarray(dots.astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch) -> Path:
    """Pictures of which some are broken, too many to keep in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 10_000)
    folder = pictures(tmp_path / "photos")
    for name, how in BROKEN.items():
        spoil(folder / name, how)
    return folder


BROKEN = {
    "train/a/0.png": "half",  # its header is whole: only decoding tells
    "train/b/13.png": "half",
    "train/b/21.png": "bmp",
    "train/a/38.png": "missing",  # not even listed
    "test/a/4.png": "half",
}
LISTED = sorted(set(BROKEN) - {"train/a/38.png"})


def train(*words: object) -> Result:
    return CliRunner().invoke(cli, ["train", *map(str, words), *WORDS])


TABLES = ("suspects.csv", "clusters.csv")
NETS = ("undefended", "model")


def summary(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "summary.json").read_text()))


def same_files(one: Path, other: Path) -> bool:
    """Suspects and clusters byte for byte, weights bit for bit."""
    tables = [(place / name).read_bytes() for place in (one, other) for name in TABLES]
    nets = [load_file(place / f"{name}.safetensors") for place in (one, other) for name in NETS]
    return tables[:2] == tables[2:] and all(
        np.array_equal(nets[at][key], nets[at + 2][key]) for at in (0, 1) for key in nets[at]
    )


def interrupted_at(monkeypatch, *moments: tuple[str, int]) -> None:
    """Ctrl-C right after the n-th record of a name is written, whatever start writes it."""
    counts, real = Counter[str](), Folder.save

    def save(self: Folder, name: str, told: Callable[[], Record]) -> None:
        real(self, name, told)
        kind = name.split("-")[0]
        counts[kind] += 1
        if (kind, counts[kind]) in moments:
            raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "save", save)


def test_broken_images_are_left_out_and_listed_however_often_the_run_is_cut_off(
    photos: Path, tmp_path: Path, monkeypatch
):
    done = train(photos, "--out", tmp_path / "whole", "--max-bad", 4)
    assert done.exit_code == 0, done.output
    assert "check" not in done.stderr
    whole = summary(tmp_path / "whole")
    assert sorted(line.split(": ")[0] for line in whole["broken"]) == LISTED
    assert whole["rows"] == 36
    with (tmp_path / "whole" / "suspects.csv").open(newline="") as file:
        lines = {int(line["row"]): line["path"] for line in csv.DictReader(file)}
    assert len(lines) == 36 and not set(lines.values()) & set(BROKEN)
    assert lines[1] == "train/b/1.png" and lines[20] == "train/a/20.png"  # numbers stay
    told = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    events = list(map(json.loads, told))
    assert sorted(e["image"] for e in events if e["event"] == "broken") == LISTED
    assert whole["optimiser_steps"] == max(e["step"] for e in events if e["event"] == "train")

    moments = (("train", 3), ("broken", 1), ("snapshot", 1), ("train", 8))
    with monkeypatch.context() as patched:
        interrupted_at(patched, *moments)
        for _ in moments:
            cut = train(photos, "--out", tmp_path / "run", "--max-bad", 4, "--resume")
            assert cut.exit_code == 130, cut.output
    assert train(photos, "--out", tmp_path / "run", "--max-bad", 4, "--resume").exit_code == 0
    assert same_files(tmp_path / "run", tmp_path / "whole")
    assert sorted(summary(tmp_path / "run")["broken"]) == sorted(whole["broken"])
    assert summary(tmp_path / "run")["starts"] == 5


def test_one_too_many_ends_the_run_which_goes_on_with_more(photos: Path, tmp_path: Path):
    assert train(photos, "--out", tmp_path / "whole", "--max-bad", 9).exit_code == 0
    done = train(photos, "--out", tmp_path / "run", "--max-bad", 3)
    last = done.stderr.strip().splitlines()[-1]
    assert done.exit_code == 2 and "--resume" in last
    assert "do not decode, 1 of them held out: more than --max-bad 3 allows" in last
    assert " and 1 more " in last
    assert list((tmp_path / "run.partial" / "checkpoint").iterdir())
    assert train(photos, "--out", tmp_path / "run", "--max-bad", 4, "--resume").exit_code == 0
    assert same_files(tmp_path / "run", tmp_path / "whole")


def test_too_many_held_out_are_named_before_training(photos: Path, tmp_path: Path):
    done = train(photos, "--out", tmp_path / "run", "--max-bad", 0)
    assert done.exit_code == 2
    assert "4.png (truncated PNG) do not decode, 1 of them held out: more than" in done.stderr


@pytest.mark.parametrize("free", [10**9, None])
def test_a_run_goes_on_whatever_memory_is_free_then(
    photos: Path, tmp_path: Path, monkeypatch, free: int | None
):
    assert train(photos, "--out", tmp_path / "whole", "--max-bad", 4).exit_code == 0
    with monkeypatch.context() as patched:
        interrupted_at(patched, ("train", 3), ("train", 8))
        assert train(photos, "--out", tmp_path / "run", "--max-bad", 4).exit_code == 130
        patched.setattr(CpuBackend, "free_bytes", lambda self: free)
        cut = train(photos, "--out", tmp_path / "run", "--max-bad", 4, "--resume")
        assert cut.exit_code == 130, cut.output
    done = train(photos, "--out", tmp_path / "run", "--max-bad", 4, "--resume")
    assert done.exit_code == 0, done.output
    assert same_files(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("more", [["--skip-broken"], ["--defense", "plain"]])
def test_what_does_not_go_with_it_is_said(photos: Path, tmp_path: Path, more: list[str]):
    done = train(photos, "--out", tmp_path / "run", "--max-bad", 1, *more)
    assert done.exit_code == 2
    assert "--max-bad is for defense csc in one process" in done.stderr.splitlines()[-1]
