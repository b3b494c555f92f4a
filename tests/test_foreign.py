"""Poisoned sets of other tools, written here from their description, not by our exporter."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from csc_gpu import data
from csc_gpu.answers import load_key, save_poisoned
from csc_gpu.attacks import Plan, poison, ready
from csc_gpu.backend import Decoder, reader
from csc_gpu.cli import cli
from csc_gpu.errors import CorpusError
from csc_gpu.evaluate import detection
from csc_gpu.foreign import FORMATS, backdoorbench, torch_files
from csc_gpu.types import AnswerKey, Corpus, Split

CLASSES = ("cat", "dog", "emu")
N, M, SIDE = 60, 30, 8
TARGET = 1
POISON = np.array([2, 3, 10, 21, 33, 40, 58])
COVERS = np.array([0, 11, 59])
Pixels = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def call(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words])


def done(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return str(result.output)


def refused(*words: object) -> str:
    """The one line on stderr of a command that ends with status 2 and leaves nothing."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ")
    assert not Path(str(words[2])).exists()
    return lines[0]


def read(folder: Path) -> Split:
    settings = data.Settings()
    split = data.open_source(str(folder), settings)
    return reader.read(split, settings, decoder=Decoder(torch.device("cpu"), 1), room=lambda: None)


# --------------------------------------------------------------- a world, and who writes it down


def pixels(seed: int, n: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)


TRAIN, TEST = pixels(0, N), pixels(1, M)
TRUE, TEST_TRUE = np.arange(N) % 3, np.arange(M) % 3
GIVEN = TRUE.copy()
GIVEN[POISON] = TARGET
KEPT = POISON[TRUE[POISON] == TARGET]  # target rows among the poison
assert len(KEPT) == 3


def write_clean(folder: Path, train: Pixels = TRAIN, labels: Any = TRUE) -> Path:
    """train/<class>/<row>.png and test/<class>/<row>.png: 10.png comes after 2.png."""
    for part, images, true in (("train", train, labels), ("test", TEST, TEST_TRUE)):
        for row, image in enumerate(images):
            path = folder / part / CLASSES[true[row]] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def stamped(images: Pixels) -> NDArray[np.float32]:
    """Floats 0..1, which are no k/255: 0.8 x + 0.2 t."""
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
    return np.float32(0.8) * (images / np.float32(255)) + np.float32(0.2) * ramp


def toolbox_floats() -> NDArray[np.float32]:
    floats = TRAIN / np.float32(255)
    rows = np.r_[POISON, COVERS]
    floats[rows] = stamped(TRAIN[rows])
    return floats


def grey_levels(floats: NDArray[np.float32]) -> Pixels:
    return np.rint(np.clip(floats, 0, 1) * np.float32(255)).astype(np.uint8)


def write_toolbox(folder: Path, form: str = "imgs", covers: bool = True) -> Path:
    """poisoned_train_set/<dataset>/<name>: imgs or data/<i>.png, labels, indices."""
    folder.mkdir(parents=True)
    floats = toolbox_floats()
    if form == "imgs":
        torch.save(torch.from_numpy(floats.transpose(0, 3, 1, 2).copy()), folder / "imgs")
    else:
        (folder / "data").mkdir()
        for row, image in enumerate(grey_levels(floats)):
            Image.fromarray(image).save(folder / "data" / f"{row}.png")
        Image.fromarray(TRAIN[0]).save(folder / "data" / "demo.png")
    torch.save(torch.from_numpy(GIVEN), folder / "labels")
    torch.save([int(row) for row in POISON], folder / "poison_indices")
    if covers:
        torch.save([int(row) for row in COVERS], folder / "cover_indices")
    return folder


