"""What a corpus is: every source gives rows in a known order, or says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csc_gpu import data
from csc_gpu.data.holdout import held_out
from csc_gpu.data.order import class_order, natural
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.types import Corpus, Split

DEFAULT = data.Settings()
PARTS = ("train", "test")
HELD_OUT = [5, 8, 12, 19]  # of twenty rows of two classes by turns, with the default settings


def opened(source: object) -> Split:
    return data.open_source(str(source), DEFAULT)


def touch(folder: Path, paths: Iterable[str]) -> Path:
    """Empty files: a corpus is listed without reading one."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def many(*classes: str, n: int = 5) -> list[str]:
    return [f"{name}/{row}.png" for name in classes for row in range(n)]


def arrays(path: Path, **changes: object) -> Path:
    """Four train and two test images of two classes, 3 and 7, as an .npz, with some replaced."""
    content: dict[str, Any] = {
        "x_train": np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3),
        "y_train": np.array([7, 3, 3, 7]),
        "x_test": np.full((2, 2, 3), 9, np.uint8),
        "y_test": np.array([3, 7], np.uint8),
    } | changes
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def manifest(folder: Path, text: str) -> Path:
    """A CSV beside the images a.png .. f.png."""
    touch(folder, (f"{name}.png" for name in "abcdef"))
    path = folder / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


# ----------------------------------------------------------------------------- what a source is


@pytest.mark.parametrize("source", ["nowhere", "cifar10", "notes.txt", "list.json"])
def test_what_is_no_source_is_said_with_the_sources_that_there_are(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(touch(tmp_path, ["notes.txt"]))
    said = rf"no folder, \.npz or \.csv at '{source}' \(the embedded set is called 'digits'\)"
    with pytest.raises(CorpusError, match=said):
        opened(source)


def test_a_folder_named_digits_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, [f"digits/{path}" for path in many("cat", "dog")])
    monkeypatch.chdir(tmp_path)
    assert opened("digits").train.classes == ("cat", "dog")


def test_an_unreadable_source_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "open_folder", refuse)
    with pytest.raises(CorpusError, match=r"cannot read .*Permission denied"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", -1), ("holdout", 0.0), ("holdout", 1.0), ("holdout_seed", -1)],
)
def test_settings_out_of_range_are_named_as_typed(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.{name} must be .*, got {value}"):
        data.Settings(**{name: value})


def test_what_does_not_fit_together_is_no_corpus() -> None:
    def corpus(labels: list[int], n_pixels: int, side: int = 2) -> Corpus:
        pixels = np.zeros((n_pixels, side, side, 3), np.uint8)
        rows = np.arange(len(labels))
        return Corpus(np.array(labels, np.int64), ("a", "b"), rows, ("",) * len(rows), pixels)

    good = corpus([0, 1], 2)
    assert data.checked(Split(good, good), "x").train is good
    for bad, said in [
        (Split(good, corpus([0, 2], 2)), r"x: test labels must be 0\.\.1"),
        (Split(corpus([0, 1], 3), good), "x: the train part has more images than labels"),
        (Split(good, corpus([0], 1, side=4)), r"x: train images are \(2, 2, 3\) but test images"),
        (Split(corpus([1, 1], 2), good), "x: only one class, 'b', has images to train on"),
        (Split(good, corpus([], 0)), "x: no images to test on"),
    ]:
        with pytest.raises(CorpusError, match=said):
            data.checked(bad, "x")


# ------------------------------------------------------------------------------------- holding out


def test_a_share_of_every_class_is_held_out() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 100])
    is_test = held_out(labels, 0.2, 0)
    assert np.bincount(labels[is_test]).tolist() == [2, 4, 20]


def test_every_class_keeps_a_row_to_train_on() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    is_test = held_out(labels, 0.99, 0)
    assert np.bincount(labels[~is_test]).tolist() == [1, 1, 1]


def test_the_same_seed_holds_out_the_same_rows_on_every_machine() -> None:
    labels = np.arange(20) % 2
    # written down once, so that another platform or numpy must agree
    assert np.flatnonzero(held_out(labels, 0.2, 0)).tolist() == HELD_OUT
    assert held_out(labels, 0.2, 1).tolist() != held_out(labels, 0.2, 0).tolist()


def test_rows_keep_their_order_and_number_when_some_are_held_out(tmp_path: Path) -> None:
    split = opened(touch(tmp_path, many("cat", "dog", n=10)))
    assert (len(split.train), len(split.test)) == (16, 4)
    both = np.concatenate([split.train.ids, split.test.ids])
    assert sorted(both.tolist()) == list(range(20))
    for part in (split.train, split.test):
        assert (np.diff(part.ids) > 0).all()
        for row_id, path in zip(part.ids, part.paths, strict=True):
            assert path == f"{('cat', 'dog')[row_id % 2]}/{row_id // 2}.png"


