"""The run directory: whole or not at all, and what is written is what is read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_gpu import pipeline, segregate
from csc_gpu.backend import open_backend
from csc_gpu.errors import ConfigError, CorpusError, Interrupted, OutputError
from csc_gpu.models import new_model
from csc_gpu.run import (
    COLUMNS,
    OURS,
    Kind,
    Names,
    check_free,
    fresh_directory,
    load_model,
    load_snapshots,
    load_suspects,
    names,
    partial_of,
    plain,
    replay,
    save_model,
    save_snapshots,
    save_suspects,
    write_json,
    write_text,
    writing,
)
from csc_gpu.types import Corpus, Reclassified, Segregation, Transfer
from tests.worlds import oracle, world

CPU = open_backend("cpu", 1)
KIND = Kind("train", frozenset({"old.txt", "a", "new", "a.csv", "b.json"}))


def corpus(n: int = 6, classes: tuple[str, ...] = ("cat", "dog", "emu")) -> Corpus:
    pixels = np.zeros((n, 8, 9, 3), np.uint8)
    paths = tuple(f"train/{row}.png" for row in range(n))
    return Corpus(np.arange(n) % 2, classes, np.arange(n) + 100, paths, pixels)


def verdict(n: int = 6) -> Segregation:
    """Rows 1 and 4 are suspect; one check left them out, and their pattern was tried."""
    suspect = np.isin(np.arange(n), [1, 4])
    score = np.where(suspect, 0.75, 0.125).astype(np.float32)
    table = {name: np.arange(n) for name in COLUMNS}
    table["cluster_density"] = np.where(suspect, np.nan, 0.5)
    table["reason"] = np.array(["none"] * n)
    controls = np.arange(n) == 0
    check = Reclassified(suspect, controls, np.arange(n) % 3)
    tried = Transfer(1, Transfer.fingerprint(suspect, ~suspect), 0.875, 2, 0.5)
    return Segregation(suspect, score, table, {}, (check,), (tried,))


def taken(*epochs: float, final: bool = True) -> dict[str, Any]:
    """Snapshots of six rows at these epochs, as an Outcome has them."""
    rng = np.random.default_rng(0)
    points = rng.normal(0, 1, (len(epochs) + 1, 6, 4)).astype(np.float32)
    found = {"features": points[:-1], "epoch": np.array(epochs)}
    return found | ({"final": points[-1]} if final else {})


def old_run(out: Path) -> Path:
    """An older run that is complete."""
    out.mkdir()
    (out / OURS).write_text("train\n", encoding="utf-8")
    (out / "old.txt").write_text("old", encoding="utf-8")
    return out


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.name != OURS]
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def stopped(out: Path, *files: str, by: BaseException, force: bool = False) -> None:
    """Work that writes these files and is then stopped."""
    with fresh_directory(out, KIND, force=force) as folder:
        for name in files:
            (folder / name).touch()
        raise by


OLD = {"old.txt": "old"}


# -------------------------------------------------------------------------------- fresh_directory


def test_the_directory_appears_as_a_whole_when_the_block_ends(tmp_path: Path):
    out = tmp_path / "deep" / "run"
    with fresh_directory(out, KIND, force=False) as folder:
        (folder / "a").write_text("1", encoding="utf-8")
        assert not out.exists()
    assert contents(out) == {"a": "1"}
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_an_empty_directory_is_as_good_as_none(tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    with fresh_directory(out, KIND, force=False) as folder:
        (folder / "a").touch()
    assert contents(out) == {"a": ""}


def test_an_older_run_stays_whole_until_the_block_ends(tmp_path: Path):
    out = old_run(tmp_path / "run")
    with fresh_directory(out, KIND, force=True) as folder:
        (folder / "new").touch()
        assert contents(out) == OLD
    assert contents(out) == {"new": ""}


@pytest.mark.parametrize("fault", [ValueError("x"), CorpusError("x"), OSError("x")])
def test_an_older_run_stays_when_the_block_fails(tmp_path: Path, fault: Exception):
    out = old_run(tmp_path / "run")
    with pytest.raises((type(fault), OutputError)):
        stopped(out, "new", by=fault, force=True)
    assert contents(out) == OLD
    refused_input = isinstance(fault, CorpusError)  # leaves nothing worth keeping
    assert (tmp_path / "run.partial").exists() != refused_input


def test_an_older_run_stays_on_ctrl_c(tmp_path: Path):
    out = old_run(tmp_path / "run")
    with pytest.raises(Interrupted):
        stopped(out, "new", by=KeyboardInterrupt(), force=True)
    assert contents(out) == OLD


def test_another_error_is_passed_on_as_it_is_and_leaves_no_empty_directory(tmp_path: Path):
    with pytest.raises(CorpusError, match="no such source"):
        stopped(tmp_path / "run", by=CorpusError("no such source"))
    assert not list(tmp_path.iterdir())


def test_what_an_interrupted_run_left_is_replaced_by_the_next(tmp_path: Path):
    with pytest.raises(Interrupted):
        stopped(tmp_path / "run", "left", by=KeyboardInterrupt())
    assert (tmp_path / "run.partial" / "left").exists()
    with fresh_directory(tmp_path / "run", KIND, force=False) as folder:
        (folder / "a").touch()
    assert contents(tmp_path / "run") == {"a": ""}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("resume", [False, True])
def test_what_another_command_left_there_is_replaced_and_the_result_is_ours(
    tmp_path: Path, resume: bool
):
    out, other = tmp_path / "run", Kind("pack", frozenset({"a"}))
    with pytest.raises(Interrupted):
        stopped(out, "left", by=KeyboardInterrupt())
    with fresh_directory(out, other, force=False, resume=resume) as folder:
        (folder / "a").touch()
    assert contents(out) == {"a": ""}
    check_free(out, other, force=True)  # and may be replaced


@pytest.mark.parametrize("mark", [None, ""])
def test_who_was_ended_before_the_mark_was_written_can_begin_again(
    tmp_path: Path, mark: str | None
):
    out = tmp_path / "run"
    partial_of(out).mkdir()
    if mark is not None:
        (partial_of(out) / OURS).write_text(mark)
    with fresh_directory(out, KIND, force=False, resume=True) as folder:
        (folder / "a").touch()
    check_free(out, KIND, force=True)


def test_a_partial_directory_of_someone_else_is_not_touched(tmp_path: Path):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "thesis").touch()
    with (
        pytest.raises(OutputError, match="not ours"),
        fresh_directory(tmp_path / "run", KIND, force=True),
    ):
        pytest.fail("the block must not begin")
    assert (tmp_path / "run.partial" / "thesis").exists()


def test_a_fault_in_reading_is_not_taken_for_one_in_writing(tmp_path: Path):
    gone = OSError(errno.ENOENT, "No such file or directory", "/photos/cat.jpg")
    with pytest.raises(FileNotFoundError):
        stopped(tmp_path / "run", by=gone)
    (tmp_path / "ab").mkdir()
    with pytest.raises(FileNotFoundError), writing(tmp_path / "a" / "out.png"):
        (tmp_path / "ab" / "photo.png").read_bytes()


def test_a_relative_path_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    out = Path("no/out.png")
    with pytest.raises(OutputError, match=r"cannot write no/out\.png"), writing(out):
        out.write_bytes(b"")


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_of_someone_else_is_not_touched(tmp_path: Path, force: bool):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("dear", encoding="utf-8")
    with (
        pytest.raises(OutputError, match="home holds other files"),
        fresh_directory(out, KIND, force=force),
    ):
        pytest.fail("the block must not begin")
    assert contents(out) == {"thesis.txt": "dear"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_not_overwritten_by_a_directory(tmp_path: Path, force: bool):
    (tmp_path / "run").write_text("dear", encoding="utf-8")
    with (
        pytest.raises(OutputError, match="run exists and is no directory"),
        fresh_directory(tmp_path / "run", KIND, force=force),
    ):
        pytest.fail("the block must not begin")
    assert (tmp_path / "run").read_text(encoding="utf-8") == "dear"


def test_an_older_run_is_replaced_only_with_force(tmp_path: Path):
    out = old_run(tmp_path / "run")
    with (
        pytest.raises(OutputError, match="run exists already; choose another place, or pass --f"),
        fresh_directory(out, KIND, force=False),
    ):
        pytest.fail("the block must not begin")
    assert contents(out) == OLD


@pytest.mark.parametrize("full", [False, True])
def test_a_link_to_a_directory_is_followed_or_refused_before_the_work(tmp_path: Path, full: bool):
    (tmp_path / "disk").mkdir()
    if full:
        (tmp_path / "disk" / OURS).write_text("train")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    began = False
    try:
        with fresh_directory(tmp_path / "run", KIND, force=True) as folder:
            began = True
            (folder / "a").touch()
    except OutputError:
        assert not began
    else:
        assert contents(tmp_path / "run") == {"a": ""}


@pytest.mark.parametrize("cut", ["rename", "removal"])
def test_cut_off_while_an_older_run_is_replaced_one_of_the_two_is_whole(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The power fails after the first rename, or in the removal of the older run."""
    out = tmp_path / "run"
    with fresh_directory(out, KIND, force=False) as folder:
        (folder / "a").write_text("old")

    class Cut(BaseException):
        pass

    real = os.replace

    def replaced(here: Path, there: Path) -> None:
        real(here, there)
        raise Cut

    def removed(folder: Path, ignore_errors: bool = False) -> None:
        (Path(folder) / OURS).unlink()
        raise Cut

    if cut == "rename":
        monkeypatch.setattr(os, "replace", replaced)
    else:
        monkeypatch.setattr(shutil, "rmtree", removed)
    with pytest.raises(Cut), fresh_directory(out, KIND, force=True) as folder:
        (folder / "a").write_text("new")
    monkeypatch.undo()
    with fresh_directory(out, KIND, force=True, resume=True) as folder:
        assert (out / "a").read_text() == ("old" if cut == "rename" else "new")
        (folder / "a").write_text("newest")
    assert (out / "a").read_text() == "newest"
    assert sorted(path.name for path in out.iterdir()) == [OURS, "a"]
    assert not partial_of(out).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_place_without_locks_is_not_taken_for_one_that_is_busy(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    began = fresh_directory(tmp_path / "run", KIND, force=False)
    with pytest.raises(OutputError, match=rf"cannot lock .*{os.strerror(number)}; .*flock"), began:
        pass


def test_a_link_to_nowhere_is_refused(tmp_path: Path):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(OutputError, match="no directory"),
        fresh_directory(tmp_path / "run", KIND, force=True),
    ):
        pytest.fail("the block must not begin")