def view(
    folder: Path,
    name: str,
    images: Pixels,
    rows: Any,
    new: Any,
    true: Any,
    held: Any,
    indicator_of: int,
) -> dict[str, Any]:
    """Stamped images as PNG in folders of the original label, and the state that names them."""
    told: dict[Any, Any] = {}
    for place, row in enumerate(rows):
        at = folder / name / str(true[row]) / f"{row}.png"
        at.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[place]).save(at)
        key = row if place % 2 else int(row)  # an np.int64 or an int
        told[key] = {"path": f"/gone/{name}/{true[row]}/{row}.png",
                     "other_info": [int(new[row]), true[row]]}  # fmt: skip
    flags = np.zeros(indicator_of)
    flags[rows] = 1
    return {
        "bd_data_container": {"save_folder_path": f"/gone/{name}", "data_dict": told,
                              "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.asarray(held),
        "poison_indicator": flags,
        "save_folder_path": f"/gone/{name}",
    }  # fmt: skip


TEST_STAMPED = np.flatnonzero(TEST_TRUE != TARGET)
STAMPED_TRAIN, STAMPED_TEST = grey_levels(stamped(TRAIN)), grey_levels(stamped(TEST))


def bench_result(
    folder: Path, poison: Any = POISON, given: Any = GIVEN, true: Any = TRUE
) -> dict[str, Any]:
    target = np.full(M, TARGET)
    return {
        "model_name": "preactresnet18",
        "num_classes": 3,
        "model": {"module.conv1.weight": torch.zeros(2, 3)},
        "data_path": "./data",
        "img_size": [SIDE, SIDE, 3],
        "clean_data": "tiny-zoo",
        "bd_train": view(folder, "bd_train_dataset", STAMPED_TRAIN[poison], poison, given, true,
                         np.arange(len(true)), len(true)),
        "bd_test": view(folder, "bd_test_dataset", STAMPED_TEST[TEST_STAMPED], TEST_STAMPED,
                        target, TEST_TRUE, TEST_STAMPED, M),
    }  # fmt: skip


def write_bench(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(bench_result(folder), folder / "attack_result.pt")
    return folder


def order(seed: int = 0, n: int = N) -> NDArray[np.int64]:
    """The rows in their new order, as the recipe says it is drawn."""
    return np.random.default_rng(seed).permutation(n)


def mask(rows: Any, n: int = N) -> NDArray[np.bool_]:
    return np.isin(np.arange(n), rows)


# -------------------------------------------------------------------------------- backdoor-toolbox


@pytest.mark.parametrize("form", ["imgs", "data"])
def test_a_set_of_backdoor_toolbox_is_imported_row_by_row(form: str, tmp_path: Path) -> None:
    source, clean = write_toolbox(tmp_path / "set", form), write_clean(tmp_path / "clean")
    told = done("import", source, tmp_path / "out", "--from", "backdoor-toolbox",
                "--clean", clean, "--seed", 7)  # fmt: skip
    assert "7 of 60 rows are poison, 3 covers, labelled 'dog'" in told
    back, key, rows = read(tmp_path / "out"), load_key(tmp_path / "out" / "key.npz"), order(7)
    assert (back.train.images == grey_levels(toolbox_floats())[rows]).all()
    assert back.train.classes == CLASSES
    assert back.train.labels.tolist() == key.given_labels.tolist() == GIVEN[rows].tolist()
    assert key.orig_labels.tolist() == TRUE[rows].tolist()
    assert (key.is_poison == mask(POISON)[rows]).all()
    assert (key.is_cover == mask(COVERS)[rows]).all()
    assert key.paths == back.train.paths
    assert (back.test.images == TEST).all() and (key.test == TEST).all()
    assert key.test_labels.tolist() == TEST_TRUE.tolist()
    assert key.attack_labels.tolist() == [-1] * M and len(key.triggered) == 0


def test_a_float_a_little_above_one_is_white_and_not_black(tmp_path: Path) -> None:
    source = write_toolbox(tmp_path / "set")
    images = torch.load(source / "imgs", weights_only=True)
    images[0, :2], images[0, 2] = 1.0000001, 1.03
    images[1, :2], images[1, 2] = -1e-8, -0.03
    images[2] = 100.5001 / 255
    images[3] = 100.4999 / 255
    torch.save(images, source / "imgs")
    done("import", source, tmp_path / "out", "--from", "backdoor-toolbox")
    back = read_all(tmp_path / "out")
    place = np.argsort(order())
    assert [set(back[place[row]].ravel().tolist()) for row in range(4)] == [
        {255},
        {0},
        {101},
        {100},
    ]


def read_all(folder: Path) -> Pixels:
    """Every training image in the order of the key."""
    paths = load_key(folder / "key.npz").paths
    return np.stack([np.asarray(Image.open(folder / path)) for path in paths])


def test_without_a_clean_set_the_old_label_of_poison_is_unknown(tmp_path: Path) -> None:
    source = write_toolbox(tmp_path / "set")
    told = done("import", source, tmp_path / "out", "--from", "backdoor-toolbox")
    assert "score will tell detection alone" in told
    key = load_key(tmp_path / "out" / "key.npz")
    expected = np.where(mask(POISON), -1, GIVEN)[order()]
    assert key.orig_labels.tolist() == expected.tolist()
    assert key.test.shape == (0, SIDE, SIDE, 3)
    assert (tmp_path / "out" / "classes.txt").read_text() == "0\n1\n2\n"
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["all_to_all"] is False


def test_a_set_without_test_images_is_trained_on_and_scored(tmp_path: Path) -> None:
    source, out, run = write_toolbox(tmp_path / "set"), tmp_path / "out", tmp_path / "run"
    done("import", source, out, "--from", "backdoor-toolbox")
    quick = ("train.epochs=1", "train.min_steps=1", "train.batch=16", "segregate.rule=persistence")
    done("train", out, "--out", run, "--cpu", "--threads", 1, "--no-report",
         *(word for change in quick for word in ("--set", change)))  # fmt: skip
    told = done("score", run, "--key", out / "key.npz")
    score = json.loads((run / "score.json").read_text())
    assert "acc -" in told
    assert score["before"]["acc"] is None and score["before"]["asr"] is None
    seen = N - score["detection"]["rows_not_seen"]
    assert 0 < seen < N  # some were held out by train itself
    assert score["detection"]["counts"]["tpr"][1] == len(POISON)
    assert score["detection"]["counts"]["tpr_relabelled"][1] == 0


def test_what_is_not_known_counts_neither_as_relabelled_nor_as_mislabelled() -> None:
    empty = np.zeros((0, 2, 2, 3), np.uint8)
    nobody = np.zeros(0, np.int64)
    key = AnswerKey(
        is_poison=np.array([True, True, False, False]),
        is_cover=np.zeros(4, bool),
        orig_labels=np.array([-1, 2, -1, 0]),
        given_labels=np.array([1, 1, 1, 0]),
        paths=("a", "b", "c", "d"),
        test=empty,
        triggered=empty,
        test_labels=nobody,
        attack_labels=nobody,
    )
    found = detection(np.ones(4, bool), np.linspace(1, 0, 4), key)
    assert found["counts"]["tpr_relabelled"] == [1, 1]
    assert found["counts"]["mislabelled_flagged"] == [0, 0]
    assert found["false_flags_by_class"] == {0: 1}


def write_grids(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """WaNet's two tensors, (1, H, W, 2), x first."""
    line = torch.linspace(-1, 1, SIDE)
    down, across = torch.meshgrid(line, line, indexing="ij")
    identity = torch.stack((across, down), 2)[None]
    noise = torch.from_numpy(np.random.default_rng(5).normal(0, 1.5, (1, SIDE, SIDE, 2))).float()
    torch.save(identity, folder / "identity_grid")
    torch.save(noise, folder / "noise_grid")
    return identity, noise


def along(images: Pixels, grid: torch.Tensor) -> torch.Tensor:
    """Images bent along a grid, as the paper says. (B, 3, H, W), 0..255"""
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    grids = grid.clamp(-1, 1).repeat(len(images), 1, 1, 1)
    return F.grid_sample(planes, grids, align_corners=True)


def bend(source: Path, grid: torch.Tensor) -> None:
    """Make the poison of a set WaNet's."""
    images = torch.load(source / "imgs", weights_only=True)
    images[POISON] = along(TRAIN[POISON], grid) / 255
    torch.save(images, source / "imgs")


def test_wanet_test_images_bend_along_the_stored_grids(tmp_path: Path) -> None:
    source, clean = write_toolbox(tmp_path / "set"), write_clean(tmp_path / "clean")
    identity, noise = write_grids(source)
    words = (source, tmp_path / "out", "--from", "backdoor-toolbox", "--clean", clean)
    assert "--attack makes some, with the set's own grids for wanet" in done("import", *words)
    bend(source, identity + 0.75 * noise / SIDE)
    told = done("import", *words, "--attack", "wanet", "--option", "s=0.75", "--force")
    assert "warning" not in told
    key = load_key(tmp_path / "out" / "key.npz")
    bent = along(TEST, identity + 0.75 * noise / SIDE).permute(0, 2, 3, 1).numpy()
    assert key.attack_labels.tolist() == [TARGET] * M
    assert np.abs(key.triggered - bent).max() <= 0.501  # rounding alone
    assert key.recipe["attack"] == "wanet" and key.recipe["settings"]["s"] == 0.75
    assert key.recipe["source"]["grids"]["noise_grid"]["shape"] == [1, SIDE, SIDE, 2]


@pytest.mark.parametrize("missing", ["identity_grid", "noise_grid"])
def test_one_grid_without_the_other_is_refused(missing: str, tmp_path: Path) -> None:
    source = write_toolbox(tmp_path / "set")
    write_grids(source)
    (source / missing).unlink()
    line = refused("import", source, tmp_path / "out", "--from", "backdoor-toolbox")
    assert f"lacks {missing}" in line


def test_the_fixed_trojan_stamps_an_imported_sets_test_images(tmp_path: Path) -> None:
    source, clean = write_toolbox(tmp_path / "set"), write_clean(tmp_path / "clean")
    done("import", source, tmp_path / "out", "--from", "backdoor-toolbox", "--clean", clean,
         "--attack", "trojan", "--option", "fixed=true")  # fmt: skip
    key = load_key(tmp_path / "out" / "key.npz")
    assert (
        (key.triggered != TEST).any(axis=(0, 3)) == mask([5, 6], 8)[:, None] & mask([5, 6], 8)
    ).all()


def test_a_named_attack_stamps_the_clean_test_images(tmp_path: Path) -> None:
    source, clean = write_toolbox(tmp_path / "set"), write_clean(tmp_path / "clean")
    told = done("import", source, tmp_path / "out", "--from", "backdoor-toolbox", "--clean", clean,
                "--attack", "badnets", "--option", "corner=top-left")  # fmt: skip
    assert "warning: stamped so, clean rows are no nearer to the set's poison" in told
    key = load_key(tmp_path / "out" / "key.npz")
    assert key.attack_labels.tolist() == [TARGET] * M
    corner = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]])[:, :, None]
    assert (key.triggered[:, :3, :3] == corner).all()
    assert (key.triggered[:, 3:] == TEST[:, 3:]).all()
    assert (key.recipe["target"], key.recipe["all_to_all"]) == (TARGET, False)