def test_too_few_rows_to_hold_out_is_said_with_the_setting(tmp_path: Path) -> None:
    touch(tmp_path, many("cat", "dog", n=2))
    with pytest.raises(CorpusError, match=r"no images to test on.*data\.holdout"):
        opened(tmp_path)
    split = data.open_source(str(tmp_path), data.Settings(holdout=0.5))
    assert (len(split.train), len(split.test)) == (2, 2)


# ------------------------------------------------------------------------------------------ digits


def test_digits_are_grey_rgb_of_the_full_range() -> None:
    split = opened("digits")
    images = split.train.images
    assert images.shape[1:] == (8, 8, 3)
    assert (images[..., :1] == images).all()
    assert (images.min(), images.max()) == (0, 255)
    assert set(np.unique(images)) == {round(grey * 255 / 16) for grey in range(17)}
    assert (len(split.train) + len(split.test), split.train.n_classes) == (1797, 10)
    assert split.test.paths[0] == f"digits/{split.test.ids[0]:04d}"


def test_a_fifth_of_each_digit_is_held_out() -> None:
    split = opened("digits")
    train, test = np.bincount(split.train.labels), np.bincount(split.test.labels)
    assert test.tolist() == [round(0.2 * n) for n in (train + test)]


# ------------------------------------------------------------------------------------------ arrays


def test_arrays_become_rgb_with_labels_by_sorted_value(tmp_path: Path) -> None:
    split = opened(arrays(tmp_path / "x.npz"))
    assert split.train.classes == split.test.classes == ("3", "7")
    assert split.train.labels.tolist() == [1, 0, 0, 1]
    assert split.test.labels.tolist() == [0, 1]
    assert split.train.images.shape == (4, 2, 3, 3)
    assert split.train.images[1, 0, 2].tolist() == [8, 8, 8]
    assert split.train.paths[2] == "x.npz#train/2"
    assert split.test.paths[1] == "x.npz#test/1"


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_may_have_channels(channels: int, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 3, channels), np.uint8)
    split = opened(arrays(tmp_path / "x.npz", x_train=images[:4], x_test=images[4:]))
    assert (split.train.images == images[:4]).all()
    assert (split.test.images == images[4:]).all()


def test_arrays_that_unpack_to_more_than_is_free_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images = tmp_path / "bomb.npz", np.zeros((100, 64, 64, 3), np.uint8)
    np.savez_compressed(path, x_train=images, y_train=np.arange(100) % 2, unused=images)
    assert path.stat().st_size < 20_000
    needed = images.nbytes + 800 + 2 * 128  # and what is before the numbers
    monkeypatch.setattr("csc_gpu.data.arrays.free_memory", lambda: needed)
    assert len(opened(path).train) == 80
    monkeypatch.setattr("csc_gpu.data.arrays.free_memory", lambda: needed - 1)
    with pytest.raises(CorpusError, match=r"bomb\.npz unpacks to 0\.0 GB and 0\.0 GB .* are free"):
        opened(path)
    monkeypatch.setattr("csc_gpu.data.arrays.free_memory", lambda: None)
    assert len(opened(path).train) == 80


def test_a_class_seen_in_test_alone_has_a_label_too(tmp_path: Path) -> None:
    split = opened(arrays(tmp_path / "x.npz", y_test=np.array([5, 7])))
    assert split.train.classes == ("3", "5", "7")
    assert split.train.labels.tolist() == [2, 0, 0, 2]


