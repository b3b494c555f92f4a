from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

from csc_gpu.attacks import ATTACKS, settings_of
from csc_gpu.backend.cpu import CpuBackend
from csc_gpu.cli import cli
from csc_gpu.defenses import DEFENSES
from csc_gpu.run import COLUMNS

QUICK = ("--no-report", "--set", "train.epochs=2", "--set", "train.min_steps=1",
         "--set", "train.batch=32")  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def photos(folder: Path, classes=("cat", "dog"), count=10, side=16) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for row in range(count):
            image = rng.integers(0, 100, (side, side, 3)).astype(np.uint8) + 100 * label
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"{row}.jpg")
    return folder


def assert_refused(result, *needles):
    """One line on stderr, exit status 2, and the words that help."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    for needle in needles:
        assert needle in lines[-1]
    return lines[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small poisoned corpus and its run, trained just long enough to leave every file."""
    place = tmp_path_factory.mktemp("finished")
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    made = call("poison", "digits", place / "p", "--attack", "badnets", "--rate", 0.1)
    assert made.exit_code == 0, made.output
    ran = call("train", place / "p", "--out", place / "run", "--cpu", "--threads", 1,
               "--save-features", *QUICK)  # fmt: skip
    assert ran.exit_code == 0, ran.output
    return place


# --- what the commands leave behind -------------------------------------------------------------


def test_a_run_leaves_every_file_and_nothing_half_written(finished):
    assert {path.name for path in (finished / "run").iterdir()} >= {
        "suspects.csv", "clusters.csv", "model.safetensors", "undefended.safetensors",
        "features.npz", "settings.toml", "summary.json", "log.jsonl",
    }  # fmt: skip
    assert not list(finished.glob("*.partial"))
    assert not list((finished / "run").glob("*partial*"))