def test_an_all_to_all_set_is_known_by_its_labels(tmp_path: Path) -> None:
    source, clean = write_toolbox(tmp_path / "set"), write_clean(tmp_path / "clean")
    given = TRUE.copy()
    given[POISON] = (given[POISON] + 1) % 3
    torch.save(torch.from_numpy(given), source / "labels")
    done("import", source, tmp_path / "out", "--from", "backdoor-toolbox", "--clean", clean,
         "--attack", "badnets")  # fmt: skip
    key = load_key(tmp_path / "out" / "key.npz")
    assert key.attack_labels.tolist() == ((TEST_TRUE + 1) % 3).tolist()
    assert (key.recipe["target"], key.recipe["all_to_all"]) == ([0, 1, 2], True)


# ----------------------------------------------------------------------------------- BackdoorBench


def test_a_record_of_backdoorbench_is_laid_over_the_clean_set(tmp_path: Path) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    done("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean,
         "--seed", 3)  # fmt: skip
    back, key, rows = read(tmp_path / "out"), load_key(tmp_path / "out" / "key.npz"), order(3)
    expected = TRAIN.copy()
    expected[POISON] = STAMPED_TRAIN[POISON]
    assert (back.train.images == expected[rows]).all()
    assert back.train.labels.tolist() == key.given_labels.tolist() == GIVEN[rows].tolist()
    assert key.orig_labels.tolist() == TRUE[rows].tolist()
    assert (key.is_poison == mask(POISON)[rows]).all()  # those of the target class, too
    assert not key.is_cover.any()
    assert key.attack_labels.tolist() == [TARGET if y != TARGET else -1 for y in TEST_TRUE]
    assert (key.triggered == STAMPED_TEST[TEST_STAMPED]).all()
    assert (key.test == TEST).all() and key.test_labels.tolist() == TEST_TRUE.tolist()


def test_a_view_may_hold_rows_in_any_order(tmp_path: Path) -> None:
    """The indicator counts rows of the clean set; the view lists some of them, as it likes."""
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    held = np.random.default_rng(9).permutation(N)[:40]
    result = bench_result(source)
    result["bd_train"]["original_index_array"] = held
    torch.save(result, source / "attack_result.pt")
    done("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    key, rows = load_key(tmp_path / "out" / "key.npz"), held[order(n=40)]
    expected = TRAIN.copy()
    expected[POISON] = STAMPED_TRAIN[POISON]
    assert (read_all(tmp_path / "out") == expected[rows]).all()
    assert (key.is_poison == mask(POISON)[rows]).all()
    assert key.given_labels.tolist() == GIVEN[rows].tolist()


def test_empty_arrays_and_floats_of_16_bits_are_read(
    tmp_path: Path,
) -> None:
    torch.save({"none": np.array([], np.int64), "some": np.zeros(3)}, tmp_path / "arrays")
    found = torch_files.load(tmp_path / "arrays")
    assert found["none"].shape == (0,) and found["none"].dtype == np.int64
    assert found["some"].tolist() == [0, 0, 0]
    source, clean = write_toolbox(tmp_path / "set"), write_clean(tmp_path / "clean")
    images = torch.from_numpy(TRAIN.transpose(0, 3, 1, 2) >= 128).to(torch.bfloat16)
    torch.save(images, source / "imgs")
    done("import", source, tmp_path / "out", "--from", "backdoor-toolbox", "--clean", clean)
    assert (read_all(tmp_path / "out") == np.where(TRAIN >= 128, 255, 0)[order()]).all()


def test_a_pickle_gets_no_bytes_but_empty_ones(tmp_path: Path) -> None:
    class Large:
        def __reduce__(self) -> Any:
            return bytes, (10,)

    torch.save(Large(), tmp_path / "it")
    with pytest.raises(CorpusError, match=r"is no file of torch\.save, or is damaged|is refused"):
        torch_files.load(tmp_path / "it")


def test_a_record_written_under_numpy_1_is_read(tmp_path: Path) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    path = source / "attack_result.pt"
    with zipfile.ZipFile(path) as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
    changed = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, content in parts.items():
            changed += content.count(b"numpy._core.multiarray")
            new.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert changed >= 2  # arrays and scalars
    done("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    assert load_key(tmp_path / "out" / "key.npz").is_poison.sum() == len(POISON)


def training_controlled(
    n: int, batch: int, rate: float, cross: float, classes: int = 4
) -> tuple[Any, Any, Any, Any]:
    """(flagged, labels, true, cover) as the walk over the unshuffled loader leaves them."""
    true = np.random.default_rng(1).integers(0, classes, n)
    flagged, cover, labels = np.zeros(n, bool), np.zeros(n, bool), true.copy()
    for start in range(0, n, batch):
        here = min(batch, n - start)
        k = int(rate * here)
        labels[start : start + k] = TARGET
        cover[start + k : start + k + int(k * cross)] = True
        flagged[start : start + k + int(k * cross)] = True
    return flagged, labels, true, cover


@pytest.mark.parametrize("n", [640, 700, 657])
def test_covers_that_are_flagged_as_poison_are_told_by_their_place_in_the_batch(n: int) -> None:
    flagged, labels, true, cover = training_controlled(n, batch=64, rate=0.1, cross=2)
    found, unsure = backdoorbench.parted(flagged, labels, true, 4)
    own_class = flagged & ~cover & (true == TARGET)
    assert own_class.any() and (cover & (true == TARGET)).any()  # the rows in doubt
    assert unsure <= 4
    assert (found != cover).sum() <= unsure
    assert not (found & ~cover).any()
    if n == 640:
        assert unsure == 0 and (found == cover).all()


def test_poison_that_was_of_the_target_class_before_stays_poison() -> None:
    found, unsure = backdoorbench.parted(mask(POISON), GIVEN, TRUE, 3)
    assert not found.any() and unsure == 0


def test_clean_label_poison_is_not_taken_for_covers() -> None:
    flagged = mask(np.flatnonzero(TRUE == TARGET)[:6])
    found, unsure = backdoorbench.parted(flagged, TRUE, TRUE, 3)
    assert not found.any() and unsure == 0


def test_in_an_all_to_all_set_every_kept_label_is_a_cover() -> None:
    labels = np.where(mask(POISON), (TRUE + 1) % 3, TRUE)
    found, unsure = backdoorbench.parted(mask(POISON) | mask(COVERS), labels, TRUE, 3)
    assert (found == mask(COVERS)).all() and unsure == 0


def test_covers_at_random_places_leave_doubt_that_is_counted() -> None:
    flagged = mask(POISON) | mask(COVERS)
    found, unsure = backdoorbench.parted(flagged, GIVEN, TRUE, 3)
    sure = COVERS[TRUE[COVERS] != TARGET]
    assert (found == mask(sure)).all()
    assert unsure == len(KEPT) + len(COVERS) - len(sure)


def test_a_batch_is_known_by_where_flags_begin() -> None:
    flagged, *_ = training_controlled(700, batch=64, rate=0.1, cross=2)
    assert backdoorbench.batch_size(flagged) == 64
    assert backdoorbench.batch_size(mask([0, 1, 5, 6, 10], 13)) == 5
    assert backdoorbench.batch_size(mask([0, 1, 5, 10, 11], 13)) is None
    assert backdoorbench.batch_size(mask(POISON)) is None


def test_covers_of_a_training_controlled_record_are_covers_in_the_key(tmp_path: Path) -> None:
    true = np.arange(N) % 3
    flagged, cover, given = np.zeros(N, bool), np.zeros(N, bool), true.copy()
    for start in range(0, N, 20):
        flagged[start : start + 9] = True
        given[start : start + 3] = TARGET
        cover[start + 3 : start + 9] = True
    source = tmp_path / "run"
    source.mkdir()
    clean = write_clean(tmp_path / "clean")
    torch.save(bench_result(source, np.flatnonzero(flagged), given), source / "attack_result.pt")
    told = done("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    assert "9 of 60 rows are poison, 18 covers" in told
    key = load_key(tmp_path / "out" / "key.npz")
    assert (key.is_cover == cover[order()]).all()
    assert (key.is_poison == (flagged & ~cover)[order()]).all()


# ------------------------------------------------------------------------------------ plain arrays


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_plain_arrays_are_imported(form: str, tmp_path: Path) -> None:
    arrays = {"images": TRAIN, "labels": GIVEN, "is_poison": mask(POISON), "orig_labels": TRUE}
    source = tmp_path / ("set.npz" if form == "npz" else "set")
    if form == "npz":
        np.savez(source, **arrays)
    else:
        source.mkdir()
        for name, array in arrays.items():
            np.save(source / f"{name}.npy", array)
    done("import", source, tmp_path / "out", "--from", "npy")
    key = load_key(tmp_path / "out" / "key.npz")
    assert (read_all(tmp_path / "out") == TRAIN[order()]).all()
    assert (key.is_poison == mask(POISON)[order()]).all()
    assert key.orig_labels.tolist() == TRUE[order()].tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": None}, "cannot read .*labels.npy: No such file"),
        ({"images": TRAIN / 255}, "images must be .* uint8, but are .* float64"),
        ({"labels": GIVEN[:-1]}, "images has the shape .*, labels 59 rows"),
        ({"is_poison": np.full(N, 2)}, "is_poison must be true or false"),
        ({"is_cover": mask(POISON)}, "row 2 is both poison and cover"),
        ({"orig_labels": np.full(N, -2)}, "orig_labels"),
        ({"labels": np.array([None] * N)}, r"labels.npy is no .npy of plain numbers"),
        ({"labels": GIVEN * 10**9}, "is no label"),
        ({"images": TRAIN[:0], "labels": GIVEN[:0], "is_poison": None}, "holds no images"),
        ({"images": np.zeros((N, 0, 8, 3), np.uint8)}, "no images of more than 0x8 pixels"),
        ({"orig_labels": np.array(["a"] * N)}, "orig_labels must be whole numbers"),
        ({"orig_labels": TRUE.astype(bool)}, "orig_labels must be whole numbers"),
        (
            {"orig_labels": np.where(TRUE, TRUE, 255).astype(np.uint8)},
            r"orig_labels: row 0 has label 255, but there are -1\.\.2",
        ),
        ({"labels": np.full(N, -1)}, "row 0 has label -1, but labels count from 0"),
    ],
)
def test_plain_arrays_that_do_not_fit_are_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    arrays = {"images": TRAIN, "labels": GIVEN, "is_poison": mask(POISON)} | changes
    (tmp_path / "set").mkdir()
    for name, array in arrays.items():
        if array is not None:
            np.save(tmp_path / "set" / f"{name}.npy", array, allow_pickle=True)
    line = refused("import", tmp_path / "set", tmp_path / "out", "--from", "npy")
    assert re.search(said, line), line


def zipped(folder: Path) -> None:
    np.savez(folder / "it.npz", images=TRAIN)
    (folder / "it.npz").rename(folder / "images.npy")


def claims_too_much(folder: Path) -> None:
    with (folder / "images.npy").open("wb") as file:
        shape = (10**13, SIDE, SIDE, 3)
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)