def test_arrays_without_a_test_part_are_held_out(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "x_train": np.zeros((20, 4, 4), np.uint8),
        "y_train": np.arange(20) % 2,
    }
    np.savez(tmp_path / "x.npz", **content)
    split = opened(tmp_path / "x.npz")
    assert (len(split.train), len(split.test)) == (16, 4)
    assert split.test.ids.tolist() == HELD_OUT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_train": np.array([3, 7])}, r"x\.npz: 4 images in x_train but 2 labels in y_train"),
        ({"y_test": np.array([3])}, r"x\.npz: 2 images in x_test but 1 labels in y_test"),
        ({"x_train": None}, r"x\.npz has no array x_train$"),
        ({"x_train": None, "y_train": None}, r"has no array x_train, y_train$"),
        ({"y_test": None}, "has no array y_test$"),
        ({"x_train": np.zeros((4, 2, 3))}, "x_train must be uint8, 0..255, but is float64"),
        ({"x_train": np.zeros((4, 6), np.uint8)}, r"x_train must be \(N, H, W\).* is \(4, 6\)"),
        ({"x_test": np.zeros((2, 2, 3, 4), np.uint8)}, r"x_test must be .* is \(2, 2, 3, 4\)"),
        ({"y_train": np.zeros(4)}, r"y_train must be \(N,\) whole numbers, but is \(4,\) float64"),
        ({"y_train": np.zeros((4, 1), int)}, r"y_train must be .* is \(4, 1\) int64"),
        ({"y_train": np.zeros(4, int)}, "only one class, '0', has images to train on"),
        ({"x_test": np.zeros((2, 9, 9), np.uint8)}, r"\(2, 3, 3\) but test images are \(9, 9, 3\)"),
        ({"y_train": np.array([1, 2, 3, None])}, r"x\.npz is no \.npz of plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=said):
        opened(arrays(tmp_path / "x.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4 cut off", b"\x80\4N."])
def test_a_file_that_is_no_npz_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"x\.npz is no \.npz of plain arrays") as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_or_bare_array_file_is_one_line(tmp_path: Path) -> None:
    path = arrays(tmp_path / "x.npz")
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"is no \.npz"):
        opened(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(CorpusError, match=r"is no \.npz"):
        opened(path)


# ----------------------------------------------------------------------------------------- folders


def test_train_and_test_folders_are_the_two_parts(tmp_path: Path) -> None:
    touch(tmp_path, ["train/cat/1.png", "train/dog/2.JPG", "test/dog/1.jpeg", "test/cat/5.Png"])
    split = opened(tmp_path)
    assert split.train.paths == ("train/cat/1.png", "train/dog/2.JPG")
    assert split.test.paths == ("test/dog/1.jpeg", "test/cat/5.Png")
    assert [*split.train.files] == [tmp_path / "train/cat/1.png", tmp_path / "train/dog/2.JPG"]
    assert split.train.labels.tolist() == [0, 1]
    assert split.test.labels.tolist() == [1, 0]


def test_a_train_folder_alone_is_held_out_from(tmp_path: Path) -> None:
    touch(tmp_path, [f"train/{path}" for path in many("cat", "dog")])
    split = opened(tmp_path)
    assert (len(split.train), len(split.test)) == (8, 2)
    assert all(path.startswith("train/") for path in split.test.paths)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    split = opened(touch(tmp_path, many("plane", "train")))
    assert split.train.classes == ("plane", "train")


def test_rows_go_by_file_name_then_class_in_natural_order(tmp_path: Path) -> None:
    names = ["a10/10.png", "a9/10.png", "a9/9.png", "a10/2.png", "a9/02.png", "a10/x.png"]
    split = opened(touch(tmp_path, [f"{part}/{name}" for name in names for part in PARTS]))
    wanted = ["a9/02.png", "a10/2.png", "a9/9.png", "a9/10.png", "a10/10.png", "a10/x.png"]
    assert split.train.paths == tuple(f"train/{name}" for name in wanted)
    assert split.train.ids.tolist() == list(range(6))


def test_row_i_is_the_file_numbered_i(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    touch(tmp_path, [f"{part}/{label}/{i}.png" for i, label in enumerate(labels) for part in PARTS])
    train = opened(tmp_path).train
    assert train.labels.tolist() == labels.tolist()
    assert [int(Path(path).stem) for path in train.paths] == train.ids.tolist() == list(range(120))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["10", "9", "1"], ("1", "9", "10")),
        (["n10", "n9"], ("n10", "n9")),
        (["10", "9", "x"], ("10", "9", "x")),
    ],
)
def test_classes_are_sorted_as_numbers_if_all_are(
    names: list[str], wanted: tuple[str, ...], tmp_path: Path
) -> None:
    assert class_order(names) == wanted
    assert opened(touch(tmp_path, many(*names))).train.classes == wanted


def test_natural_order_is_total() -> None:
    names = ["a1", "a01", "1a", "", "a", "a1b2", "a1b10", "10", "9"]
    assert sorted(names, key=natural) == sorted(names[::-1], key=natural)
    assert sorted(["x10", "x9", "x009"], key=natural) == ["x009", "x9", "x10"]