def test_ctrl_c_tells_what_was_kept_and_where(tmp_path: Path):
    told = r"interrupted; kept in .*run\.partial: a\.csv, b\.json$"
    with pytest.raises(Interrupted, match=told):
        stopped(tmp_path / "run", "b.json", "a.csv", by=KeyboardInterrupt())
    assert set(contents(tmp_path / "run.partial")) == {"a.csv", "b.json"}
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_anything_was_written_leaves_nothing(tmp_path: Path):
    with pytest.raises(Interrupted, match="nothing had been written"):
        stopped(tmp_path / "run", by=KeyboardInterrupt())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_with_the_place_and_the_remedy(tmp_path: Path):
    full = OSError(errno.ENOSPC, "No space left on device", "run.partial/a")
    with pytest.raises(OutputError, match=r"cannot write .*run: No space left on device; choose"):
        stopped(tmp_path / "run", by=full)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_made_is_told_before_the_work(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"cannot write .*run: Not a directory"),
        fresh_directory(tmp_path / "file" / "run", KIND, force=False),
    ):
        pytest.fail("the block must not begin")


# ------------------------------------------------------------------------------------------- JSON


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    value = {
        "nan": float("nan"),
        "inf": [np.float32("inf"), -np.inf],
        "deep": {"array": np.array([1.5, np.nan])},
    }
    write_json(tmp_path / "a.json", value)
    there = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert there == {"nan": None, "inf": [None, None], "deep": {"array": [1.5, None]}}