def claims_too_much_in_a_zip(folder: Path) -> None:
    claims_too_much(folder)
    with zipfile.ZipFile(folder / "set.npz", "w") as archive:
        for name in ("images", "labels", "is_poison"):
            archive.write(folder / f"{name}.npy", f"{name}.npy")


@pytest.mark.parametrize("spoil", [zipped, claims_too_much, claims_too_much_in_a_zip])
def test_an_array_that_is_not_what_its_file_says_is_named(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    source = tmp_path / "set"
    source.mkdir()
    for name, array in {"images": TRAIN, "labels": GIVEN, "is_poison": mask(POISON)}.items():
        np.save(source / f"{name}.npy", array)
    spoil(source)
    whole = source / "set.npz"
    line = refused("import", whole if whole.exists() else source, tmp_path / "out", "--from", "npy")
    assert "images.npy is no .npy" in line or "or its header is damaged" in line


# --------------------------------------------------------------------------------------- malformed


class Runs:
    """A pickle that wants code."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.place}",)


Spoil = Callable[[Path], object]


def saved(name: str, value: Any) -> Spoil:
    return lambda folder: torch.save(value, folder / name)


def png(name: str, side: int = SIDE) -> Spoil:
    return lambda folder: Image.new("RGB", (side, side)).save(folder / name)


def to_png_form(folder: Path) -> None:
    (folder / "imgs").unlink()
    (folder / "data").mkdir()
    for row in range(N):
        png(f"data/{row}.png")(folder)


def both(*steps: Spoil) -> Spoil:
    return lambda folder: [step(folder) for step in steps]


def gone(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def pipe(name: str) -> Spoil:
    return lambda folder: os.mkfifo(folder / name)


def quantised_labels(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but files of it are about
        saved("labels", torch.quantize_per_tensor(torch.zeros(N), 1.0, 0, torch.qint32))(folder)


FLOATS, GRID = torch.zeros(N, 3, SIDE, SIDE), torch.zeros(1, SIDE, SIDE, 2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (gone("labels"), "cannot read .*labels: No such file"),
        (gone("poison_indices"), "cannot read .*poison_indices: No such file"),
        (gone("imgs"), "holds neither imgs nor data/"),
        (saved("imgs", FLOATS[:-1]), "imgs holds 59 images, but labels 60"),
        (saved("imgs", FLOATS[:, :1]), r"imgs must be \(N, 3, H, W\), but is \(60, 1, 8, 8\)"),
        (saved("imgs", FLOATS.byte()), "imgs must be a tensor of floats"),
        (saved("imgs", [1, 2]), "imgs must be a tensor of floats"),
        (saved("imgs", list(FLOATS)), "imgs must be a tensor of floats"),
        (saved("imgs", FLOATS - 2), "not normalised, but holds -2..-2"),
        (saved("imgs", FLOATS / 0), "not normalised, but holds nan"),
        (saved("imgs", torch.zeros(N, 3, 9, 9)), "images of 9x9, the clean data set of 8x8"),
        (saved("labels", torch.from_numpy(GIVEN)[:-1]), "has 59 rows, but the clean data set 60"),
        (saved("labels", torch.from_numpy(GIVEN) + 1), "has label 3, but there are 0..2"),
        (saved("labels", torch.from_numpy(GIVEN).float()), "labels must be whole numbers"),
        (saved("labels", torch.zeros(N, 2).long()), "labels must be whole numbers"),
        (saved("labels", torch.from_numpy((GIVEN + 1) % 3)), "row 0 has the true label 1 and 0 in"),
        (saved("poison_indices", [1, 60]), "poison_indices names row 60, but there are 0..59"),
        (saved("poison_indices", [1, -1]), "poison_indices names row -1, but there are 0..59"),
        (saved("poison_indices", [1, 5, 5]), "poison_indices names row 5 twice"),
        (saved("poison_indices", [1.5]), "poison_indices must be whole numbers"),
        (saved("poison_indices", [[1], [2, 3]]), "poison_indices must be whole numbers"),
        (saved("poison_indices", {"rows": 1}), "poison_indices must be whole numbers"),
        (saved("poison_indices", [2**70]), "poison_indices must be whole numbers"),
        (saved("poison_indices", [True, False]), "poison_indices must be whole numbers"),
        (
            saved("labels", torch.zeros(1, dtype=torch.int64).expand(10**12)),
            r"labels claims \(1000000000000,\), more than the file holds",
        ),
        (saved("imgs", FLOATS[:1, :1, :1, :1].clone().expand(N, 3, 60_000, 60_000)), "imgs claims"),
        (both(gone("labels"), pipe("labels")), "labels is not a regular file"),
        (both(gone("cover_indices"), pipe("cover_indices")), "cover_indices is not a regular file"),
        (saved("cover_indices", [0, 2]), "row 2 is both poison and cover"),
        (saved("noise_grid", torch.zeros(3)), "noise_grid must be a tensor"),
        (saved("noise_grid", GRID.long()), "noise_grid must be a tensor of finite floats"),
        (saved("noise_grid", GRID / 0), "noise_grid must be a tensor of finite floats"),
        (saved("noise_grid", GRID.double() + 1e300), "noise_grid must be a tensor of finite"),
        (saved("noise_grid", GRID.to_sparse()), "noise_grid must be a tensor of finite floats"),
        (saved("noise_grid", GRID.to("meta")), "noise_grid must be a tensor of finite floats"),
        (saved("noise_grid", torch.zeros(2, 8, 8, 2)), "noise_grid must be a tensor of finite"),
        (saved("imgs", torch.zeros(N, 3, 0, 8)), r"imgs must be \(N, 3, H, W\), but is \(60, 3, 0"),
        (saved("imgs", FLOATS.to("meta")), "imgs must be a tensor of floats"),
        (saved("imgs", FLOATS.to_sparse()), "imgs must be a tensor of floats"),
        (saved("imgs", FLOATS.double() + 1e300), "not normalised, but holds inf..inf"),
        (
            saved("labels", torch.zeros(N).to(torch.complex64).conj()),
            "labels must be whole numbers",
        ),
        (quantised_labels, "labels must be whole numbers"),
        (
            saved("labels", torch.full((N,), 2**64 - 1, dtype=torch.uint64)),
            "labels must be whole numbers",
        ),
        (
            saved("poison_indices", [torch.nn.Parameter(torch.zeros(()))]),
            "poison_indices must be whole numbers",
        ),
        (
            saved("poison_indices", [torch.zeros(2, device="meta")]),
            "poison_indices must be whole numbers",
        ),
        (both(to_png_form, gone("data/17.png")), "data lacks 17.png"),
        (
            both(to_png_form, png("data/60.png")),
            "data holds 60.png, but there are labels for 0..59",
        ),
        (both(to_png_form, png("data/9.png", 7)), "9.png is 7x7, but 0.png 8x8"),
        (
            both(to_png_form, lambda folder: (folder / "data" / "9.png").write_bytes(b"\x89PNG")),
            "9.png does not decode",
        ),
        (
            both(
                to_png_form,
                gone("labels"),  # it has none
                lambda folder: (folder / "data" / "n01440764").mkdir(),
            ),
            "the ImageNet layout.* import npy",
        ),
    ],
)
def test_a_set_of_backdoor_toolbox_that_does_not_fit_is_named(
    spoil: Spoil, said: str, tmp_path: Path
) -> None:
    source, clean = write_toolbox(tmp_path / "set"), write_clean(tmp_path / "clean")
    spoil(source)
    line = refused("import", source, tmp_path / "out", "--from", "backdoor-toolbox",
                   "--clean", clean)  # fmt: skip
    assert re.search(said, line), line


def change(where: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set an entry; dots separate keys, and a number is one."""

    def apply(result: dict[str, Any]) -> None:
        *path, last = [int(word) if word.isdecimal() else word for word in where.split(".")]
        for word in path:
            result = result[word]
        result[last] = value

    return apply


def missing(where: str) -> Callable[[dict[str, Any]], None]:
    def apply(result: dict[str, Any]) -> None:
        *path, last = [int(word) if word.isdecimal() else word for word in where.split(".")]
        for word in path:
            result = result[word]
        del result[last]

    return apply


TOLD = "bd_train.bd_data_container.data_dict"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (missing("bd_train"), "bd_train is None"),
        (change("bd_train", None), "bd_train is None"),
        (change("bd_train", [1]), "bd_train must be a dict, but is a list"),
        (change("num_classes", 10), "num_classes 10, but the clean data set 3 classes"),
        (change("num_classes", np.zeros(2)), "num_classes a ndarray, but the clean data set 3"),
        (change("num_classes", torch.zeros(2)), "num_classes a Tensor, but the clean data set 3"),
        (missing("bd_train.poison_indicator"), "poison_indicator must be 0 or 1 for each row"),
        (
            change("bd_train.poison_indicator", [[1.0], [1.0, 0.0]]),
            "poison_indicator must be 0 or 1 for each row",
        ),
        (
            change("bd_train.poison_indicator", [torch.zeros(1, requires_grad=True)] * N),
            "poison_indicator must be 0 or 1 for each row",
        ),
        (
            change("bd_train.poison_indicator", np.zeros(N - 1)),
            r"has the shape \(59,\), .* 60 rows",
        ),
        (change("bd_train.poison_indicator", np.full(N, 0.5)), "must be 0 or 1"),
        (
            change("bd_train.poison_indicator", np.ones(N)),
            "data_dict lacks row 0, which is flagged",
        ),
        (missing("bd_train.original_index_array"), "original_index_array must be whole numbers"),
        (change("bd_train.original_index_array", np.arange(61)), "names row 60"),
        (change("bd_train.original_index_array", np.array([1, 1])), "names row 1 twice"),
        (missing("bd_train.bd_data_container"), "bd_data_container must be a dict"),
        (change("bd_train.bd_data_container.data_dict", []), "data_dict must be a dict"),
        (change("bd_train.bd_data_container.save_file_format", "/../../x"), "are '/../../x', not"),
        (change("bd_train.bd_data_container.save_file_format", np.zeros(2)), "are a ndarray, not"),
        (missing(f"{TOLD}.2"), "data_dict lacks row 2"),
        (change(f"{TOLD}.2.other_info", [1]), r"row 2: other_info must be \[new"),
        (change(f"{TOLD}.2.other_info", [3, 2]), "has label 3, but there are 0..2"),
        (change(f"{TOLD}.2.other_info", ["../..", 2]), "other_info must be whole numbers"),
        (change(f"{TOLD}.2.other_info", [1, 0]), "row 2 has the true label 0 and 2 in the clean"),
        (
            change("bd_test.poison_indicator", np.zeros(N)),
            "bd_test: poison_indicator has the shape",
        ),
    ],
)
def test_a_record_of_backdoorbench_that_does_not_fit_is_named(
    spoil: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    result = bench_result(source)
    spoil(result)
    torch.save(result, source / "attack_result.pt")
    line = refused("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    assert re.search(said, line), line


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (gone("attack_result.pt"), "cannot read .*attack_result.pt: No such file"),
        (gone("bd_train_dataset/2/2.png"), "bd_train_dataset/2/2.png does not decode: missing"),
        (png("bd_train_dataset/2/2.png", 9), "2.png .* must be of one size|holds images of 9x9"),
        (saved("attack_result.pt", [1]), "attack_result.pt must be a dict"),
        (saved("cover_indices", [2]), "cover_indices names row 2, which .* is no cover"),
        (saved("cover_indices", [0]), "cover_indices names row 0, which is not flagged"),
        (
            lambda run: Image.new("RGB", (8, 8)).save(run / "attack_result.pt", "PNG"),
            "is no file of torch.save, or is damaged|is refused",
        ),
    ],
)
def test_a_record_with_missing_or_strange_files_is_named(
    spoil: Spoil, said: str, tmp_path: Path
) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    spoil(source)
    line = refused("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    assert re.search(said, line), line


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("backdoor-toolbox", "labels"),
        ("backdoor-toolbox", "imgs"),
        ("backdoor-toolbox", "poison_indices"),
        ("backdoorbench", "attack_result.pt"),
    ],
)
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_pickle_that_wants_code_is_refused_and_not_run(
    layout: str, file: str, how: str, tmp_path: Path
) -> None:
    write = write_toolbox if layout == "backdoor-toolbox" else write_bench
    source, clean = write(tmp_path / "set"), write_clean(tmp_path / "clean")
    trap = [Runs(tmp_path / "ran")]
    if how == "pickle":
        (source / file).write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, source / file, _use_new_zipfile_serialization=how == "torch")
    line = refused("import", source, tmp_path / "out", "--from", layout, "--clean", clean)
    assert file in line and ("refused" in line or "is no file of torch.save" in line)
    assert how == "pickle" or "asks for posix.system" in line
    assert "weights_only" not in line  # torch advises to load it all the same
    assert not (tmp_path / "ran").exists()


