"""At home elsewhere: clean datasets, Hugging Face folders, exit statuses, three lines of Python."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import csc_gpu
from csc_gpu import data, run
from csc_gpu.datasets import CleanDataset
from csc_gpu.errors import ConfigError, CorpusError
from tests.test_cli import QUICK, assert_refused, call, finished, own_cache, photos  # noqa: F401
from tests.worlds import world

# --- a dataset without suspects -----------------------------------------------------------------


def suspects_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "suspects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_clean_dataset_holds_all_but_the_suspects_with_their_labels(finished):  # noqa: F811
    clean = CleanDataset(finished / "run", finished / "p")
    kept = [line for line in suspects_of(finished / "run") if line["is_poison_issue"] == "False"]
    assert 0 < len(kept) < len(suspects_of(finished / "run"))
    assert list(clean.corpus.paths) == [line["path"] for line in kept]
    assert [clean.classes[label] for label in clean.targets] == [line["label"] for line in kept]
    for row in (0, len(clean) - 1):
        image, label = clean[row]
        with Image.open(finished / "p" / kept[row]["path"]) as stored:
            assert np.array_equal(np.asarray(image), np.asarray(stored.convert("RGB")))
        assert clean.classes[label] == kept[row]["label"]
    assert clean.class_to_idx[clean.classes[3]] == 3


def test_a_clean_dataset_feeds_torch_s_loader(finished):  # noqa: F811
    from torchvision.transforms.functional import pil_to_tensor

    clean = CleanDataset(finished / "run", finished / "p", pil_to_tensor)
    images, labels = next(iter(torch.utils.data.DataLoader(clean, batch_size=4)))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == clean.targets[:4]


def test_rows_of_arrays_and_of_a_split_made_here_are_the_run_s(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels)
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.toml").write_text("[data]\nholdout = 0.5\n[old]\nunknown = 1\n")
    train = data.open_source(str(tmp_path / "a.npz"), data.Settings(holdout=0.5)).train
    with (out / "suspects.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "is_poison_issue", "poison_score"))
        writer.writerows((path, row == 3, 0.5) for row, path in enumerate(train.paths))
    clean = CleanDataset(out, tmp_path / "a.npz", np.asarray)
    assert len(clean) == 19
    wanted = images[np.delete(train.ids, 3)]
    assert all((clean[row][0] == wanted[row]).all() for row in range(19))


def test_another_corpus_is_refused(finished, tmp_path):  # noqa: F811
    with pytest.raises(CorpusError, match="is not the corpus of"):
        CleanDataset(finished / "run", photos(tmp_path / "other"))
    with pytest.raises(CorpusError, match="no folder"):
        CleanDataset(finished / "run", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot read settings"):
        CleanDataset(tmp_path, finished / "p")


def test_suspects_read_as_whole_rows_booleans_and_shares(finished):  # noqa: F811
    lines = suspects_of(finished / "run")
    assert len({int(line["row"]) for line in lines}) == len(lines)
    assert {line["is_poison_issue"] for line in lines} == {"True", "False"}  # bool to pandas
    for line in lines:
        assert 0 <= float(line["poison_score"]) <= 1
        assert (float(line["poison_score"]) >= 0.5) == (line["is_poison_issue"] == "True")


# --- Hugging Face's folders ---------------------------------------------------------------------


def drawn(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val", "dev"])
def test_the_held_out_part_may_have_several_names(tmp_path, name):
    for part in ("train", name):
        for label in ("cat", "dog"):
            drawn(tmp_path / part / label / "1.png")
    split = data.open_source(str(tmp_path), data.Settings())
    assert split.test.paths == (f"{name}/cat/1.png", f"{name}/dog/1.png")
    assert len(split.train) == 2


def test_of_several_held_out_parts_test_is_taken(tmp_path):
    for part in ("train", "test", "validation"):
        for label in ("cat", "dog"):
            drawn(tmp_path / part / label / "1.png")
    split = data.open_source(str(tmp_path), data.Settings())
    assert [path.split("/")[0] for path in split.train.paths + split.test.paths] == [
        "train", "train", "test", "test"
    ]  # fmt: skip


def metadata(path: Path, lines: list[dict[str, object]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("at_top", [True, False])
def test_labels_come_from_metadata_at_the_top_or_in_each_part(tmp_path, ending, at_top):
    rows = {"train": [("a.png", 10), ("deep/b.png", 2)], "validation": [("c.png", 10)]}
    top = []
    for part, files in rows.items():
        for name, _ in files:
            drawn(tmp_path / part / name)
        lines = [{"file_name": name, "text": "x,y", "label": label} for name, label in files]
        top += [{**line, "file_name": f"{part}/{line['file_name']}"} for line in lines]
        if not at_top:
            metadata(tmp_path / part / f"metadata.{ending}", lines)
    if at_top:
        metadata(tmp_path / f"metadata.{ending}", top)
    split = data.open_source(str(tmp_path), data.Settings())
    assert split.train.classes == ("2", "10")
    assert split.train.paths == ("train/a.png", "train/deep/b.png")
    assert split.train.labels.tolist() == [1, 0]
    assert (split.test.paths, split.test.labels.tolist()) == (("validation/c.png",), [1])
    assert all(path.is_file() for path in split.train.files)


def test_without_parts_rows_are_held_out(tmp_path):
    lines = [{"file_name": f"{n}.png", "label": "ab"[n % 2]} for n in range(20)]
    for line in lines:
        drawn(tmp_path / line["file_name"])
    metadata(tmp_path / "metadata.jsonl", lines)
    split = data.open_source(str(tmp_path), data.Settings(holdout=0.3))
    assert (len(split.train), len(split.test)) == (14, 6)


def test_metadata_without_labels_leave_the_folders_as_classes(tmp_path):
    for label in ("cat", "dog"):
        for n in range(3):
            drawn(tmp_path / label / f"{n}.png")
    metadata(tmp_path / "metadata.csv", [{"file_name": "cat/0.png", "text": "a cat"}])
    assert data.open_source(str(tmp_path), data.Settings()).train.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "b.png"}\n', "line 2: no label"),
        ('{"file_name": "a.png", "label": 1}\n{"label": 1}\n', "line 2: no file_name"),
        ('{"file_name": "a.png", "label": 1}\n{broken\n', "is not UTF-8 text of its kind"),
        ('{"file_name": "a.png", "label": 1}\n[1]\n', "is not UTF-8 text of its kind"),
        ('{"file_name": "gone.png", "label": 1}\n', "'gone.png', which is not there"),
    ],
)
def test_metadata_that_do_not_hold_are_refused(tmp_path, content, said):
    drawn(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=said):
        data.open_source(str(tmp_path), data.Settings())


# --- pipelines of data --------------------------------------------------------------------------


def features(path: Path, poison: int) -> Path:
    there = world(poison=poison)
    np.savez(path, features=there.points, labels=there.labels)
    return path


@pytest.mark.parametrize(("poison", "status"), [(40, 3), (0, 0)])
def test_segregate_can_end_with_status_3_once_all_is_written(tmp_path, poison, status):
    given = features(tmp_path / "f.npz", poison)
    out = tmp_path / "out"
    done = call("segregate", given, "--out", out, "--cpu", "--threads", 1, "--fail-on-poison")
    assert done.exit_code == status, done.output
    assert run.read_summary(out, ("suspects",))["suspects"] == poison
    assert (out / "suspects.csv").exists() and "suspects:" in done.output
    assert not done.stderr or "Error" not in done.stderr
    quiet = call("segregate", given, "--out", out, "--cpu", "--threads", 1, "--force")
    assert quiet.exit_code == 0


def test_train_can_end_with_status_3_also_where_it_was_finished_before(finished):  # noqa: F811
    again = call("train", finished / "p", "--out", finished / "run", "--cpu", "--resume",
                 "--fail-on-poison", *QUICK)  # fmt: skip
    assert again.exit_code == 3, again.output
    assert "is finished" in again.output


def test_a_defense_that_does_not_look_cannot_fail_on_poison(tmp_path):
    done = call("train", "digits", "--out", tmp_path / "run", "--cpu", "--defense", "plain",
                "--fail-on-poison")  # fmt: skip
    assert_refused(done, "looks for no poison")


# --- from Python --------------------------------------------------------------------------------


def test_the_package_loads_nothing_heavy_until_a_name_is_asked_for():
    told = subprocess.run(
        [sys.executable, "-c", "import sys, csc_gpu; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "False"


def test_every_public_name_is_there_and_others_are_not():
    assert sorted(csc_gpu.PLACES) == csc_gpu.__all__
    assert all(getattr(csc_gpu, name).__name__ == name for name in csc_gpu.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = csc_gpu.nothing


def test_the_whole_defense_is_one_call_and_gives_what_train_gives(finished):  # noqa: F811
    from csc_gpu import defend

    changes = {"train.epochs": 2, "train.min_steps": 1, "train.batch": 32}
    outcome = defend(finished / "p", cpu=True, threads=1, changes=changes)
    told = suspects_of(finished / "run")
    known = [line["is_poison_issue"] == "True" for line in told]
    assert outcome.segregation.suspect.tolist() == known
    names = tuple(line["path"] for line in told if line["is_poison_issue"] == "True")
    assert outcome.suspects == names and names
    assert outcome.model.n_outputs == outcome.n_classes + 1