def test_values_become_jsons_own_types():
    value = {
        0: np.int64(3),
        "mask": np.array([True, False]),
        "pair": (1, np.float32(0.5)),
        "yes": np.True_,
        "none": None,
        "word": "x",
    }
    wanted = {"0": 3, "mask": [True, False], "pair": [1, 0.5], "yes": True, "none": None}
    assert plain(value) == wanted | {"word": "x"}
    assert json.dumps(plain(value), allow_nan=False)


def test_a_text_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new \N{SNOWMAN}")
    assert contents(tmp_path) == {"a.txt": "new \N{SNOWMAN}"}

    def broken(self: Path, text: str, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "third")
    assert path.read_text(encoding="utf-8") == "new \N{SNOWMAN}"


# --------------------------------------------------------------------------------------- suspects


def test_suspects_come_back_as_written(tmp_path: Path):
    there, told = corpus(), verdict()
    save_suspects(tmp_path / "suspects.csv", names(there), told)
    back = load_suspects(tmp_path / "suspects.csv")
    assert back.paths == there.paths
    assert back.suspect.dtype == bool
    assert back.suspect.tolist() == told.suspect.tolist()
    assert back.score == pytest.approx(told.score, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["suspects.csv"]


def test_suspects_are_one_line_an_image_with_the_reasons_behind(tmp_path: Path):
    save_suspects(tmp_path / "s.csv", names(corpus()), verdict())
    lines = (tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(
        ["row", "path", "label", "is_poison_issue", "poison_score", *COLUMNS]
    )
    assert lines[1] == "100,train/0.png,cat,False,0.125000,0,0,0,0.5,0,0,0,0,none"
    assert lines[2] == "101,train/1.png,dog,True,0.750000,1,1,1,,1,1,1,1,none"  # no density
    assert len(lines) == 7


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_path_survives_the_csv(tmp_path_factory: pytest.TempPathFactory, paths: list[str]):
    n = len(paths)
    path = tmp_path_factory.getbasetemp() / "any.csv"
    save_suspects(path, Names(np.arange(n), tuple(paths), ("cat",) * n), verdict(n))
    assert load_suspects(path).paths == tuple(paths)


def test_missing_suspects_are_told_with_the_place(tmp_path: Path):
    with pytest.raises(CorpusError, match=r"cannot read .*suspects\.csv: .*; is it a run\?"):
        load_suspects(tmp_path / "suspects.csv")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "row,path\n0,a\n",
        "row,path,poison_score\n0,a,0.5\n",
        "row,path,label,is_poison_issue\n",
        "path,is_poison_issue,poison_score\na,True,high\n",
        "path,is_poison_issue,poison_score\na,True,0.9\nb,Fal",
    ],
    ids=["empty", "two columns", "no verdict", "no rows either", "a word", "cut off"],
)
def test_a_table_that_is_none_of_ours_is_refused(tmp_path: Path, text: str):
    (tmp_path / "suspects.csv").write_text(text, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"suspects\.csv is no list of suspects of ours"):
        load_suspects(tmp_path / "suspects.csv")