def test_suspects_have_a_line_for_every_row_in_order(finished):
    with (finished / "run" / "suspects.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["row", "path", "label", "is_poison_issue", "poison_score", *COLUMNS]
    with np.load(finished / "p" / "key.npz", allow_pickle=False) as key:
        assert [line["path"] for line in lines] == key["paths"].tolist()
    assert [int(line["row"]) for line in lines] == list(range(len(lines)))
    assert all(int(Path(line["path"]).stem) == int(line["row"]) for line in lines)


def test_score_gives_bare_fractions_with_counts(finished):
    done = call("score", finished / "run", "--key", finished / "p" / "key.npz")
    assert done.exit_code == 0, done.output
    score = json.loads((finished / "run" / "score.json").read_text())
    for part in ("before", "after"):
        for name in ("acc", "asr", "asr_incl_target", "ra", "virtual_clean", "virtual_triggered"):
            assert 0 <= score[part][name] <= 1
            hits, of = score[part]["counts"][name]
            assert score[part][name] == hits / of
    for name in ("tpr", "fpr", "precision", "auroc"):
        assert score["detection"][name] is None or 0 <= score["detection"][name] <= 1
    assert "before" in done.output and "asr" in done.output
    assert score["recovered"] is None and "recovered" not in done.output


@pytest.fixture(scope="module")
def recovering(finished):
    """A run on the same corpus with --recover, and its score."""
    ran = call("train", finished / "p", "--out", finished / "recovering", "--cpu", "--threads", 1,
               "--recover", *QUICK)  # fmt: skip
    assert ran.exit_code == 0, ran.output
    done = call("score", finished / "recovering", "--key", finished / "p" / "key.npz")
    assert done.exit_code == 0, done.output
    return finished / "recovering", done.output


def test_a_recovered_net_is_saved_and_scored_over_the_real_classes(recovering, finished):
    folder, told = recovering
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["recovered_without"] >= summary["suspects"]
    assert summary["suspects"] > 0
    weights = load_file(folder / "recovered.safetensors")
    assert weights["head.weight"].shape == (10, 128)
    assert (
        weights["head.weight"] != load_file(folder / "undefended.safetensors")["head.weight"]
    ).any()
    score = json.loads((folder / "score.json").read_text())
    assert score["recovered"]["argmax_over"] == 10
    for name in ("acc", "asr", "ra"):
        hits, of = score["recovered"]["counts"][name]
        assert score["recovered"][name] == hits / of
    (line,) = [line for line in told.splitlines() if line.startswith("recovered")]
    assert line.split()[1::2] == ["acc", "asr", "ra"]
    assert not (finished / "run" / "recovered.safetensors").exists()


def test_a_run_with_a_recovered_net_can_be_replaced(recovering, tmp_path):
    shutil.copytree(recovering[0], tmp_path / "run")
    done = train_on("digits", tmp_path, "--force", "--defense", "plain", *QUICK)
    assert done.exit_code == 0, done.output


def test_a_corpus_too_large_for_memory_is_streamed_to_the_same_verdict(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 100_000)
    done = call("train", finished / "p", "--out", tmp_path / "run", "--cpu", "--threads", 1,
                "--save-features", *QUICK)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "the files are read in every epoch" in done.stderr
    for name in ("suspects.csv", "clusters.csv"):
        ours, resident = ((place / "run" / name).read_bytes() for place in (tmp_path, finished))
        assert ours == resident, name
    ours, resident = (load_file(p / "run" / "model.safetensors") for p in (tmp_path, finished))
    assert all((ours[name] == resident[name]).all() for name in resident)


@pytest.mark.parametrize(
    "fault", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_memory_that_runs_out_is_told_in_one_line_and_the_log_stays(tmp_path, monkeypatch, fault):
    def full(*_, **__):
        raise fault

    monkeypatch.setattr("csc_gpu.csc.features", full)
    done = train_on("digits", tmp_path, *QUICK)
    assert_refused(done, "the memory did not suffice", "train.batch", "csc-gpu plan")
    assert (tmp_path / "run.partial" / "log.jsonl").exists()


def test_the_summary_says_how_the_verdict_was_come_by(finished):
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["model"] == "resnet8"
    assert summary["seed"] == 0
    assert summary["optimiser_steps"] == summary["epochs"] * 45
    assert summary["evidence_counts"]["virtual_rate_on_held_out"][1] == 359
    assert summary["versions"]["torch"] != "not installed"


def test_saved_features_give_the_verdict_that_train_gave(finished, tmp_path):
    done = call("segregate", finished / "run" / "features.npz", "--out", tmp_path / "v", "--cpu")
    assert done.exit_code == 0, done.output
    theirs = (finished / "run" / "suspects.csv").read_text()
    assert ",True," in theirs  # or the test would say little
    assert (tmp_path / "v" / "suspects.csv").read_text() == theirs


def test_saved_features_say_nothing_about_rows_that_were_not_asked_about(finished, tmp_path):
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["segregation"]["verified"] is True
    assert summary["segregation"]["suspected_labels"] == [0]
    features, onto = finished / "run" / "features.npz", ("--out", tmp_path / "v", "--cpu")
    other = ("--set", "segregate.persistence=1", "--set", "segregate.coarsest=0.2")
    assert_refused(call("segregate", features, *onto, *other), "segregate.rule=persistence")
    assert not (tmp_path / "v").exists()
    alone = call("segregate", features, *onto, *other, "--set", "segregate.rule=persistence")
    assert alone.exit_code == 0, alone.output


def test_the_same_seed_gives_the_same_verdict(finished, tmp_path):
    again = call(
        "train", finished / "p", "--out", tmp_path / "again", "--cpu", "--threads", 1, *QUICK
    )
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "suspects.csv").read_text() == (
        finished / "run" / "suspects.csv"
    ).read_text()


def test_train_does_not_open_the_answer_key(finished, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(finished / "p", bare)
    (bare / "key.npz").write_bytes(b"not a key")
    (bare / "recipe.json").unlink()
    done = call("train", bare, "--out", tmp_path / "run", "--cpu", "--threads", 1, *QUICK)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "suspects.csv").read_text() == (
        finished / "run" / "suspects.csv"
    ).read_text()


def test_the_first_line_says_which_model_runs_where(finished, tmp_path):
    done = call(
        "train", finished / "p", "--out", tmp_path / "r", "--cpu", "--defense", "plain", *QUICK
    )
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[0].startswith("csc-gpu train: resnet8 on cpu, defense plain")
    assert "poison was not looked for" in done.stdout
    assert call("score", tmp_path / "r", "--key", finished / "p" / "key.npz").exit_code == 0
    assert json.loads((tmp_path / "r" / "score.json").read_text())["detection"] is None


def test_a_feature_matrix_of_anything_can_be_segregated(tmp_path):
    from tests.worlds import world

    there = world()
    np.savez(
        tmp_path / "text.npz", features=there.points, labels=np.array(list("abcd"))[there.labels]
    )
    done = call("segregate", tmp_path / "text.npz", "--out", tmp_path / "v", "--cpu")
    assert done.exit_code == 0, done.output
    assert "only stage 1 ran" in done.output
    with (tmp_path / "v" / "suspects.csv").open() as file:
        flagged = [line["is_poison_issue"] == "True" for line in csv.DictReader(file)]
    assert np.mean(np.array(flagged)[there.poison]) >= 0.9


@pytest.mark.parametrize("attack", ["blend", "sig", "none"])
def test_every_attack_takes_the_same_options(tmp_path, attack):
    rate = ("--rate-of-target", 0.5) if attack == "sig" else ("--rate", 0.05)
    done = call("poison", "digits", tmp_path / "p", "--attack", attack, *rate, "--target", "3")
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "p" / "key.npz", allow_pickle=False) as key:
        assert int(key["is_poison"].sum()) == {"blend": 72, "sig": 73, "none": 0}[attack]


