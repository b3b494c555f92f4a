"""Corpora in shards: packed and read back, WebDataset, TFRecords, and what must be refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from csc_gpu import cache, data, pack, sources
from csc_gpu.backend import Augment, loader, open_backend
from csc_gpu.cli import cli
from csc_gpu.data import folders, packed, shards
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files, Piece
from csc_gpu.types import Corpus, Split

SETTINGS = data.Settings()
QUICK = ("--cpu", "--threads", "1", "--no-report", "--set", "train.epochs=2",
         "--set", "train.min_steps=1")  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def call(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def image(seed: int, kind: str = "PNG", side: int = 8) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def photos(folder: Path, n_train: int = 12, n_test: int = 6) -> Path:
    """Files of both kinds, with names that lie about it, in two classes."""
    for part, n in (("train", n_train), ("test", n_test)):
        for row in range(n):
            path = folder / part / ("cat", "dog")[row % 2] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(row, ("PNG", "JPEG")[row // 2 % 2]))
    return folder


def tar(path: Path, *members: tuple[str, bytes], how: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=how) as file:
        for name, content in members:
            told = tarfile.TarInfo(name)
            told.size = len(content)
            file.addfile(told, io.BytesIO(content))
    return path


def samples(*labels: object, start: int = 0) -> list[tuple[str, bytes]]:
    """An image and its class, one for each label."""
    found = []
    for key, label in enumerate(labels, start):
        found += [(f"{key:04d}.png", image(key)), (f"{key:04d}.cls", str(label).encode())]
    return found


def opened(source: Path) -> Split:
    return data.open_source(str(source), SETTINGS)


def contents(corpus: Corpus) -> list[bytes | str]:
    return [loader.contents_of(place) for place in corpus.files]


def streamed(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every batch of a shuffled and augmented pass."""
    backend = open_backend("cpu", 1)
    monkeypatch.setattr(type(backend), "free_bytes", lambda self: 100)
    corpus = sources.load(str(source), SETTINGS, backend=backend).train
    assert corpus.pixels is None
    batches = backend.batches(
        corpus,
        5,
        order=np.random.default_rng(1).permutation(len(corpus)),
        augment=Augment(shift=1, flip=True),
        rng=np.random.default_rng(2),
    )
    return [(b.rows.tolist(), b.labels.tolist(), b.images.numpy().tobytes()) for b in batches]


# ------------------------------------------------------------------------------------------ places


def test_places_are_those_of_the_rows_asked_for() -> None:
    pieces = np.array([[0, 5], [7, 2], [1, 1]])
    files = Files(Path("in"), ("a.tar", "b.tar"), np.array([0, 0, 1], np.int32), pieces)
    assert files[1] == Piece(Path("in/a.tar"), 7, 2)
    assert [*files.take(np.array([2, 0]))] == [files[2], files[0]]
    assert [*files[1:]] == [files[1], files[2]]
    assert [*(files[:1] + files)] == [files[0], *files]
    whole = Files.whole(Path("in"), ("x.png", "/abs.png"))
    assert [*(whole + whole[1:])] == [Path("in/x.png"), Path("/abs.png"), Path("/abs.png")]


# -------------------------------------------------------------------------------------------- pack


def test_a_packed_corpus_gives_the_same_rows_bytes_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "packed"
    done = call("pack", source, out, "--shard-size", "8KB")
    assert done.exit_code == 0, done.output
    assert "12 images to train on and 6 to test" in done.output
    assert len(list((out / "train").iterdir())) > 1
    monkeypatch.setattr(shards, "scan_tar", None)  # nothing is looked for
    for one, other in zip(
        (opened(source).train, opened(source).test),
        (opened(out).train, opened(out).test),
        strict=True,
    ):
        assert one.paths == other.paths and one.classes == other.classes
        assert one.labels.tolist() == other.labels.tolist()
        assert one.ids.tolist() == other.ids.tolist()
        assert contents(one) == contents(other)
    assert streamed(out, monkeypatch) == streamed(source, monkeypatch)