# ----------------------------------------------------------------------------------------- models


SUMMARY = {"model": "resnet8", "image_size": [8, 9]}


@pytest.mark.parametrize("outputs", [3, 4])
def test_a_model_comes_back_bit_by_bit(tmp_path: Path, outputs: int):
    model = new_model("resnet8", outputs, 8, seed=1)
    model(torch.randn(4, 3, 8, 9, generator=torch.Generator().manual_seed(0)))  # moves BatchNorm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(tmp_path / "model.safetensors", model, "resnet8", corpus())
    back = load_model(tmp_path / "model.safetensors", SUMMARY, outputs)
    assert back.n_outputs == outputs
    for state in (back.state_dict(), model.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_model_tells_what_it_takes_to_build_it(tmp_path: Path):
    from safetensors import safe_open

    path = tmp_path / "m.safetensors"
    save_model(path, new_model("resnet8", 4, 8, seed=1), "resnet8", corpus())
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert json.loads(about.pop("classes")) == ["cat", "dog", "emu"]
    assert about == {"model": "resnet8", "n_outputs": "4", "height": "8", "width": "9"}


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_model_is_refused_by_name(tmp_path: Path, kept: int):
    path = tmp_path / "model.safetensors"
    save_model(path, new_model("resnet8", 3, 8, seed=1), "resnet8", corpus())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorpusError, match=r"cannot read the model .*model\.safetensors"):
        load_model(path, SUMMARY, 3)


def test_a_missing_model_is_told_by_name(tmp_path: Path):
    with pytest.raises(CorpusError, match=r"cannot read the model .*absent\.safetensors"):
        load_model(tmp_path / "absent.safetensors", SUMMARY, 3)


@pytest.mark.parametrize(("name", "outputs"), [("resnet8", 4), ("resnet18", 3)])
def test_a_model_that_does_not_fit_the_summary_is_refused(tmp_path: Path, name: str, outputs: int):
    path = tmp_path / "model.safetensors"
    save_model(path, new_model("resnet8", 3, 8, seed=1), "resnet8", corpus())
    with pytest.raises(CorpusError, match=rf"model\.safetensors does not fit {name}"):
        load_model(path, SUMMARY | {"model": name}, outputs)