def test_several_targets_and_label_noise_are_told_by_the_key(tmp_path):
    words = ("--attack", "badnets", "--rate", 0.1, "--target", "1,7", "--label-noise", 0.1)
    done = call("poison", "digits", tmp_path / "p", *words)
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "p" / "key.npz", allow_pickle=False) as key:
        poison, given, before = (key[n] for n in ("is_poison", "given_labels", "orig_labels"))
    assert set(given[poison]) == {1, 7}
    noisy = (given != before) & ~poison
    assert noisy.sum() == round(0.1 * (~poison).sum())
    recipe = json.loads((tmp_path / "p" / "recipe.json").read_text())
    assert (recipe["target"], recipe["label_noise"]) == ([1, 7], 0.1)
    assert recipe["counts"]["mislabelled"] == noisy.sum()


def test_the_control_takes_the_options_of_any_attack(tmp_path):
    options = ("--rate", 0.3, "--option", "delta=40", "--trigger", "foo.png")
    done = call("poison", "digits", tmp_path / "p", "--attack", "none", *options)
    assert done.exit_code == 0, done.output


def test_a_file_changed_behind_its_size_and_date_is_checked_again(finished, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(finished / "p", folder)
    assert train_on(folder, tmp_path, *QUICK).exit_code == 0
    file = next((folder / "train" / "3").iterdir())
    held = file.stat()
    file.write_bytes(b"x" * held.st_size)
    os.utime(file, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert_refused(train_on(folder, tmp_path, "--force", *QUICK), file.name)


def test_a_broken_image_can_be_skipped_and_is_listed(tmp_path):
    folder = photos(tmp_path / "photos", count=12)
    (folder / "cat" / "0.jpg").write_bytes(b"text")
    done = call("train", folder, "--out", tmp_path / "run", "--cpu", "--skip-broken", *QUICK)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["broken"]) == 1 and "cat/0.jpg" in summary["broken"][0]


# --- what is refused, in one line, with exit status 2 -------------------------------------------


def train_on(source, tmp_path, *more):
    return call("train", source, "--out", tmp_path / "run", "--cpu", *more)


def test_a_missing_folder_is_refused(tmp_path):
    assert_refused(train_on(tmp_path / "nowhere", tmp_path), "nowhere")
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(train_on(tmp_path / "empty", tmp_path), "empty")


def test_one_class_only_is_refused(tmp_path):
    assert_refused(train_on(photos(tmp_path / "one", classes=("cat",)), tmp_path), "one class")


def test_a_truncated_jpeg_is_named(tmp_path):
    folder = photos(tmp_path / "photos", side=64)
    file = folder / "dog" / "3.jpg"
    file.write_bytes(file.read_bytes()[:500])
    assert_refused(train_on(folder, tmp_path), "dog/3.jpg", "--skip-broken")


def test_a_text_file_named_jpg_is_named(tmp_path):
    folder = photos(tmp_path / "photos")
    (folder / "dog" / "3.jpg").write_text("hello")
    assert_refused(train_on(folder, tmp_path), "dog/3.jpg", "--skip-broken")


def test_labels_of_the_wrong_length_are_refused(tmp_path):
    x = np.zeros((10, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(9), x_test=x, y_test=np.arange(10))
    assert_refused(train_on(tmp_path / "a.npz", tmp_path), "10", "9")


def test_nan_in_features_is_refused(tmp_path):
    points = np.zeros((10, 4), np.float32)
    points[6, 1] = np.nan
    np.savez(tmp_path / "f.npz", features=points, labels=np.arange(10) % 2)
    assert_refused(
        call("segregate", tmp_path / "f.npz", "--out", tmp_path / "v", "--cpu"), "NaN", "row 6"
    )


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (("--attack", "badnet", "--rate", 0.1), ("badnet", "badnets")),
        (("--attack", "badnets", "--rate", 0), ("--rate", "above 0")),
        (("--attack", "badnets", "--rate", 1), ("--rate", "below 1")),
        (("--attack", "badnets", "--rate-of-target", 1.5), ("--rate-of-target",)),
        (("--attack", "badnets"), ("--rate",)),
        (("--attack", "badnets", "--rate", 0.1, "--target", "12"), ("12", "class")),
        (("--attack", "badnets", "--rate", 0.1, "--target", "1,1"), ("1,1", "twice")),
        (("--attack", "sig", "--rate-of-target", 0.5, "--target", "all"), ("one target",)),
        (("--attack", "none", "--rate", 0.1, "--label-noise", 1), ("--label-noise",)),
        (("--attack", "sig", "--rate", 0.5), ("--rate-of-target",)),
        (("--attack", "badnets", "--rate", 0.1, "--option", "cel=2"), ("cel", "cell")),
        (("--attack", "badnets", "--rate", 0.1, "--trigger", "x.png"), ("x.png", "picture")),
        (("--attack", "badnets", "--rate", 0.1, "--mask", "x.png"), ("mask", "--trigger")),
        (("--attack", "sig", "--rate", 0.1, "--trigger", "x.png"), ("sig takes no trigger pict",)),
        (("--attack", "blend", "--rate", 0.1, "--mask", "x.png"), ("blend takes no trigger mask",)),
        (("--attack", "adap-patch", "--rate", 0.1, "--trigger", "x.png"), ("--option pictures=",)),
        (("--attack", "tact", "--rate", 0.01, "--target", "5"), ("'5' is a cover class and a t",)),
        (("--attack", "badnet", "--rate", 0.1), ("badnet", "did you mean 'badnets'")),
    ],
)
def test_a_wrong_attack_is_refused(tmp_path, words, needles):
    assert_refused(call("poison", "digits", tmp_path / "p", *words), *needles)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (("--set", "segregate.rule=tow-stage"), ("segregate.rule", "two-stage")),
        (("--set", "segregate.epps=1"), ("segregate.epps", "did you mean")),
        (("--set", "train.lr"), ("NAME=VALUE",)),
        (("--set", "train.lr=fast"), ("train.lr", "number")),
        (("--set", "train.model=vgg"), ("train.model", "resnet8")),
        (("--defense", "magic"), ("magic", "csc")),
        (("--defense", "plain", "--recover"), ("plain", "--recover")),
        (("--config", "no.toml"), ("no.toml",)),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, words, needles):
    assert_refused(train_on("digits", tmp_path, *words), *needles)
    assert not (tmp_path / "run").exists()