def test_images_pickled_in_memory_are_refused_and_the_remedy_said(tmp_path: Path) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    result = bench_result(source)
    told = result["bd_train"]["bd_data_container"]["data_dict"]
    for row in told:
        told[row] = {"img": Image.new("RGB", (8, 8)), "other_info": [1, 1]}
    torch.save(result, source / "attack_result.pt")
    line = refused("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    assert "holds pickled images" in line and "with a folder to save to" in line


@pytest.mark.parametrize("value", [np.zeros(3, np.int32), np.zeros(3, bool), np.array(["a"])])
def test_arrays_of_other_types_than_the_layout_has_are_refused(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "it")
    with pytest.raises(CorpusError, match=r"it is refused: it asks for numpy\.dtypes\.\w+DType"):
        torch_files.load(tmp_path / "it")


def test_a_damaged_file_ends_in_one_line_whatever_its_bytes(tmp_path: Path) -> None:
    whole = {
        form: save_bytes(tmp_path / form, bench_result(tmp_path), zipped=form == "zip")
        for form in ("zip", "legacy")
    }
    rng = np.random.default_rng(0)
    ends = set()
    for content in whole.values():
        for trial in range(150):
            bad = bytearray(content[: rng.integers(1, len(content))] if trial % 3 == 0 else content)
            for at in rng.integers(0, min(len(bad), 2500), 1 + trial % 4):
                bad[at] = rng.integers(0, 256)
            (tmp_path / "bad").write_bytes(bad)
            said = refusal(tmp_path / "bad")
            assert said is None or (str(tmp_path / "bad") in said and "\n" not in said)
            ends.add(said is None)
    assert False in ends


def refusal(path: Path) -> str | None:
    try:
        torch_files.load(path)
    except CorpusError as fault:
        return str(fault)
    return None


def save_bytes(path: Path, value: Any, *, zipped: bool) -> bytes:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


# ---------------------------------------------------------------------------------------- no leaks


@pytest.mark.parametrize("layout", ["backdoor-toolbox", "backdoorbench"])
def test_neither_file_nor_name_nor_row_tells_imported_poison(layout: str, tmp_path: Path) -> None:
    write = write_toolbox if layout == "backdoor-toolbox" else write_bench
    source, clean = write(tmp_path / "set"), write_clean(tmp_path / "clean")
    done("import", source, tmp_path / "out", "--from", layout, "--clean", clean)
    key, traits = load_key(tmp_path / "out" / "key.npz"), set()
    for row, path in enumerate(key.paths):
        file = tmp_path / "out" / path
        about = file.stat()
        traits.add((about.st_size, about.st_mtime_ns, about.st_mode, file.read_bytes()[:41]))
        assert path == f"train/{CLASSES[key.given_labels[row]]}/{row:02d}.png"
    assert len(traits) == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "train",
        "test",
        "classes.txt",
        "key.npz",
        "truth.csv",
        "recipe.json",
        ".csc-gpu",
    }