def test_packing_tells_how_far_it_is_image_by_image_and_hashing_shard_by_shard(
    tmp_path: Path,
) -> None:
    told: list[tuple[str, int, int]] = []

    def log(event: str, *, done: int, total: int) -> None:
        told.append((event, done, total))

    (tmp_path / "packed").mkdir()
    split = opened(photos(tmp_path / "photos"))
    n_shards = pack.write(tmp_path / "packed", split, 8000, log)
    assert n_shards > 2
    assert told[:18] == [("pack", done, 18) for done in range(1, 19)]
    assert told[18:] == [("hash", done, n_shards) for done in range(n_shards + 1)]


def test_a_run_on_the_shards_names_the_same_suspects(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos", 40, 8), tmp_path / "packed"
    assert call("pack", source, out).exit_code == 0
    for corpus in (source, out):
        done = call("train", corpus, "--out", tmp_path / f"run-{corpus.name}", *QUICK)
        assert done.exit_code == 0, done.output
    runs = [(tmp_path / f"run-{one}" / "suspects.csv").read_bytes() for one in ("photos", "packed")]
    assert runs[0] == runs[1]


def test_arrays_are_packed_without_loss_and_what_is_held_out_stays_so(tmp_path: Path) -> None:
    assert call("pack", "digits", tmp_path / "out", "--shard-size", "1MB").exit_code == 0
    there, back = sources.load("digits", SETTINGS), sources.load(str(tmp_path / "out"), SETTINGS)
    for one, other in ((there.train, back.train), (there.test, back.test)):
        assert (one.images == other.images).all() and one.paths == other.paths
        assert one.ids.tolist() == other.ids.tolist()


def test_shards_are_packed_again_and_are_readable_by_tarfile(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "packed"
    assert call("pack", source, out).exit_code == call("pack", out, tmp_path / "again").exit_code
    wanted, found = out / "train/000000.tar", tmp_path / "again/train/000000.tar"
    assert wanted.read_bytes() == found.read_bytes()
    with tarfile.open(found) as file:
        assert file.getnames()[:2] == ["000000000.png", "000000000.cls"]
    (out / packed.MANIFEST).unlink()  # without it, it is any other folder of shards
    assert contents(opened(out).train) == contents(opened(source).train)
    assert opened(out).train.classes == ("cat", "dog")


def test_a_broken_image_is_not_packed(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "packed"
    (source / "train/cat/4.png").write_bytes(b"text")
    done = call("pack", source, out)
    assert done.exit_code == 2 and "train/cat/4.png (not an image)" in done.output
    assert not out.exists()
    assert call("pack", source, out, "--skip-broken").exit_code == 0
    assert opened(out).train.ids.tolist() == [0, 1, 2, 3, *range(5, 12)]


@pytest.mark.parametrize("name", [b"cat\ndog", b" cat", b"c\xff"])
def test_a_class_that_no_list_of_classes_can_name_is_not_packed(
    tmp_path: Path, name: bytes
) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    for part in ("train", "test"):
        os.rename(source / part / "cat", os.fsencode(source / part) + b"/" + name)
    (source / "train/pig").mkdir()
    (source / "train/pig/1.png").write_bytes(image(1))
    done = call("pack", source, out, "--skip-broken")
    assert done.exit_code == 2 and "cannot stand in classes.txt" in done.output
    assert not out.exists()


def test_a_link_to_itself_is_a_broken_image(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    (source / "train/cat/loop.png").symlink_to("loop.png")
    (source / "train/round").symlink_to("round")
    done = call("pack", source, tmp_path / "out", "--skip-broken")
    assert done.exit_code == 0 and "1 broken ones left out" in done.output


def test_what_is_no_pack_of_ours_is_not_replaced(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    assert call("pack", source, out).exit_code == 0
    assert "--force" in call("pack", source, out).output
    assert call("pack", source, out, "--force").exit_code == 0
    done = call("pack", source, source, "--force")
    assert done.exit_code == 2 and len(opened(source).train) == 12


def no_shard(out: Path) -> None:
    (out / "train/000000.tar").unlink()


def cut(out: Path) -> None:
    os.truncate(out / "train/000000.tar", 1024)


def other_bytes(out: Path) -> None:
    path = out / "train/000000.tar"
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX", 1))


def other_table(out: Path) -> None:
    path = out / packed.ROWS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def told(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        manifest = json.loads((out / packed.MANIFEST).read_text())
        change(manifest)
        (out / packed.MANIFEST).write_text(json.dumps(manifest))

    return edit


def rows(**columns: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the table and have the manifest vouch for it."""

    def edit(out: Path) -> None:
        with np.load(out / packed.ROWS) as archive:
            arrays = dict(archive)
        for name, change in columns.items():
            arrays[name] = change(arrays[name])
        np.savez(out / packed.ROWS, **arrays)
        vouched = packed.described(out, packed.ROWS, len(arrays["row"]))
        told(lambda manifest: manifest.update(table=vouched))(out)

    return edit


def bomb(out: Path) -> None:
    """A gigabyte of names in a megabyte, which nobody should begin to unpack."""
    rows()(out)
    path = out / packed.ROWS
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", bytes(1 << 20))
    vouched = json.loads((out / packed.MANIFEST).read_text())["table"]
    vouched = packed.described(out, packed.ROWS, vouched["rows"])
    told(lambda manifest: manifest.update(table=vouched))(out)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (no_shard, "is missing"),
    "cut": (cut, "has 1024 bytes, not the"),
    "other bytes": (other_bytes, "its hash is not the manifest's"),
    "other table": (other_table, "its hash is not the manifest's"),
    "outside": (told(lambda m: m["shards"][0].update(file="../x.tar")), r"'\.\./x\.tar'"),
    "absolute": (told(lambda m: m["table"].update(file="/etc/passwd")), "'/etc/passwd'"),
    "twice": (told(lambda m: m["shards"].append(m["shards"][0])), "no shard, or one twice"),
    "no classes": (told(lambda m: m.pop("classes")), "damaged"),
    "classes": (told(lambda m: m.update(classes=["a", "a"])), "none twice"),
    "cut manifest": (lambda out: os.truncate(out / packed.MANIFEST, 99), "is damaged"),
    "version": (told(lambda m: m.update(version=9)), "version 9"),
    "negative": (told(lambda m: m["shards"][0].update(rows=-1)), "damaged"),
    "not a list": (told(lambda m: m.update(shards=7)), "damaged"),
    "offset": (rows(offset=lambda a: a + (1 << 40)), "does not fit"),
    "overflow": (rows(offset=lambda a: a + ((1 << 63) - 1 - a.max())), "does not fit"),
    "size": (rows(size=lambda a: -a), "does not fit"),
    "label": (rows(label=lambda a: a + 5), "does not fit"),
    "shard": (rows(shard=lambda a: a + 1), "does not fit"),
    "short": (rows(paths=lambda a: a[:9]), "does not fit"),
    "dtype": (rows(row=lambda a: a.astype(float)), "does not fit"),
    "row twice": (rows(row=lambda a: a * 0), "names a row twice"),
    "many names": (rows(paths=lambda a: np.zeros(1 << 20, np.uint8)), "does not fit"),
    "bomb": (bomb, "does not fit"),
    "pickle": (rows(paths=lambda a: np.array([{}], object)), "nothing pickled"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert call("pack", photos(place / "photos"), place / "packed").exit_code == 0
    return place / "packed"


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_pack_that_is_not_what_it_says_is_refused(
    whole: Path, tmp_path: Path, fault: str
) -> None:
    out = shutil.copytree(whole, tmp_path / "packed")
    opened(out)
    damage, said = HOSTILE[fault]
    damage(out)
    with pytest.raises(CorpusError, match=said) as caught:
        opened(out)
    assert "\n" not in str(caught.value)


def test_a_shard_is_hashed_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest = packed.digest
    monkeypatch.setattr(packed, "digest", lambda path: (hashed.append(path.name), digest(path))[1])
    opened(whole)
    opened(whole)
    assert sorted(hashed) == ["000000.tar", "000000.tar", "rows.npz"]


# -------------------------------------------------------------------------------------- WebDataset


def test_labels_come_from_cls_or_json_and_other_members_are_passed_over(tmp_path: Path) -> None:
    large = json.dumps({"label": 3, "text": "x" * 2000}).encode()
    tar(
        tmp_path / "a.tar",
        ("set/x.seg.png", b"no image of ours"),
        ("set/x.jpg", image(0, "JPEG")),
        ("set/x.json", large),
        ("set/x.txt", b"a caption"),
        ("readme.txt", b"hello"),
        *samples(7, 3),
    )
    tar(tmp_path / "test-a.tar", *samples(3, start=5))
    split = opened(tmp_path)
    assert split.train.paths == ("a.tar/set/x.jpg", "a.tar/0000.png", "a.tar/0001.png")
    assert split.train.classes == ("3", "7") and split.train.labels.tolist() == [0, 1, 0]
    assert contents(split.train) == [image(0, "JPEG"), image(0), image(1)]
    assert contents(split.test) == [image(5)]


@pytest.mark.parametrize("how", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(tmp_path: Path, how: int) -> None:
    long = "é" * 90 + "/" + "b" * 120
    some = [(f"{long}/{name}", content) for name, content in samples(0, 1, 0, 1)]
    tar(tmp_path / "test/1.tar", *samples(0, 1))
    tar(tmp_path / "train/1.tar", *some, how=how)
    split = opened(tmp_path)
    assert split.train.paths[3] == f"train/1.tar/{long}/0003.png"
    assert contents(split.train)[3] == image(3)


def test_a_shard_is_looked_through_once_unless_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []
    scan = shards.scan_tar
    monkeypatch.setattr(shards, "scan_tar", lambda path: (scanned.append(path.name), scan(path))[1])
    for name in ("train-0.tar", "test-0.tar"):
        tar(tmp_path / name, *samples(0, 1))
    first = opened(tmp_path)
    assert contents(opened(tmp_path).train) == contents(first.train)
    assert sorted(scanned) == ["test-0.tar", "train-0.tar"]
    tar(tmp_path / "train-0.tar", *samples(0, 1, 1))
    assert len(opened(tmp_path).train) == 3 and scanned[2:] == ["train-0.tar"]
    for kept in cache.home().iterdir():
        kept.write_bytes(b"PK\3\4 no longer")
    assert len(opened(tmp_path).train) == 3 and len(scanned) == 5


def special(kind: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as file:
            told = tarfile.TarInfo("0.png")
            told.type, told.linkname = kind, "/etc/passwd"
            file.addfile(told)

    return write


def plain(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    return lambda path: void(tar(path, *members))


def void(_: object) -> None: ...


def packed_by(how: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, f"w:{how}") as file:  # type: ignore[call-overload]
            told = tarfile.TarInfo("0.png")
            file.addfile(told)

    return write


def sized(field: bytes) -> Callable[[Path], None]:
    """The first member says that it is so large, in a header whose sum is right."""

    def write(path: Path) -> None:
        content = bytearray(tar(path, *samples(0, 1)).read_bytes())
        content[124:136] = field
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        path.write_bytes(content)

    return write


def cut_tar(path: Path) -> None:
    content = tar(path, *samples(0, 1)).read_bytes()
    path.write_bytes(content[: len(content) // 1024 // 10 * 512])


def damaged(path: Path) -> None:
    content = bytearray(tar(path, *samples(0, 1)).read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def sparse(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        told = tarfile.TarInfo("0.png")
        told.pax_headers = {"GNU.sparse.major": "1"}
        file.addfile(told)


def two_in_one(path: Path) -> None:
    more = tar(path.with_name("more"), *samples(0, 1, start=2))
    path.write_bytes(tar(path, *samples(0, 1)).read_bytes() + more.read_bytes())
    more.unlink()


def long_tail(path: Path) -> None:
    """Zeros without end, which take no room on disk."""
    tar(path, *samples(0, 1))
    os.truncate(path, 1 << 40)


SHARDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "up": (plain(("../0.png", image(0)), ("../0.cls", b"0")), "leads out"),
    "up inside": (plain(("a/../../0.png", image(0))), "leads out"),
    "absolute": (plain(("/etc/0.png", image(0))), "leads out"),
    "newline": (plain(("a\nb.png", image(0))), "leads out"),
    "backslash": (plain(("..\\0.png", image(0))), "leads out"),
    "symlink": (special(tarfile.SYMTYPE), "is a link, a device"),
    "link": (special(tarfile.LNKTYPE), "is a link, a device"),
    "device": (special(tarfile.CHRTYPE), "is a link, a device"),
    "pipe": (special(tarfile.FIFOTYPE), "is a link, a device"),
    "sparse": (sparse, "sparse"),
    "gzip": (packed_by("gz"), "compressed with gzip"),
    "xz": (packed_by("xz"), "compressed with xz"),
    "cut": (cut_tar, "cut short|beyond the file"),
    "damaged": (damaged, "damaged at byte 0"),
    "no tar": (lambda path: void(path.write_bytes(b"text" * 999)), "is no tar"),
    "bomb": (sized(b"77777777777\0"), "ends beyond the file"),
    "huge": (sized(b"\x80" + b"\x7f" * 11), "ends beyond the file"),
    "negative": (sized(b"\xff" * 12), "has no size"),
    "odd size": (sized(b"-0000000001\0"), "has no size"),
    "label alone": (plain(("0.cls", b"0")), "0 images and 1 labels"),
    "no label": (plain(("0.png", image(0))), "1 images and 0 labels"),
    "two images": (plain(*samples(0), ("0000.jpg", image(0, "JPEG"))), "2 images and 1"),
    "two labels": (plain(*samples(0), ("0000.json", b'{"label": 1}')), "1 images and 2"),
    "empty image": (plain(("0.png", b""), ("0.cls", b"0")), "is empty"),
    "same member": (plain(*samples(0), ("0000.png", image(1))), "two members"),
    "same key": (plain(*samples(0, 1), *samples(0)), "two images are called '0000'"),
    "negative label": (plain(*samples(0, -1)), "has the label -1"),
    "huge label": (plain(*samples(0, 10**30)), "has the label -1"),
    "word": (plain(*samples(0, "cat")), "holds no label"),
    "bool": (plain(*samples(0), ("1.png", image(1)), ("1.json", b'{"label": true}')), "no label"),
    "list": (plain(("1.png", image(1)), ("1.json", b"[1]")), "no label"),
    "nothing": (plain(), "holds no images"),
    "two in one": (two_in_one, "goes on at byte .* after the end of a tar; .* a file of its own"),
    "long tail": (long_tail, "goes on at byte"),
}


@pytest.mark.parametrize("fault", SHARDS)
def test_a_hostile_shard_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    folder, (write, said) = tmp_path / "corpus", SHARDS[fault]
    folder.mkdir()
    write(folder / "train-0.tar")
    with pytest.raises(CorpusError, match=said) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["train-0.tar"]


def test_what_hides_images_from_us_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", *samples(0, 1))
    (tmp_path / "classes.txt").write_text("only\n")
    with pytest.raises(CorpusError, match=r"'0001\.png' has the label 1, not 0\.\.0"):
        opened(tmp_path)
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(CorpusError, match="is compressed; unpack"):
        opened(tmp_path)
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.tfrecord")
    with pytest.raises(CorpusError, match="tars and TFRecords"):
        opened(tmp_path)
    (tmp_path / "b.tfrecord").unlink()
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(image(0))
    with pytest.raises(CorpusError, match="shards and a folder of images"):
        opened(tmp_path)


@pytest.mark.parametrize("more", ["more/1.tar", "train/more/deep/1.tar", "dev/1.tar.gz"])
def test_shards_in_folders_that_are_not_read_are_not_passed_over(tmp_path: Path, more: str) -> None:
    tar(tmp_path / "train/0.tar", *samples(0, 1))
    tar(tmp_path / "val/0.tar", *samples(0, 1, start=2))
    tar(tmp_path / ".hidden/0.tar", *samples(0, 1))
    assert len(opened(tmp_path).train) == 2
    tar(tmp_path / more, *samples(0, 1, start=4))
    with pytest.raises(CorpusError, match=f"{more} would be passed over: .* move it there"):
        opened(tmp_path)


# ------------------------------------------------------------------------- what is no file at all


@pytest.fixture
def hasty() -> Iterator[None]:
    """Whoever waits for a pipe that nobody writes to fails, instead of waiting for ever."""

    def late(number: int, frame: object) -> None:
        pytest.fail("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_manifest_that_is_no_file_of_ours_is_refused(
    tmp_path: Path, kind: str, hasty: None
) -> None:
    manifest = photos(tmp_path / "photos") / "manifest.json"
    if kind == "pipe":
        os.mkfifo(manifest)
    elif kind == "device":
        manifest.symlink_to(os.devnull)  # as it might be to one that never ends
    else:
        manifest.touch()
        os.truncate(manifest, (1 << 24) + 1)
    with pytest.raises(CorpusError, match=r"manifest\.json is no file, or of more than \d+ bytes"):
        opened(tmp_path / "photos")
    manifest.unlink()
    manifest.mkdir()
    assert len(opened(tmp_path / "photos").train) == 12


def test_a_pipe_among_the_images_is_a_broken_one(tmp_path: Path, hasty: None) -> None:
    folder = photos(tmp_path / "photos", n_train=24)
    pipe = folder / "train/cat/0.png"
    pipe.unlink()
    os.mkfifo(pipe)
    assert loader.header_sizes([pipe, folder / "train/dog/1.png"]).tolist() == [[0, 0], [8, 8]]
    assert call("plan", folder, "--cpu").exit_code == 0
    done = call("train", folder, "--out", tmp_path / "run", "--max-bad", 1, *QUICK)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "run/summary.json").read_text())
    assert told["broken"] == ["train/cat/0.png: not a regular file"]


def test_a_picture_too_large_is_named_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        told = kind + content
        return struct.pack(">I", len(content)) + told + struct.pack(">I", zlib.crc32(told))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    tar(tmp_path / "c/a.tar", *samples(0, 1, 0, 1), ("9.png", bomb), ("9.cls", b"0"))
    tar(tmp_path / "c/test.tar", *samples(0, 1))
    done = call("train", tmp_path / "c", "--out", tmp_path / "run", *QUICK)
    assert done.exit_code == 2 and "a.tar/9.png (too large" in done.output
    assert not (tmp_path / "run").exists()


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", *samples(*[0, 1] * 9))
    corpus = opened(tmp_path).train
    os.truncate(tmp_path / "train.tar", 4096)
    decoder = open_backend("cpu", 1).decoder
    with pytest.raises(CorpusError, match=r"train\.tar at byte \d+: the shard ends before it"):
        loader.decode(corpus.files[4:], height=8, width=8, decoder=decoder)


# --------------------------------------------------------------------------------------- TFRecords


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    told = b""
    while value >= 0x80:
        told, value = told + bytes([value & 0x7F | 0x80]), value >> 7
    return told + bytes([value])


def feature(name: bytes, value: bytes) -> bytes:
    return field(1, field(1, name) + field(2, value))


def example(content: bytes | None, label: int | None, packed: bool = True) -> bytes:
    features = feature(b"image/class/text", field(1, field(1, b"a cat")))
    features += feature(b"image/object/bbox/xmin", field(2, field(1, b"\0\0\0\0")))
    if label is not None:
        number = field(1, varint(label)) if packed else varint(1 << 3) + varint(label)
        features += feature(b"image/class/label", field(3, number))
    if content is not None:
        features += feature(b"image/encoded", field(1, field(1, content)))
    return field(1, features)


def records(path: Path, *examples: bytes) -> list[tuple[int, int]]:
    """Written with checksums of 0, which nobody looks at; offsets and sizes."""
    told, places = b"", []
    for one in examples:
        start = len(told)
        told += struct.pack("<QI", len(one), 0) + one + bytes(4)
        places.append((start, len(told) - start))
    path.write_bytes(told)
    return places


@pytest.mark.parametrize("index", ["", "train-00000-of-00001.idx"])
def test_records_are_read_with_and_without_an_index(tmp_path: Path, index: str) -> None:
    some = [example(image(row, "JPEG", 64), 5 + row % 2, packed=row > 1) for row in range(4)]
    places = records(tmp_path / "train-00000-of-00001", *some)
    records(tmp_path / "validation-00000-of-00001", example(image(9), 6), example(image(8), 5))
    if index:
        (tmp_path / index).write_text("".join(f"{at} {size}\n" for at, size in places))
    split = opened(tmp_path)
    assert split.train.classes == ("5", "6") and split.train.labels.tolist() == [0, 1, 0, 1]
    assert contents(split.train) == [image(row, "JPEG", 64) for row in range(4)]
    assert split.train.paths[3] == "train-00000-of-00001/3"
    assert contents(split.test) == [image(9), image(8)]


def test_an_index_of_another_file_is_refused(tmp_path: Path) -> None:
    places = records(tmp_path / "a.tfrecord", example(image(0), 0), example(image(1), 1))
    index = tmp_path / "a.idx"
    for told, said in ((f"{places[0][0]} {places[0][1]}\n", "is not the index"), ("x\n", "line 1")):
        index.write_text(told)
        with pytest.raises(CorpusError, match=said):
            opened(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (example(None, 0), "record 0 has no image/encoded"),
        (example(image(0), None), "record 0 has no image/class/label"),
        (example(b"", 0), "empty image"),
        (example(image(0), -1), "has the label -1"),
        (example(image(0), 1 << 40), "has the label -1"),
        (example(image(0), 0) + example(image(0), 0), "two image/class/label"),
        (example(image(0), 0)[:-9], "damaged at byte"),
        (b"\xff" * 30, "damaged at byte"),
        (field(1, b"\x0b\x0b"), "damaged at byte"),
    ],
)
def test_records_that_hold_no_image_and_label_are_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    records(tmp_path / "a.tfrecord", content)
    with pytest.raises(CorpusError, match=said):
        opened(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_list_of_labels_is_refused_at_the_second(tmp_path: Path, packed: bool) -> None:
    one = bytes(1) if packed else varint(1 << 3) + bytes(1)
    labels = one * 200_000
    content = feature(b"image/class/label", field(3, field(1, labels) if packed else labels))
    records(tmp_path / "a.tfrecord", field(1, content))
    tracemalloc.start()
    with pytest.raises(CorpusError, match="damaged at byte"):
        opened(tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * len(content)


@pytest.mark.parametrize("length", [1, 10**6, (1 << 64) - 1])
def test_a_record_that_ends_beyond_its_file_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.tfrecord").write_bytes(struct.pack("<QI", length, 0))
    with pytest.raises(CorpusError, match="damaged at byte 0"):
        opened(tmp_path)


# ----------------------------------------------------------------------------------- at full scale


def test_the_listing_of_a_folder_is_kept_until_a_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "WORTH_KEEPING", 2)
    walked: list[Path] = []
    walk = folders._walked
    monkeypatch.setattr(
        folders, "_walked", lambda folder, names: (walked.append(folder), walk(folder, names))[1]
    )
    source = photos(tmp_path / "photos")

    def age() -> None:
        for folder in (source / "train", source / "test"):
            for path in (*folder.iterdir(), folder):
                os.utime(path, ns=(1, path.stat().st_mtime_ns - 10 * folders.SETTLED))

    assert opened(source).train.paths == opened(source).train.paths
    assert len(walked) == 4, "what has just been written may still change"
    age()
    first, again = opened(source), opened(source)
    assert len(walked) == 6 and first.train.paths == again.train.paths
    assert first.test.labels.tolist() == again.test.labels.tolist()
    (source / "train/dog/new.png").write_bytes(image(0))
    assert "train/dog/new.png" in opened(source).train.paths
    age()
    opened(source)
    for kept in cache.home().glob("listing-*"):
        kept.write_text("[1]")
    assert len(opened(source).train) == 13


def test_the_listing_of_shards_is_small(tmp_path: Path) -> None:
    n = 20_000
    paths = "\0".join(f"train/n{row % 1000:08d}/n{row:016d}.JPEG" for row in range(n))
    os.makedirs(tmp_path / "train")
    (tmp_path / "train/000000.tar").write_bytes(bytes(n))
    (tmp_path / "test").mkdir()
    (tmp_path / "test/000000.tar").write_bytes(bytes(1))
    of = np.repeat([0, 1], [n - 1, 1])
    columns = {
        "shard": of,
        "offset": np.zeros(n, int),
        "size": np.ones(n, int),
        "label": np.arange(n) % 1000,
        "row": np.arange(n),
    }
    np.savez(tmp_path / packed.ROWS, paths=np.frombuffer(paths.encode(), np.uint8), **columns)
    manifest = {
        "format": packed.FORMAT,
        "version": packed.VERSION,
        "classes": [str(label) for label in range(1000)],
        "table": packed.described(tmp_path, packed.ROWS, n),
        "shards": [
            packed.described(tmp_path, "train/000000.tar", n - 1),
            packed.described(tmp_path, "test/000000.tar", 1),
        ],
    }
    (tmp_path / packed.MANIFEST).write_text(json.dumps(manifest))
    tracemalloc.start()
    try:
        split = opened(tmp_path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(split.train) == n - 1
    assert held / n < 230, "bytes a row: 300 MB for 1.28 million"
    assert peak / n < 500