def test_no_gpu_and_no_cpu_option_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(call("train", "digits", "--out", tmp_path / "run"), "GPU", "--cpu")


def test_an_existing_run_is_left_alone_without_force(finished):
    before = {path: path.read_bytes() for path in (finished / "run").iterdir()}
    assert_refused(train_on(finished / "p", finished), "exists", "--force")
    assert before == {path: path.read_bytes() for path in (finished / "run").iterdir()}


def test_a_directory_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert_refused(train_on("digits", tmp_path, "--force"), "other files")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_force_replaces_only_a_result_of_the_same_command(finished, tmp_path):
    thesis = tmp_path / "proj"
    thesis.mkdir()
    (thesis / "settings.toml").write_text("x = 1")
    assert_refused(call("train", "digits", "--out", thesis, "--cpu", "--force"), "other files")
    assert (thesis / "settings.toml").read_text() == "x = 1"
    features, onto = finished / "run" / "features.npz", ("--out", finished / "run", "--force")
    assert_refused(call("segregate", features, *onto, "--cpu"), "holds the source")
    shutil.copy(features, tmp_path)
    assert_refused(call("segregate", tmp_path / "features.npz", *onto, "--cpu"), "other files")
    assert features.exists()
    poison = ("--attack", "none", "--rate", 0.1, "--force")
    assert_refused(call("poison", finished / "p", finished / "p", *poison), "holds the source")
    assert (finished / "p" / "key.npz").exists()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_is_told_and_an_older_run_stays(finished, tmp_path, monkeypatch):
    before = (finished / "run" / "suspects.csv").read_text()
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    again = call("train", finished / "p", "--out", finished / "run", "--cpu", "--force", *QUICK)
    assert_refused(again, "cannot write", "No space left", "make room")
    assert (finished / "run" / "suspects.csv").read_text() == before


