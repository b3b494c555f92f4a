"""A poisoned corpus on disk: it comes back bit by bit, and only the key tells who is poison."""

from __future__ import annotations

import csv
import json
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from csc_gpu import data
from csc_gpu.answers import load_key, save_poisoned
from csc_gpu.attacks import Plan, poison, ready
from csc_gpu.backend import Decoder, reader
from csc_gpu.errors import CorpusError
from csc_gpu.types import AnswerKey, Corpus, Split


def clean(classes: tuple[str, ...] = ("cat", "dog", "emu"), n: int = 60) -> Split:
    """Half noise, half flat: pixels that compress badly and well."""

    def part(name: str, n: int, seed: int) -> Corpus:
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 8, 7, 3), np.uint8)
        pixels[::2] = pixels[::2, :1, :1]
        labels = np.arange(n) % 3
        paths = tuple(f"{name}/{row}" for row in range(n))
        return Corpus(labels, classes, np.arange(n), paths, pixels)

    return Split(part("train", n, 0), part("test", n // 2, 1))


def poisoned(attack: str = "badnets", source: Split | None = None) -> tuple[Split, AnswerKey]:
    source = source or clean()
    return poison(source, ready(source, Plan(attack=attack, target="0", rate=0.1)))


def read(folder: Path) -> Split:
    settings = data.Settings()
    split = data.open_source(str(folder), settings)
    on_the_host = Decoder(torch.device("cpu"), 2)
    return reader.read(split, settings, decoder=on_the_host, room=lambda: None)


# -------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("attack", ["badnets", "blend", "sig", "none"])
def test_a_poisoned_corpus_comes_back_bit_by_bit(attack: str, tmp_path: Path) -> None:
    split, key = poisoned(attack)
    save_poisoned(tmp_path, split, key)
    back = read(tmp_path)
    for part, wanted in ((back.train, split.train), (back.test, split.test)):
        assert (part.images == wanted.images).all()
        assert part.labels.tolist() == wanted.labels.tolist()
        assert part.ids.tolist() == wanted.ids.tolist()
        assert part.paths == wanted.paths
        assert part.classes == wanted.classes


def test_row_i_is_the_file_numbered_i(tmp_path: Path) -> None:
    split, key = poisoned(source=clean(n=150))
    save_poisoned(tmp_path, split, key)
    for row, path in enumerate(read(tmp_path).train.paths):
        assert int(Path(path).stem) == row


@pytest.mark.parametrize("attack", ["badnets", "none"])
def test_the_key_comes_back(attack: str, tmp_path: Path) -> None:
    split, key = poisoned(attack)
    save_poisoned(tmp_path, split, key)
    back = load_key(tmp_path / "key.npz")
    kept = ("is_poison", "is_cover", "orig_labels", "given_labels", "test", "test_labels")
    for name in (*kept, "triggered"):
        assert getattr(back, name).dtype == getattr(key, name).dtype
        assert np.array_equal(getattr(back, name), getattr(key, name))
    assert back.attack_labels.tolist() == key.attack_labels.tolist()
    assert back.paths == key.paths == split.train.paths
    assert back.recipe == key.recipe
    assert json.loads((tmp_path / "recipe.json").read_text()) == key.recipe


def test_people_can_read_the_key_to_the_rows(tmp_path: Path) -> None:
    split, key = poisoned()
    key = replace(key, orig_labels=np.where(key.is_poison, -1, key.orig_labels))
    save_poisoned(tmp_path, split, key)
    with (tmp_path / "truth.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert [line["path"] for line in told] == list(key.paths)
    assert [line["is_poison"] == "True" for line in told] == key.is_poison.tolist()
    assert {line["is_cover"] for line in told} == {"False"}
    names = split.train.classes
    assert [line["label"] for line in told] == [names[label] for label in key.given_labels]
    known = [names[y] if y >= 0 else "" for y in key.orig_labels]
    assert [line["orig_label"] for line in told] == known
    assert "" in known


def test_the_key_knows_the_rows_of_the_corpus_it_lies_beside(tmp_path: Path) -> None:
    source = clean()
    split, key = poisoned(source=source)
    save_poisoned(tmp_path, split, key)
    back, key = read(tmp_path), load_key(tmp_path / "key.npz")
    assert back.train.paths == key.paths
    assert (back.train.labels != key.orig_labels).tolist() == key.is_poison.tolist()
    untouched = {image.tobytes() for image in source.train.images}
    known = [image.tobytes() in untouched for image in back.train.images]
    assert known == (~key.is_poison).tolist()
    assert (back.test.images == key.test).all()


def test_an_absent_class_keeps_its_place(tmp_path: Path) -> None:
    source = clean(("cat", "yak", "ape"))
    rows = np.flatnonzero(source.train.labels != 1)
    source = Split(source.train.take(rows), source.test)
    split, key = poisoned(source=source)
    save_poisoned(tmp_path, split, key)
    assert read(tmp_path).train.classes == ("cat", "yak", "ape")
    assert read(tmp_path).train.labels.tolist() == split.train.labels.tolist()


def test_progress_counts_every_image(tmp_path: Path) -> None:
    seen = []
    save_poisoned(tmp_path, *poisoned(), log=lambda event, **at: seen.append((event, at)))
    assert seen[-1] == ("write", {"done": 90, "total": 90})


# ------------------------------------------------------------------------------------- tell-tales


@pytest.mark.parametrize("attack", ["badnets", "blend"])
def test_a_file_does_not_tell_that_it_is_poison(attack: str, tmp_path: Path) -> None:
    split, key = poisoned(attack)
    save_poisoned(tmp_path, split, key)
    assert 0 < key.is_poison.sum() < len(key.is_poison)
    traits = set()
    for row, path in enumerate(split.train.paths):
        about = (tmp_path / path).stat()
        kind = stat.filemode(about.st_mode)
        traits.add((about.st_size, about.st_mtime_ns, kind, about.st_uid, about.st_nlink))
        label = split.train.classes[split.train.labels[row]]
        assert path == f"train/{label}/{row:02d}.png"
    assert len(traits) == 1


def test_the_encoding_of_a_file_does_not_tell_that_it_is_poison(tmp_path: Path) -> None:
    split, key = poisoned()
    save_poisoned(tmp_path, split, key)
    heads = {(tmp_path / path).read_bytes()[:41] for path in split.train.paths}
    assert len(heads) == 1  # signature, size, colour, and the head of the only pixel chunk


def test_nothing_but_the_key_holds_the_answers(tmp_path: Path) -> None:
    save_poisoned(tmp_path, *poisoned())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train", "test", "classes.txt", "key.npz", "truth.csv", "recipe.json"}
    assert (tmp_path / "classes.txt").read_text() == "cat\ndog\nemu\n"


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["a/b", ".hidden", "..", "", " cat", "cat\n", "a\0b"])
def test_a_class_that_cannot_be_a_folder_is_refused_before_writing(
    name: str, tmp_path: Path
) -> None:
    split, key = poisoned(source=clean((name, "dog", "emu")))
    with pytest.raises(CorpusError, match=r"class .* cannot be written as a folder") as caught:
        save_poisoned(tmp_path, split, key)
    assert repr(name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def changed_key(folder: Path, **changes: object) -> Path:
    """A saved key with some arrays replaced, or left out if None."""
    save_poisoned(folder, *poisoned())
    with np.load(folder / "key.npz") as file:
        content = dict(file) | changes
    kept = {name: array for name, array in content.items() if array is not None}
    np.savez(folder / "key.npz", **kept)
    return folder / "key.npz"


def test_arrays_that_a_key_need_not_have_are_ignored(tmp_path: Path) -> None:
    pickled = np.array([{"never": "loaded"}], object)
    assert load_key(changed_key(tmp_path, note=pickled)).is_poison.sum() == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_cover": None}, r"key\.npz has no array is_cover$"),
        ({"test": None, "recipe": None}, r"key\.npz has no array test, recipe$"),
        ({"is_poison": np.zeros(7, bool)}, "different lengths: is_poison 7, is_cover 60, "),
        ({"is_cover": np.array(True)}, "different lengths: is_poison 60, is_cover 0, "),
        ({"paths": np.array(["a"])}, "different lengths: .* paths 1$"),
        ({"test_labels": np.zeros(3, int)}, "different lengths: test 30, test_labels 3, "),
        ({"triggered": np.zeros((4, 8, 7, 3), np.uint8)}, "triggered 4, attack_labels >= 0 30$"),
        ({"recipe": np.array("{")}, "recipe is not JSON"),
        ({"test": np.array([None])}, r"key\.npz is no \.npz of plain arrays"),
    ],
)
def test_a_key_that_does_not_fit_is_named(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=said):
        load_key(changed_key(tmp_path, **changes))


def test_what_is_no_key_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "key.npz"
    with pytest.raises(CorpusError, match=r"cannot read .*key\.npz: No such file"):
        load_key(path)
    path.write_text("suspects")
    with pytest.raises(CorpusError, match=r"key\.npz is no \.npz of plain arrays"):
        load_key(path)


def test_masks_written_as_numbers_are_masks(tmp_path: Path) -> None:
    split, key = poisoned()
    save_poisoned(tmp_path, split, replace(key, is_poison=key.is_poison.astype(np.uint8)))
    back = load_key(tmp_path / "key.npz").is_poison
    assert back.dtype == bool
    assert (back == key.is_poison).all()