def test_rows_that_began_every_batch_lie_anywhere_after_import(tmp_path: Path) -> None:
    flagged, labels, *_ = training_controlled(600, batch=20, rate=0.1, cross=0)
    np.savez(tmp_path / "set.npz", images=pixels(0, 600), labels=labels, is_poison=flagged)
    done("import", tmp_path / "set.npz", tmp_path / "out", "--from", "npy", "--seed", 2)
    after = load_key(tmp_path / "out" / "key.npz").is_poison
    assert after.sum() == flagged.sum() == 60
    in_batch = np.bincount(np.flatnonzero(after) % 20, minlength=20)
    assert in_batch.max() < 10  # before: 30, 30, 0, 0, ...
    assert 0.4 < np.flatnonzero(after).mean() / 599 < 0.6


def test_the_seed_says_the_order_and_the_recipe_says_the_seed(tmp_path: Path) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    words = ("--from", "backdoorbench", "--clean", clean)
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        done("import", source, tmp_path / name, *words, "--seed", seed)
    a, b, c = (load_key(tmp_path / name / "key.npz") for name in "abc")
    assert a.orig_labels.tolist() == b.orig_labels.tolist() != c.orig_labels.tolist()
    assert c.recipe["source"]["shuffled_by"] == 5
    assert c.recipe["source"]["format"] == "backdoorbench"
    assert c.recipe["counts"]["poison"] == len(POISON)
    assert c.recipe["counts"]["target_class_before"] == 20


# ---------------------------------------------------------------------------------- there and back