def test_a_disk_that_is_too_small_is_told_before_training(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(9, 8, 1))
    monkeypatch.setattr("csc_gpu.csc.defend", full_disk)
    assert_refused(train_on(finished / "p", tmp_path), "bytes are needed", "1 are free")


def test_a_score_that_cannot_be_written_is_told(finished, monkeypatch):
    monkeypatch.setattr("csc_gpu.run.write_json", full_disk)
    assert_refused(
        call("score", finished / "run", "--key", finished / "p" / "key.npz"), "cannot write"
    )


def test_training_that_diverges_is_told(finished, tmp_path):
    wild = ("--set", "train.lr=1000000")
    assert_refused(train_on(finished / "p", tmp_path, *QUICK, *wild), "diverged", "train.lr")
    assert_refused(train_on(finished / "p", tmp_path, "--set", "train.lr=inf"), "train.lr")


def test_watching_nothing_is_told_before_training(finished, tmp_path):
    assert_refused(train_on(finished / "p", tmp_path, "--set", "watch.every=20"), "watch.every")


def test_images_of_one_pixel_are_refused(tmp_path):
    x, y = np.zeros((10, 1, 1), np.uint8), np.arange(10) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert_refused(train_on(tmp_path / "a.npz", tmp_path), "too small", "data.size")


def test_the_score_of_a_verdict_on_features_is_refused(finished, tmp_path):
    features = finished / "run" / "features.npz"
    assert call("segregate", features, "--out", tmp_path / "v", "--cpu").exit_code == 0
    assert_refused(call("score", tmp_path / "v", "--key", finished / "p" / "key.npz"), "no run")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert_refused(
        call("train", "digits", "--out", tmp_path / "file" / "run", "--cpu"), "cannot write"
    )
    assert_refused(
        call("poison", "digits", "/proc/nowhere", "--attack", "none", "--rate", 0.1), "/proc"
    )


def test_a_key_to_another_corpus_is_refused(finished, tmp_path):
    photos(tmp_path / "photos", side=8)
    call("poison", tmp_path / "photos", tmp_path / "p", "--attack", "badnets", "--rate", 0.2)
    assert_refused(
        call("score", finished / "run", "--key", tmp_path / "p" / "key.npz"), "not the key"
    )


def test_score_of_something_else_is_refused(tmp_path):
    assert_refused(call("score", tmp_path, "--key", tmp_path / "key.npz"), "no finished run")


# --- the rest -----------------------------------------------------------------------------------