def test_a_summary_with_an_unknown_net_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_model(path, new_model("resnet8", 3, 8, seed=1), "resnet8", corpus())
    with pytest.raises(ConfigError, match="unknown model 'vgg'"):
        load_model(path, SUMMARY | {"model": "vgg"}, 3)


# -------------------------------------------------------------------------------------- snapshots


def test_snapshots_come_back_as_written(tmp_path: Path):
    there, told = corpus(), verdict()
    snapshots = taken(1.0, 2.5)
    rule = {"rule": "two-stage", "scales": (0.1, 0.2), "pca": 16}
    save_snapshots(tmp_path / "features.npz", snapshots, there, told, rule)
    back = load_snapshots(tmp_path / "features.npz")
    assert (back.features == snapshots["features"]).all()
    assert (back.final == snapshots["final"]).all()
    assert back.features.dtype == np.float32
    assert back.epoch.tolist() == [1.0, 2.5]
    assert back.labels.tolist() == there.labels.tolist()
    assert back.labels.dtype == np.int64
    assert back.names.ids.tolist() == there.ids.tolist()
    assert back.names.paths == there.paths
    assert back.names.labels == ("cat", "dog") * 3
    assert back.settings == {"rule": "two-stage", "scales": [0.1, 0.2], "pca": 16}
    (check,), (wanted,) = back.checks, told.checks
    assert check.candidates.tolist() == wanted.candidates.tolist()
    assert check.controls.tolist() == wanted.controls.tolist()
    assert check.predicted.tolist() == wanted.predicted.tolist()
    assert back.transfers == told.transfers
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]


@pytest.mark.parametrize("final", [True, False])
def test_a_witness_needs_no_checks_but_the_features_at_the_end(tmp_path: Path, final: bool):
    told = replace(verdict(), checks=(), transfers=())
    save_snapshots(tmp_path / "f.npz", taken(1.0, final=final), corpus(), told, {})
    back = load_snapshots(tmp_path / "f.npz")
    assert back.checks == back.transfers == ()
    assert (back.final is not None) == final
    assert (replay(back, CPU) is None) == (not final)  # no label may have been suspected


def test_without_the_features_at_the_end_there_is_no_witness(tmp_path: Path):
    save_snapshots(tmp_path / "f.npz", taken(1.0, final=False), corpus(), verdict(), {})
    back = load_snapshots(tmp_path / "f.npz")
    assert len(back.checks) == 1
    assert replay(back, CPU) is None


def saved(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "f.npz", **arrays)
    return tmp_path / "f.npz"


POINTS = np.arange(8.0).reshape(4, 2)
LABELS = np.array([0, 1, 0, 1])


def test_any_feature_matrix_with_labels_will_do(tmp_path: Path):
    back = load_snapshots(saved(tmp_path, features=POINTS, labels=["b", "a", "b", "c"]))
    assert back.features.shape == (1, 4, 2)
    assert back.features.dtype == np.float32
    assert back.labels.tolist() == [1, 0, 1, 2]
    assert back.names.labels == ("b", "a", "b", "c")
    assert back.names.paths == ("f.npz#0", "f.npz#1", "f.npz#2", "f.npz#3")
    assert back.names.ids.tolist() == [0, 1, 2, 3]
    assert back.epoch.tolist() == [0.0]
    assert back.settings is None
    assert back.checks == ()


def test_labels_with_gaps_are_closed_up(tmp_path: Path):
    back = load_snapshots(saved(tmp_path, features=POINTS, labels=[7, -2, 7, 30]))
    assert back.labels.tolist() == [1, 0, 1, 2]
    assert back.names.labels == ("7", "-2", "7", "30")


