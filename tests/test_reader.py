"""Reading a corpus into memory: one size, nothing broken, nothing missed, no row renumbered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import data, memory
from csc_gpu.backend import Decoder, loader, reader
from csc_gpu.errors import CorpusError
from csc_gpu.types import Split

Pixels = NDArray[np.uint8]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def world(folder: Path, height: int = 6, width: int = 5) -> Path:
    """Rows 0..5 to train on, classes a and b by turns, and two to test on."""
    for part, n in (("train", 6), ("test", 2)):
        for row in range(n):
            save(folder / part / "ab"[row % 2] / f"{row}.png", noise(height, width, row))
    return folder


def read(source: Path, size: int = 0, room: int | None = None, **how: Any) -> Split:
    settings, decoder = data.Settings(size=size), Decoder(torch.device("cpu"), threads=2)
    split = data.open_source(str(source), settings)
    return reader.read(split, settings, decoder=decoder, room=lambda: room, **how)


def test_every_row_has_the_pixels_of_its_file(tmp_path: Path) -> None:
    split = read(world(tmp_path))
    for part in (split.train, split.test):
        wanted = [noise(6, 5, row) for row in range(len(part))]
        assert (part.images == np.stack(wanted)).all()
        assert not part.files


def test_one_common_size_is_kept_even_if_not_square(tmp_path: Path) -> None:
    assert read(world(tmp_path, 7, 224)).train.images.shape == (6, 7, 224, 3)


def test_the_size_asked_for_is_the_side_of_a_square(tmp_path: Path) -> None:
    split = read(world(tmp_path), size=4)
    assert split.train.images.shape == (6, 4, 4, 3)
    assert split.test.images.shape == (2, 4, 4, 3)


def test_different_sizes_become_the_median_side_of_the_training_images(tmp_path: Path) -> None:
    world(tmp_path, 8, 8)
    save(tmp_path / "train/a/0.png", noise(6, 30))
    save(tmp_path / "test/a/0.png", noise(90, 90))
    split = read(tmp_path)
    assert split.train.images.shape[1:3] == split.test.images.shape[1:3] == (8, 8)


def test_large_images_shrink_to_224(tmp_path: Path) -> None:
    assert read(world(tmp_path, 10, 600)).train.images.shape[1:3] == (224, 224)


def test_the_training_images_alone_decide_the_size(tmp_path: Path) -> None:
    world(tmp_path, 6, 5)
    for row, name in enumerate("ab"):
        save(tmp_path / "test" / name / f"{row}.png", noise(9, 9))
    assert read(tmp_path).test.images.shape == (2, 6, 5, 3)


def test_progress_counts_the_files_of_both_parts(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[object, object]]] = {"check": [], "decode": []}

    def log(event: str, **fields: object) -> None:
        seen[event].append((fields["done"], fields["total"]))

    read(world(tmp_path), log=log)
    assert seen["check"][-1] == seen["decode"][-1] == (8, 8)


# ------------------------------------------------------------------------------------------ broken


def broken_world(folder: Path, *broken: str) -> Path:
    world(folder)
    for path in broken:
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: len(content) // 2])
    return folder


def test_broken_files_are_named_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    broken_world(tmp_path, "train/a/2.png", "test/b/1.png")
    said = (
        r"^2 of 8 images do not decode: train/a/2\.png \(truncated PNG\), "
        r"test/b/1\.png \(truncated PNG\); .* or pass --skip-broken to leave them out$"
    )
    with pytest.raises(CorpusError, match=said):
        read(tmp_path)


def test_many_broken_files_are_counted(tmp_path: Path) -> None:
    broken_world(tmp_path, *(f"train/{'ab'[row % 2]}/{row}.png" for row in range(5)))
    with pytest.raises(CorpusError, match=r"^5 of 8 .* train/a/2\.png \(.*\) and 2 more;"):
        read(tmp_path)


def test_broken_files_are_left_out_on_request_and_the_others_keep_their_numbers(
    tmp_path: Path,
) -> None:
    broken_world(tmp_path, "train/a/2.png", "test/b/1.png")
    split = read(tmp_path, skip_broken=True)
    assert split.broken == ("train/a/2.png: truncated PNG", "test/b/1.png: truncated PNG")
    assert split.train.ids.tolist() == [0, 1, 3, 4, 5]
    assert split.test.ids.tolist() == [0]
    assert (split.train.images[2] == noise(6, 5, 3)).all()


def test_enough_must_be_left(tmp_path: Path) -> None:
    broken_world(tmp_path, *(f"train/b/{row}.png" for row in (1, 3, 5)))
    with pytest.raises(CorpusError, match="without the broken files: only one class, 'a'"):
        read(tmp_path, skip_broken=True)
    broken_world(tmp_path, "test/a/0.png", "test/b/1.png")
    with pytest.raises(CorpusError, match="without the broken files: no images to test on"):
        read(tmp_path, skip_broken=True)


def test_a_whole_corpus_has_nothing_left_out(tmp_path: Path) -> None:
    assert read(world(tmp_path), skip_broken=True).broken == ()


def test_sound_files_are_remembered_where_the_caller_says(tmp_path: Path) -> None:
    read(world(tmp_path / "corpus"), cache=tmp_path / "checked.json")
    assert (tmp_path / "checked.json").exists()
    assert len(list((tmp_path / "corpus").iterdir())) == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_headers_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    looked: list[int] = []
    sizes = loader.header_sizes

    def note(places: Any, **how: Any) -> Any:
        looked.append(len(places))
        return sizes(places, **how)

    for module in (loader, reader):
        monkeypatch.setattr(module, "header_sizes", note)
    split = read(world(tmp_path), room=100 if streamed else None, may_stream=True)
    assert bool(split.train.files) == streamed
    assert looked == [8]


# ---------------------------------------------------------------------------------- memory, arrays


def test_pixels_that_do_not_fit_are_refused_with_a_size_that_does(tmp_path: Path) -> None:
    corpus = world(tmp_path / "corpus")
    said = r"need 720 bytes at 6x5, more than 50% of the 1024 bytes .* --set data\.size=4 "
    with pytest.raises(CorpusError, match=said):
        read(corpus, room=1024)
    assert read(corpus, size=4, room=1024).train.images.shape[1:3] == (4, 4)


def test_where_free_memory_is_unknown_nothing_is_refused(tmp_path: Path) -> None:
    assert len(read(world(tmp_path), room=None).train.images) == 6


def test_this_machine_has_free_memory() -> None:
    free = memory.free_memory()
    assert free is None or free > 2**20


def test_free_memory_is_what_linux_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 2 kB\n")
    assert memory.free_memory() == 2048


def test_files_that_may_be_streamed_stay_on_disk_if_their_pixels_do_not_fit(
    tmp_path: Path,
) -> None:
    told: list[tuple[str, dict[str, object]]] = []

    def log(event: str, **fields: object) -> None:
        told.append((event, fields))

    broken_world(tmp_path, "train/a/2.png")
    n_bytes = 3 * 6 * 5 * 7
    split = read(tmp_path, room=2 * n_bytes - 1, may_stream=True, skip_broken=True, log=log)
    for part, n in ((split.train, 5), (split.test, 2)):
        assert part.pixels is None and len(part.files) == len(part) == n
        assert part.read_at == part.image_size == (6, 5)
    assert [fields for event, fields in told if event == "stream"] == [
        {"bytes": n_bytes, "room": 2 * n_bytes - 1}
    ]
    assert "decode" not in dict(told)


def test_pixels_that_fit_are_resident_even_if_they_may_be_streamed(tmp_path: Path) -> None:
    split = read(world(tmp_path), room=2 * 720, may_stream=True)
    assert split.train.images.shape == (6, 6, 5, 3) and split.train.read_at is None


def test_arrays_are_never_streamed(tmp_path: Path) -> None:
    path = array_corpus(tmp_path / "x.npz", 9)
    with pytest.raises(CorpusError, match=r"need 450 bytes at 5x5"):
        read(path, size=5, room=10, may_stream=True)
    assert read(path, room=10).train.images.shape == (4, 9, 9, 3)  # they are there already


def test_the_decoder_of_the_machine_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Decoder] = []

    def decode(files: list[Path], *, decoder: Decoder, **how: object) -> torch.Tensor:
        given.append(decoder)
        return torch.arange(len(files)).reshape(-1, 1, 1, 1)

    monkeypatch.setattr(reader, "decode", decode)
    settings, decoder = data.Settings(), Decoder(torch.device("cuda:1"), threads=1)
    split = data.open_source(str(world(tmp_path)), settings)
    split = reader.read(split, settings, decoder=decoder, room=lambda: None)
    assert given == [decoder]
    assert split.train.images.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert split.test.images.flatten().tolist() == [6, 7]


def array_corpus(path: Path, side: int) -> Path:
    images = np.stack([noise(side, side, row) for row in range(4)])
    labels = np.array([0, 1, 0, 1])
    np.savez(path, x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2])
    return path


def test_arrays_keep_their_size_unless_asked(tmp_path: Path) -> None:
    path = array_corpus(tmp_path / "x.npz", 9)
    for size in (0, 9):
        split = read(path, size)
        assert (split.train.images == np.stack([noise(9, 9, row) for row in range(4)])).all()


def test_arrays_are_resized_like_pictures(tmp_path: Path) -> None:
    split = read(array_corpus(tmp_path / "x.npz", 9), size=5)
    wanted = Image.fromarray(noise(9, 9, 1)).resize((5, 5), Image.Resampling.BILINEAR)
    assert (split.train.images[1] == np.asarray(wanted)).all()
    assert split.test.images.shape == (2, 5, 5, 3)


def test_large_arrays_shrink_to_224_like_files(tmp_path: Path) -> None:
    assert read(array_corpus(tmp_path / "x.npz", 300)).train.images.shape[1:3] == (224, 224)