def test_interrupting_says_what_was_kept(tmp_path):
    line = [sys.executable, "-m", "csc_gpu", "train", "digits", "--out", str(tmp_path / "run"),
            "--cpu", "--threads", "1", "--set", "train.epochs=2000"]  # fmt: skip

    def heed():
        """What runs in the background of a shell ignores Ctrl-C, and hands that on."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    work = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    partial = tmp_path / "run.partial"
    for _ in range(600):
        if (partial / "log.jsonl").exists() and (partial / "settings.toml").exists():
            break
        time.sleep(0.1)
    work.send_signal(signal.SIGINT)
    try:
        _, told = work.communicate(timeout=60)
    finally:
        work.kill()
    assert work.returncode == 130
    assert "interrupted" in told.splitlines()[-1]
    assert "settings.toml" in told.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_interrupting_before_anything_was_written_is_told_too(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("csc_gpu.sources.load", stopped)
    done = call("poison", "digits", tmp_path / "p", "--attack", "none", "--rate", 0.1)
    assert done.exit_code == 130
    assert "nothing had been written" in done.stderr


def test_help_and_wrong_usage_load_neither_torch_nor_numpy():
    check = "import sys, csc_gpu.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_help_says_what_the_command_does(command):
    done = call(command, "--help")
    assert done.exit_code == 0
    assert cli.commands[command].help


def test_doctor_names_backends_and_versions():
    done = call("doctor")
    assert done.exit_code == 0
    for word in ("backend cpu", "backend gpu", "torch", "nvidia-dali", "python"):
        assert word in done.output


def test_settings_are_toml_that_config_takes(tmp_path):
    (tmp_path / "all.toml").write_text(call("settings").output)
    done = train_on("digits", tmp_path, "--config", tmp_path / "all.toml", *QUICK)
    assert done.exit_code == 0, done.output


def test_a_preview_is_drawn_of_what_was_poisoned_and_refused_early_where_it_cannot(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ("poison", "digits", tmp_path / "p", "--attack", "badnets", "--rate", 0.1)
    (tmp_path / "folder.png").mkdir()
    for place in ("sheet.xyz", "sheet", "folder.png"):
        assert_refused(call(*words, "--preview", tmp_path / place), "--preview", place, ".png")
    assert_refused(call(*words, "--preview", tmp_path / "no" / "sheet.png"), "cannot write")
    assert_refused(call(*words, "--preview", "no/sheet.png"), "cannot write no/sheet.png")
    refused = (*words[:-1], 0.95, "--preview", tmp_path / "sheet.png")
    assert_refused(call(*refused), "only")
    assert not (tmp_path / "sheet.png").exists() and not (tmp_path / "p").exists()
    done = call(*words, "--preview", tmp_path / "sheet.png")
    assert f"preview: {tmp_path / 'sheet.png'}" in done.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 66, 4 * 66)


def test_the_fixed_trojan_asks_for_no_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("csc_gpu.backend.open_backend", None)
    words = ("poison", "digits", tmp_path / "p", "--attack", "trojan", "--rate", 0.1)
    done = call(*words, "--option", "fixed=true")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("quoted", [True, False])
def test_every_default_that_attacks_lists_can_be_typed_back(quoted):
    for line in call("attacks").output.splitlines():
        name, usual = line.split()[0], ATTACKS[line.split()[0]].settings()
        listed = line.partition("); ")[2].split()
        if not quoted:  # as a shell hands it on
            listed = [word.replace('"', "") for word in listed]
        assert len(listed) == len(fields(usual))
        for option in listed:
            assert settings_of(name, [option]) == usual, option
        assert settings_of(name, listed) == usual


def test_a_class_called_by_a_number_is_typed_as_one():
    settings = settings_of("tact", ["source=3", "cover_classes=[5,7]"])
    assert (settings.source, settings.cover_classes) == ("3", ("5", "7"))


def test_attacks_and_defenses_are_listed_name_first():
    lines = call("attacks").output.splitlines()
    assert [line.split()[0] for line in lines] == list(ATTACKS)
    assert all(ATTACKS[line.split()[0]].family == line.split()[1] for line in lines)
    listed = call("defenses").output.splitlines()
    assert [line.split()[0] for line in listed] == list(DEFENSES)
    assert next(line for line in listed if line.startswith("scan")).split()[1] == "reserve"


def test_a_quiet_run_says_its_verdict_alone_and_may_leave_a_board(tmp_path):
    quick = ("train.epochs=1", "train.min_steps=1", "conceal.epochs=1", "segregate.rule=text")
    sets = [word for change in quick for word in ("--set", change)]
    words = ["train", "digits", "--out", tmp_path / "run", "--cpu", "--threads", 1, "--quiet"]
    done = CliRunner().invoke(cli, [str(word) for word in [*words, "--tensorboard", *sets]])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "summary: " in done.stdout
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert not (tmp_path / "run" / "checkpoint").exists()