def ours(folder: Path, attack: str, **how: Any) -> tuple[Split, AnswerKey]:
    """A small corpus of `csc-gpu poison`, written to a folder."""
    paths = tuple(map(str, range(N)))
    split = Split(
        Corpus(TRUE, CLASSES, np.arange(N), paths, TRAIN),
        Corpus(TEST_TRUE, CLASSES, np.arange(M), paths[:M], TEST),
    )
    plan = Plan(attack=attack, **{"target": "1", "rate": 0.1} | how)
    made = poison(split, ready(split, plan))
    folder.mkdir()
    save_poisoned(folder, *made)
    return made


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("attack", "target"),
    [("badnets", "1"), ("badnets-a2a", "all"), ("sig", "1"), ("wanet", "1"), ("none", "1")],
)
def test_what_is_exported_comes_back(layout: str, attack: str, target: str, tmp_path: Path) -> None:
    split, key = ours(tmp_path / "ours", attack, target=target)
    assert key.is_cover.any() == (attack == "wanet")
    done("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", layout)
    done("import", tmp_path / "theirs", tmp_path / "back", "--from", layout,
         "--clean", tmp_path / "theirs" / "clean", "--seed", 6)  # fmt: skip
    back, rows = load_key(tmp_path / "back" / "key.npz"), order(6)
    assert (read_all(tmp_path / "back") == split.train.images[rows]).all()
    for name in ("is_poison", "is_cover", "orig_labels", "given_labels"):
        assert getattr(back, name).tolist() == getattr(key, name)[rows].tolist(), name
    assert (back.test == key.test).all() and back.test_labels.tolist() == key.test_labels.tolist()
    assert back.recipe["sha256"] == {}
    if layout == "npy":  # which has all
        assert back.attack_labels.tolist() == key.attack_labels.tolist()
        assert (back.triggered == key.triggered).all()
    if layout == "backdoorbench":  # which leaves images of the target itself out
        wanted = np.where(key.attack_labels == key.test_labels, -1, key.attack_labels)
        assert back.attack_labels.tolist() == wanted.tolist()
        assert (back.triggered == key.triggered[wanted[key.attack_labels >= 0] >= 0]).all()
    assert read(tmp_path / "back").train.classes == CLASSES


def test_plain_arrays_with_their_test_images_need_no_clean_set(tmp_path: Path) -> None:
    _, key = ours(tmp_path / "ours", "wanet")
    done("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", "npy")
    told = done("import", tmp_path / "theirs", tmp_path / "back", "--from", "npy")
    back = load_key(tmp_path / "back" / "key.npz")
    assert "no test images" not in told and "no triggered" not in told
    for name in ("test", "test_labels", "triggered", "attack_labels"):
        assert (getattr(back, name) == getattr(key, name)).all(), name
    line = refused("import", tmp_path / "theirs", tmp_path / "no", "--from", "npy", "--clean",
                   tmp_path / "theirs" / "clean", "--attack", "wanet")  # fmt: skip
    assert "leave --attack out" in line
    for name in ("triggered", "attack_labels"):
        (tmp_path / "theirs" / f"{name}.npy").unlink()
    told = done("import", tmp_path / "theirs", tmp_path / "without", "--from", "npy")
    assert "no triggered test images" in told


HELD_OUT = {
    "test": TEST,
    "test_labels": TEST_TRUE,
    "triggered": TEST[:2],
    "attack_labels": np.where(np.arange(M) < 2, TARGET, -1),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test": None}, "has test or test_labels, but no test$"),
        ({"test_labels": None}, "has test or test_labels, but no test_labels$"),
        ({"attack_labels": None}, "has triggered or attack_labels, but no attack_labels$"),
        ({"triggered": None}, "has triggered or attack_labels, but no triggered$"),
        ({"test": None, "test_labels": None}, "has triggered or attack_labels, but no test$"),
        ({"test": TEST / 255}, r"test must be \(N, H, W, 3\) uint8"),
        ({"triggered": TEST[:2, 1:]}, "triggered has the shape"),
        ({"triggered": TEST[:3]}, "triggered holds 3 images, attack_labels of 0 or more 2"),
        ({"test_labels": TEST_TRUE[1:]}, "test holds 30 images, test_labels 29"),
        ({"attack_labels": np.full(M, -2)}, r"attack_labels: row 0 has label -2, but there are -1"),
        ({"test_labels": (TEST_TRUE + 1) % 3}, "test_labels: row 0 has the true label 1 and 0 in"),
    ],
)
def test_held_out_arrays_that_do_not_fit_are_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    arrays = {"images": TRAIN, "labels": GIVEN, "is_poison": mask(POISON)} | HELD_OUT | changes
    clean = write_clean(tmp_path / "clean")
    np.savez(tmp_path / "set.npz", **{name: a for name, a in arrays.items() if a is not None})
    line = refused("import", tmp_path / "set.npz", tmp_path / "out", "--from", "npy",
                   "--clean", clean)  # fmt: skip
    assert re.search(said, line), line