@pytest.mark.parametrize("missing", ["features", "labels"])
def test_a_missing_array_is_named(tmp_path: Path, missing: str):
    arrays = {"features": POINTS, "labels": LABELS}
    del arrays[missing]
    with pytest.raises(CorpusError, match=rf"f\.npz has no array {missing}"):
        load_snapshots(saved(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("features", "shape"),
    [
        (np.ones(4), r"\(4,\)"),
        (np.ones((1, 1, 4, 2)), r"\(1, 1, 4, 2\)"),
        (np.ones((4, 0)), r"\(4, 0\)"),
        (np.ones((0, 2)), r"\(0, 2\)"),
        (np.array([["a", "b"]] * 4), r"<U1 \(4, 2\)"),
    ],
)
def test_features_of_another_shape_or_kind_are_refused(tmp_path: Path, features: Any, shape: str):
    with pytest.raises(CorpusError, match=f"features must be numbers of shape .*got .*{shape}"):
        load_snapshots(saved(tmp_path, features=features, labels=LABELS))


@pytest.mark.parametrize("labels", [[0, 1, 0], [[0, 1, 0, 1]], 0])
def test_labels_of_another_length_are_refused(tmp_path: Path, labels: Any):
    with pytest.raises(CorpusError, match="4 rows of features, but labels of shape"):
        load_snapshots(saved(tmp_path, features=POINTS, labels=labels))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_told_with_the_first_row(tmp_path: Path, bad: float):
    points = np.stack([POINTS, POINTS])
    points[1, 2, 0] = points[0, 3, 1] = bad
    with pytest.raises(CorpusError, match="NaN or infinity in 2 rows, the first is row 2"):
        load_snapshots(saved(tmp_path, features=points, labels=LABELS))


def test_features_too_large_for_their_squares_are_refused(tmp_path: Path):
    load_snapshots(saved(tmp_path, features=POINTS / abs(POINTS).max() * 9e14, labels=LABELS))
    with pytest.raises(CorpusError, match="above 1e\\+15"):
        load_snapshots(saved(tmp_path, features=POINTS / abs(POINTS).max() * 1.1e15, labels=LABELS))


def test_one_class_alone_cannot_be_segregated(tmp_path: Path):
    with pytest.raises(CorpusError, match="only one class"):
        load_snapshots(saved(tmp_path, features=POINTS, labels=np.zeros(4)))


@pytest.mark.parametrize(
    ("name", "array", "wanted"),
    [("epoch", [1.0, 2.0], 1), ("paths", ["a"], 4), ("rows", [1, 2, 3], 4)],
)
def test_a_column_of_another_length_is_named(tmp_path: Path, name: str, array: Any, wanted: int):
    message = rf"{name} has shape \({len(array)},\), expected \({wanted},\)"
    with pytest.raises(CorpusError, match=message):
        load_snapshots(saved(tmp_path, features=POINTS, labels=LABELS, **{name: array}))


@pytest.mark.parametrize("labels", [[0, 1, 0, 2], [0, 1, 0, -1]])
def test_a_label_beyond_the_class_names_is_refused(tmp_path: Path, labels: list[int]):
    path = saved(tmp_path, features=POINTS, labels=labels, classes=["cat", "dog"])
    with pytest.raises(CorpusError, match="labels"):
        load_snapshots(path)


def test_class_names_that_are_no_list_are_refused(tmp_path: Path):
    path = saved(tmp_path, features=POINTS, labels=LABELS, classes="cat")
    with pytest.raises(CorpusError, match="labels"):
        load_snapshots(path)


def test_settings_that_are_not_json_are_refused(tmp_path: Path):
    path = saved(tmp_path, features=POINTS, labels=LABELS, settings="lr: 1")
    with pytest.raises(CorpusError, match="settings"):
        load_snapshots(path)


def test_pickled_arrays_are_never_loaded(tmp_path: Path):
    path = saved(tmp_path, features=POINTS, labels=np.array([0, 1, "a", None], object))
    with pytest.raises(CorpusError, match=r"f\.npz is no \.npz of plain arrays"):
        load_snapshots(path)


def test_a_missing_feature_file_is_named(tmp_path: Path):
    with pytest.raises(CorpusError, match=r"cannot read .*absent\.npz: No such file"):
        load_snapshots(tmp_path / "absent.npz")


def test_a_directory_is_no_feature_file(tmp_path: Path):
    with pytest.raises(CorpusError, match="cannot read"):
        load_snapshots(tmp_path)


@pytest.mark.parametrize("content", [b"", b"features", b"PK\x03\x04 and no more"])
def test_bytes_that_are_no_archive_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(CorpusError, match=r"f\.npz is no \.npz of plain arrays"):
        load_snapshots(tmp_path / "f.npz")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_a_truncated_archive_is_refused(tmp_path: Path, kept: float):
    path = saved(tmp_path, features=POINTS, labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CorpusError, match=r"f\.npz is no \.npz of plain arrays"):
        load_snapshots(path)


def test_an_archive_with_a_flipped_bit_is_refused(tmp_path: Path):
    path = saved(tmp_path, features=POINTS, labels=LABELS)
    whole = bytearray(path.read_bytes())
    at = whole.index(POINTS.tobytes()) + 20
    whole[at] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(CorpusError, match=r"f\.npz is no \.npz of plain arrays"):
        load_snapshots(path)


def test_a_single_array_is_no_feature_file(tmp_path: Path):
    with (tmp_path / "f.npz").open("wb") as file:
        np.save(file, POINTS)
    with pytest.raises(CorpusError, match=r"f\.npz is no \.npz of plain arrays"):
        load_snapshots(tmp_path / "f.npz")


# ----------------------------------------------------------------------------------------- replay


def a_run(tmp_path: Path, **changes: Any) -> tuple[Path, Segregation, segregate.Settings]:
    """A feature file with all that a witness said of a world, and the verdict at the time."""
    there, how = world(), segregate.Settings(**changes)
    sighting = segregate.observe(there.points, there.labels, 1.0, how, CPU)
    told = segregate.segregate([sighting], there.labels, how, CPU, oracle(there, wrong=0.05))
    snapshots = {"features": there.points[None], "epoch": [1.0], "final": there.points}
    n = len(there.labels)
    rows = Corpus(there.labels, tuple("abcd"), np.arange(n), tuple(map(str, range(n))))
    save_snapshots(tmp_path / "features.npz", snapshots, rows, told, {})
    return tmp_path / "features.npz", told, how


def judged_again(path: Path, how: segregate.Settings) -> Segregation:
    """The verdict on a feature file, with what it says that was said."""
    back = load_snapshots(path)
    sighting = segregate.observe(back.features[0], back.labels, 1.0, how, CPU)
    return segregate.segregate([sighting], back.labels, how, CPU, replay(back, CPU))


def test_the_same_questions_get_the_answers_of_the_run_and_the_same_verdict(tmp_path: Path):
    path, told, how = a_run(tmp_path)
    again = judged_again(path, how)
    assert told.suspect.any() and told.transfers and told.checks
    assert again.suspect.tolist() == told.suspect.tolist()
    assert again.score.tolist() == told.score.tolist()
    assert again.notes == told.notes


def test_other_settings_ask_other_questions_and_are_refused_with_the_remedy(tmp_path: Path):
    path, _, how = a_run(tmp_path)
    other = replace(how, persistence=1, coarsest=0.05)  # another core
    with pytest.raises(CorpusError, match=r"--set segregate\.rule=persistence") as told:
        judged_again(path, other)
    assert "\n" not in str(told.value)
    assert judged_again(path, replace(other, rule="persistence")).suspect.any()


def test_a_record_answers_nothing_that_was_not_asked(tmp_path: Path):
    told, nobody = verdict(), np.zeros(6, bool)
    save_snapshots(tmp_path / "f.npz", taken(1.0), corpus(), told, {})
    witness = replay(load_snapshots(tmp_path / "f.npz"), CPU)
    assert witness is not None
    assert witness.transfers(told.suspect, ~told.suspect, 1) == told.transfers[0]
    assert witness.reclassify(told.suspect).predicted.tolist() == [0, 1, 2, 0, 1, 2]
    for question in (
        lambda: witness.transfers(told.suspect, ~told.suspect, 0),
        lambda: witness.transfers(~told.suspect, told.suspect, 1),
        lambda: witness.transfers(told.suspect, nobody, 1),
        lambda: witness.reclassify(~told.suspect),
    ):
        with pytest.raises(CorpusError, match="other rows would be looked at"):
            question()


def test_a_verdict_that_a_cap_took_back_whole_is_not_called_clean():
    labels, nobody = np.zeros(6, np.int64), np.zeros(6, bool)
    for is_capped, said in ((True, "no verdict: more rows"), (False, "no poison found")):
        told = Segregation(nobody, np.zeros(6, np.float32), {}, {"capped": is_capped})
        assert pipeline.verdict(told, labels, ("a",)).startswith(said)