def test_classes_txt_gives_names_and_order(tmp_path: Path) -> None:
    touch(tmp_path, many("dog", "cat"))
    (tmp_path / "classes.txt").write_text("\ufeffemu\r\ndog\r\ncat\r\n\r\n", encoding="utf-8")
    split = opened(tmp_path)
    assert split.train.classes == ("emu", "dog", "cat")
    assert set(split.train.labels) == {1, 2}
    assert split.train.labels[split.train.paths.index("cat/1.png")] == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"dog\n", r"classes\.txt does not name the class folder 'cat'; add it there"),
        (b"dog\ncat\ndog\n", r"classes\.txt names a class twice"),
        (b"\xff\xfe\n", r"classes\.txt is not UTF-8"),
    ],
)
def test_a_wrong_classes_txt_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    touch(tmp_path, many("dog", "cat"))
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=said):
        opened(tmp_path)


def test_what_is_no_image_is_not_listed(tmp_path: Path) -> None:
    extra = ["cat/notes.txt", "cat/.hidden.png", ".git/a.png", "notes/a.txt", "cat/sub/a.png"]
    split = opened(touch(tmp_path, [*many("cat", "dog"), *extra, "key.npz", "cat/x.png/y"]))
    assert len(split.train) + len(split.test) == 10
    assert split.train.classes == ("cat", "dog")


def test_links_are_followed_and_a_link_to_nowhere_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, ["real.png", *(f"{part}/dog/1.png" for part in PARTS)])
    (tmp_path / "train/cat").mkdir()
    (tmp_path / "train/cat/2.png").symlink_to(tmp_path / "real.png")
    (tmp_path / "train/cat/3.png").symlink_to(tmp_path / "gone.png")
    assert opened(tmp_path).train.paths[1:] == ("train/cat/2.png", "train/cat/3.png")


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([], "no images in class folders; put every .jpg, .jpeg or .png into a folder named after"),
        (["a.png", "b.png"], "images lie directly in it; put every"),
        (["cat/notes.txt", "dog/a.gif"], "no images in class folders"),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], "test: images lie directly in it"),
        (many("cat"), "only one class, 'cat', has images to train on; add another"),
        (["train/cat/1.png", "test/dog/1.png"], "only one class, 'cat', has images to train on"),
    ],
)
def test_a_folder_without_classes_says_what_to_do(
    paths: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=said) as caught:
        opened(touch(tmp_path, paths))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------- manifests


def test_a_manifest_keeps_the_order_of_its_lines(tmp_path: Path) -> None:
    rows = "path, label, split\nc.png,10,train\na.png, 9,test\nb.png,9,train\n\nd.png,10,test\n"
    split = opened(manifest(tmp_path, "\ufeff" + rows))
    assert split.train.classes == ("9", "10")
    assert split.train.paths == ("c.png", "b.png")
    assert split.train.labels.tolist() == [1, 0]
    assert split.test.ids.tolist() == [0, 1]
    assert [*split.test.files] == [tmp_path / "a.png", tmp_path / "d.png"]


def test_a_manifest_may_name_absolute_paths_and_lack_a_split(tmp_path: Path) -> None:
    lines = [f"{tmp_path / name}.png,{'xy'[row % 2]}" for row, name in enumerate("abcdef")]
    path = manifest(tmp_path, "\n".join(["path,label", *lines]))
    split = data.open_source(str(path), data.Settings(holdout=0.34))
    assert (len(split.train), len(split.test)) == (4, 2)
    assert all(file.is_file() for file in split.train.files)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: no column path and label; the header must be path,label"),
        ("path,class\na.png,x\n", "line 1: no column label"),
        ("a.png,x\nb.png,y\n", "line 1: no column path and label"),
        ("path,label\n", "names no images: line 2 must hold a path and a label"),
        ("path,label\na.png,x\nnone.png,y\n", "line 3: there is no file 'none.png'"),
        ("path,label\na.png,x\nb.png\n", "line 3: no label"),
        ("path,label\n,x\n", "line 2: no path"),
        ("path,label,split\na.png,x,val\n", "line 2: split must be train or test, got 'val'"),
        ("path,label,split\na.png,x\n", "line 2: split must be train or test, got ''"),
        ("path,label,split\na.png,x,train\nb.png,y,train\n", "no images to test on"),
        ("path,label,split\na.png,x,test\nb.png,y,test\n", "no images to train on"),
        ("path,label,split\na.png,x,train\nb.png,x,test\n", "only one class, 'x'"),
    ],
)
def test_a_wrong_manifest_is_said_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=said) as caught:
        opened(manifest(tmp_path, text))
    assert "list.csv" in str(caught.value)


def test_a_manifest_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    path = manifest(tmp_path, "")
    path.write_bytes("path,label\na.png,Käse\n".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"list\.csv is not a CSV in UTF-8"):
        opened(path)