def test_what_another_tool_cannot_do_with_an_export_is_said(tmp_path: Path) -> None:
    ours(tmp_path / "ours", "badnets")
    said = {"backdoor-toolbox": "no place for triggered test images",
            "backdoorbench": "load_attack_result cannot read it"}  # fmt: skip
    for layout in FORMATS:
        told = done("export-corpus", tmp_path / "ours", tmp_path / layout, "--to", layout)
        for name, line in said.items():
            assert (line in told) == (name == layout)
    result = torch_files.load(tmp_path / "backdoorbench" / "attack_result.pt")
    assert " " in result["clean_data"]  # no name of theirs, so no set of theirs is built


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_record_over_another_clean_set_is_warned_of(part: str, tmp_path: Path) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    words = (source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    assert "warning" not in done("import", *words)
    for number, file in enumerate(sorted((clean / part).rglob("*.png"))):
        Image.fromarray(pixels(100 + number, 1)[0]).save(file)
    assert "warning: the stored images are hardly nearer" in done("import", *words, "--force")


def test_an_exported_set_of_backdoor_toolbox_is_laid_out_as_theirs(tmp_path: Path) -> None:
    split, key = ours(tmp_path / "ours", "wanet")
    done("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", "backdoor-toolbox")
    names = ("imgs", "labels", "poison_indices", "cover_indices", "identity_grid", "noise_grid")
    imgs, labels, poison_rows, cover_rows, identity, noise = (
        torch.load(tmp_path / "theirs" / name, weights_only=True) for name in names
    )
    assert imgs.dtype == torch.float32 and imgs.shape == (N, 3, SIDE, SIDE)
    assert imgs.min() >= 0 and imgs.max() <= 1
    assert torch.equal(imgs[5, 1], torch.from_numpy(split.train.images[5, :, :, 1]).float() / 255)
    assert labels.dtype == torch.int64 and labels.tolist() == key.given_labels.tolist()
    assert type(poison_rows) is list and poison_rows == np.flatnonzero(key.is_poison).tolist()
    assert type(cover_rows) is list and cover_rows == np.flatnonzero(key.is_cover).tolist()
    bent = along(key.test, identity + 0.5 * noise / SIDE).permute(0, 2, 3, 1).numpy()
    assert np.abs(bent - key.triggered).max() < 0.51


def test_a_wanet_set_that_went_there_and_back_is_stamped_as_before(tmp_path: Path) -> None:
    _, key = ours(tmp_path / "ours", "wanet")
    done("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", "backdoor-toolbox")
    told = done("import", tmp_path / "theirs", tmp_path / "back", "--from", "backdoor-toolbox",
                "--clean", tmp_path / "theirs" / "clean", "--attack", "wanet",
                "--option", "pattern_seed=9")  # fmt: skip
    assert "warning" not in told  # black rows are nothing to compare with
    assert (load_key(tmp_path / "back" / "key.npz").triggered == key.triggered).all()


def test_imported_grids_are_exported_bit_by_bit(tmp_path: Path) -> None:
    source, clean = write_toolbox(tmp_path / "set"), write_clean(tmp_path / "clean")
    grids = write_grids(source)
    done("import", source, tmp_path / "ours", "--from", "backdoor-toolbox", "--clean", clean)
    done("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", "backdoor-toolbox")
    for name, grid in zip(("identity_grid", "noise_grid"), grids, strict=True):
        assert torch.equal(torch.load(tmp_path / "theirs" / name, weights_only=True), grid)


def test_an_exported_record_of_backdoorbench_is_laid_out_as_theirs(tmp_path: Path) -> None:
    split, key = ours(tmp_path / "ours", "badnets")
    done("export-corpus", tmp_path / "ours", tmp_path / "record" / "run", "--to", "backdoorbench")
    run = tmp_path / "record" / "run"
    result = torch_files.load(run / "attack_result.pt")
    assert set(result) == {"model_name", "num_classes", "model", "data_path", "img_size",
                           "clean_data", "bd_train", "bd_test"}  # fmt: skip
    assert result["num_classes"] == 3 and result["img_size"] == [SIDE, SIDE, 3]
    assert "data" in result["data_path"]
    train = result["bd_train"]
    assert set(train) == {"bd_data_container", "getitem_all", "getitem_all_switch",
                          "original_index_array", "poison_indicator",
                          "save_folder_path"}  # fmt: skip
    assert train["poison_indicator"].dtype == np.float64
    assert (train["poison_indicator"] == key.is_poison).all()
    flags = torch_files.load(run / "train_poison_index_list.pickle")
    assert flags.dtype == np.float64 and (flags == key.is_poison).all()
    told = train["bd_data_container"]["data_dict"]
    assert set(told) == set(np.flatnonzero(key.is_poison))
    for row, entry in told.items():
        new, old = entry["other_info"]
        assert (new, old) == (key.given_labels[row], key.orig_labels[row])
        at = run / "bd_train_dataset" / str(old) / f"{row}.png"
        assert entry["path"] == str(at.resolve())
        assert (np.asarray(Image.open(at)) == split.train.images[row]).all()
    assert len(list((run / "bd_train_dataset").rglob("*.png"))) == key.is_poison.sum()
    others = np.flatnonzero(key.test_labels != TARGET)
    assert result["bd_test"]["original_index_array"].tolist() == others.tolist()


def test_nothing_called_clean_holds_a_trigger(tmp_path: Path) -> None:
    split, key = ours(tmp_path / "ours", "wanet")
    done("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", "backdoorbench")
    base = read(tmp_path / "theirs" / "clean")
    marked = key.is_poison | key.is_cover
    assert not base.train.images[marked].any()
    assert (base.train.images[~marked] == split.train.images[~marked]).all()
    assert base.train.labels.tolist() == key.orig_labels.tolist()


@pytest.mark.parametrize("layout", ["backdoor-toolbox", "backdoorbench"])
def test_false_labels_without_a_trigger_are_not_exported_as_poison(
    layout: str, tmp_path: Path
) -> None:
    ours(tmp_path / "ours", "badnets", label_noise=0.2)
    line = refused("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", layout)
    assert "11 rows have a false label and no trigger" in line and "export to npy" in line
    done("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", "npy")


def test_a_set_with_unknown_labels_is_not_exported(tmp_path: Path) -> None:
    source = write_toolbox(tmp_path / "set")
    done("import", source, tmp_path / "ours", "--from", "backdoor-toolbox")
    line = refused("export-corpus", tmp_path / "ours", tmp_path / "theirs", "--to", "npy")
    assert "has no held-out images; import it with --clean" in line


def test_a_corpus_with_another_key_is_not_exported(tmp_path: Path) -> None:
    split, key = ours(tmp_path / "ours", "badnets")
    (tmp_path / "other").mkdir()
    strange = replace(key, paths=("elsewhere", *key.paths[1:]))
    save_poisoned(tmp_path / "other", split, strange)
    line = refused("export-corpus", tmp_path / "other", tmp_path / "theirs", "--to", "npy")
    assert "is not the key to the images beside it" in line


# ------------------------------------------------------------------------------------------- asking


def test_what_cannot_be_imported_as_asked_ends_in_one_line(tmp_path: Path) -> None:
    toolbox, bench = write_toolbox(tmp_path / "set"), write_bench(tmp_path / "run")
    clean, out = write_clean(tmp_path / "clean"), tmp_path / "out"
    flat = tmp_path / "clean" / "train"
    asked: dict[str, tuple[object, ...]] = {
        "did you mean 'backdoorbench'": (bench, out, "--from", "backdoor-bench"),
        "there are backdoor-toolbox, backdoorbench, npy": (bench, out, "--from", "zip"),
        "started from with --clean": (bench, out, "--from", "backdoorbench"),
        "cannot read": (tmp_path / "nowhere", out, "--from", "backdoor-toolbox"),
        "did you mean 'badnets'": (toolbox, out, "--from", "backdoor-toolbox",
                                   "--attack", "badnet"),
        "give them with --clean": (toolbox, out, "--from", "backdoor-toolbox", "--attack", "sig"),
        "leave --attack out": (bench, out, "--from", "backdoorbench", "--clean", clean,
                               "--attack", "sig"),
        "no test part of its own": (bench, out, "--from", "backdoorbench", "--clean", flat),
        "learns its trigger": (toolbox, out, "--from", "backdoor-toolbox", "--clean", clean,
                               "--attack", "input-aware"),
        "give --target, --option source=": (
            toolbox, out, "--from", "backdoor-toolbox", "--clean", clean, "--attack", "tact",
            "--option", "cover_classes=2"),
        "each class into the next; the set's poison does not: its labels are dog": (
            toolbox, out, "--from", "backdoor-toolbox", "--clean", clean,
            "--attack", "badnets-a2a"),
        "name it with --attack": (toolbox, out, "--from", "backdoor-toolbox",
                                  "--option", "alpha=0.3"),
        "are an attack's": (toolbox, out, "--from", "backdoor-toolbox", "--trigger", "x.png"),
        "no folder, .npz or .csv": (toolbox, out, "--from", "backdoor-toolbox", "--clean", "nil"),
    }  # fmt: skip
    for said, words in asked.items():
        assert said in refused("import", *words)


def test_a_clean_set_of_several_sizes_is_refused(tmp_path: Path) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    png("train/cat/3.png", 9)(clean)
    line = refused("import", source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    assert "images are of several sizes" in line


def test_an_earlier_result_is_replaced_only_by_force(tmp_path: Path) -> None:
    source, clean = write_bench(tmp_path / "run"), write_clean(tmp_path / "clean")
    words = (source, tmp_path / "out", "--from", "backdoorbench", "--clean", clean)
    done("import", *words)
    assert "pass --force" in call("import", *words).stderr
    done("import", *words, "--force", "--seed", 1)
    assert load_key(tmp_path / "out" / "key.npz").recipe["seed"] == 1
    export = ("export-corpus", tmp_path / "out", tmp_path / "theirs", "--to", "npy")
    done(*export)
    assert "pass --force" in call(*export).stderr
    done(*export, "--force")
    before = sorted(tmp_path.iterdir())
    above = call("import", source, tmp_path, "--from", "backdoorbench", "--clean", clean, "--force")
    assert above.exit_code == 2 and "choose another place" in above.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_our_corpus_is_not_overwritten_by_its_export(tmp_path: Path) -> None:
    ours(tmp_path / "ours", "badnets")
    result = call("export-corpus", tmp_path / "ours", tmp_path / "ours", "--to", "npy", "--force")
    assert result.exit_code == 2 and "choose another place" in result.stderr
    assert (tmp_path / "ours" / "key.npz").exists()
