"""Batches read from files: those of resident pixels, one for one; and what a GPU would be told."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import data, sources
from csc_gpu.backend import Augment, Batch, Decoder, loader, open_backend, resident
from csc_gpu.errors import CorpusError
from csc_gpu.files import Files
from csc_gpu.types import Corpus

CPU = Decoder(torch.device("cpu"), threads=1)
GPU = Decoder(torch.device("cuda:1"), threads=3, prefetch=4, hw_load=0.25)
SIZE = (8, 10)  # height and width, in pixels
NOTHING: loader.Encoded = iter(())
needs_dali = pytest.mark.skipif(not loader._has_dali(), reason="DALI is not installed")


@pytest.fixture(params=[pytest.param("dali", marks=needs_dali), "pillow"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with both decoders: they have one contract."""
    monkeypatch.setattr(loader, "_has_dali", lambda: request.param == "dali")
    return str(request.param)


both = pytest.mark.usefixtures("installed")


def on_disk(folder: Path, n: int) -> Corpus:
    """n pictures of noise as lossless files, labelled by turns."""
    rng, paths = np.random.default_rng(n), [folder / f"{row}.png" for row in range(n)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(path)
    names = tuple(path.name for path in paths)
    return Corpus(
        np.arange(n) % 3,
        tuple("abc"),
        np.arange(n),
        names,
        files=Files.whole(folder, names),
        read_at=SIZE,
    )


def streamed(corpus: Corpus, size: int, seed: int = 0, **how: Any) -> Iterator[Batch]:
    given = {"order": None, "augment": None, "rng": np.random.default_rng(seed), **how}
    return loader.stream(corpus, size, given.pop("decoder", CPU), **given)


def at_rest(corpus: Corpus, size: int, seed: int = 0, **how: Any) -> Iterator[Batch]:
    """The batches of the same corpus, decoded first."""
    pixels = loader.decode(corpus.files, height=SIZE[0], width=SIZE[1], decoder=CPU)
    given = {"order": None, "augment": None, "rng": np.random.default_rng(seed), **how}
    return resident.batches(torch.from_numpy(pixels), corpus.labels, size, **given)


def assert_same(got: Iterator[Batch], wanted: Iterator[Batch]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.labels.dtype == one.rows.dtype == torch.int64
        assert one.images.dtype == torch.float32 and one.images.shape == other.images.shape
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert (one.images == other.images).all()


# ------------------------------------------------------------------------------- the same batches


@both
@pytest.mark.parametrize(("n", "size"), [(1, 8), (7, 3), (8, 4), (9, 4), (11, 5), (5, 1)])
@pytest.mark.parametrize("augment", [None, Augment(shift=3, flip=True)])
def test_streamed_batches_are_the_resident_ones(
    tmp_path: Path, n: int, size: int, augment: Augment | None
) -> None:
    corpus, order = on_disk(tmp_path, n), np.random.default_rng(n).permutation(n)
    for how in ({"order": order, "augment": augment}, {"augment": augment}):
        assert_same(streamed(corpus, size, **how), at_rest(corpus, size, **how))


@both
@pytest.mark.parametrize("augment", [Augment(shift=2), Augment(flip=True), Augment(), None])
def test_each_change_by_itself_and_some_of_the_rows_only(
    tmp_path: Path, augment: Augment | None
) -> None:
    corpus, order = on_disk(tmp_path, 9), np.array([7, 2, 8, 0, 5])
    how = {"order": order, "augment": augment}
    assert_same(streamed(corpus, 2, **how), at_rest(corpus, 2, **how))


@both
def test_a_shift_beyond_the_image_leaves_black(tmp_path: Path) -> None:
    corpus, augment = on_disk(tmp_path, 6), Augment(shift=15)
    assert_same(streamed(corpus, 4, augment=augment), at_rest(corpus, 4, augment=augment))


@both
def test_other_dice_give_other_images(tmp_path: Path) -> None:
    corpus, augment = on_disk(tmp_path, 6), Augment(shift=2, flip=True)
    one, other = (next(streamed(corpus, 6, seed, augment=augment)) for seed in (0, 1))
    assert (one.images != other.images).any()


@both
def test_no_rows_are_an_empty_batch_as_they_are_at_rest(tmp_path: Path) -> None:
    corpus, none = on_disk(tmp_path, 2), np.array([], np.int64)
    assert_same(streamed(corpus, 4, order=none), at_rest(corpus, 4, order=none))


@both
@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_reading_ahead_changes_nothing(tmp_path: Path, prefetch: int) -> None:
    corpus, how = on_disk(tmp_path, 7), {"augment": Augment(shift=2, flip=True)}
    ahead = Decoder(torch.device("cpu"), threads=2, prefetch=prefetch)
    assert_same(streamed(corpus, 2, decoder=ahead, **how), at_rest(corpus, 2, **how))


@both
def test_files_are_resized_as_they_are_when_decoded(tmp_path: Path) -> None:
    corpus = on_disk(tmp_path, 4)
    small = Corpus(**{**vars(corpus), "read_at": (5, 6)})
    pixels = loader.decode(corpus.files, height=5, width=6, decoder=CPU)
    (batch,) = streamed(small, 4)
    assert (batch.images == resident.to_float(torch.from_numpy(pixels))).all()


@both
def test_a_batch_keeps_its_images_until_the_next(tmp_path: Path) -> None:
    corpus = on_disk(tmp_path, 6)
    batches = streamed(corpus, 2)
    batch = next(batches)
    before = batch.images.clone()
    gc.collect()
    assert (batch.images == before).all()


@both
def test_a_pass_may_be_abandoned(tmp_path: Path) -> None:
    corpus = on_disk(tmp_path, 12)
    for _ in range(3):
        batches = streamed(corpus, 2, augment=Augment(shift=1))
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        next(streamed(corpus, 2))
        gc.collect()
    assert_same(streamed(corpus, 5), at_rest(corpus, 5))


@both
@pytest.mark.parametrize("content", [None, b"text", "half"])
def test_a_file_that_broke_on_the_way_is_named(tmp_path: Path, content: bytes | str | None) -> None:
    corpus = on_disk(tmp_path, 12)
    victim = corpus.files[9]
    if content is None:
        victim.unlink()
    else:
        whole = victim.read_bytes()
        victim.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"9\.png: ") as caught:
        list(streamed(corpus, 2, augment=Augment(flip=True)))
    assert "\n" not in str(caught.value)


@both
@pytest.mark.parametrize("rows", [[[0, 1], [3, 2]], [[0, 1]], [[0, 1], [2]], [[0, 0], [2, 3]]])
def test_rows_lost_or_repeated_or_moved_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]
) -> None:
    def wrong(_: loader.Reading) -> loader.Runs:
        for some in rows:
            yield np.array(some), torch.zeros((len(some), *SIZE, 3), dtype=torch.uint8)

    corpus = on_disk(tmp_path, 4)
    monkeypatch.setattr(loader, "_read", wrong)
    with pytest.raises(loader.RowsMismatch, match="not the rows"):
        list(streamed(corpus, 2))


# --------------------------------------------------------------------------- in a backend's hands


@both
@both
@pytest.mark.parametrize("files", [1, 2, 3, 100])
def test_photos_that_are_large_decoded_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    corpus = replace(on_disk(tmp_path, 11), file_bytes=1000)
    monkeypatch.setattr(loader, "DECODED_BYTES", 1000 * files)
    runs: list[int] = []
    read = loader._read

    def note(reading: loader.Reading) -> loader.Runs:
        runs.append(reading.batch)
        return read(reading)

    monkeypatch.setattr(loader, "_read", note)
    augment = Augment(shift=2, flip=True)
    assert_same(streamed(corpus, 5, augment=augment), at_rest(corpus, 5, augment=augment))
    assert runs[-1] == {1: 1, 2: 2, 3: 2, 100: 4}[files]  # batches of 4 rows, in even runs


def test_a_backend_streams_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in ("train", "test"):
        for row in range(6):
            path = tmp_path / "corpus" / part / "ab"[row % 2] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(row).integers(0, 256, (*SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    backend, source = open_backend("cpu", 1), str(tmp_path / "corpus")
    there = sources.load(source, data.Settings(), backend=backend)
    assert not there.train.files
    monkeypatch.setattr(type(backend), "free_bytes", lambda self: 100)
    streamed = sources.load(source, data.Settings(), backend=backend)
    assert streamed.train.pixels is None and streamed.test.image_size == SIZE
    assert streamed.train.file_bytes == 3 * SIZE[0] * SIZE[1]
    assert_same(backend.batches(streamed.train, 4), backend.batches(there.train, 4))
    alone = sources.load(source, data.Settings())  # nobody to stream to
    assert (alone.train.images == there.train.images).all()
    monkeypatch.setattr(sources, "free_memory", lambda: 100)
    with pytest.raises(CorpusError, match="the 100 bytes of free memory"):
        sources.load(source, data.Settings())


# ------------------------------------------------------------------------------ what a GPU is told


class Recorder:
    """In DALI's place: every operator returns its own name, and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.shared: list[Any] = []
        self.types = SimpleNamespace(RGB="RGB", INTERP_LINEAR="linear")
        names = {"decoders.image": 1, "resize": 1, "slice": 1, "flip": 1}
        ops = {name: self._operator(name, n) for name, n in names.items()}
        self.fn = SimpleNamespace(
            decoders=SimpleNamespace(image=ops["decoders.image"]),
            external_source=self._source,
            **{name: op for name, op in ops.items() if "." not in name},
        )

    def _operator(self, name: str, n_outputs: int) -> Callable[..., Any]:
        def call(*inputs: Any, **how: Any) -> Any:
            self.calls[name] = {"inputs": inputs, **how}
            return name if n_outputs == 1 else tuple(f"{name} {i}" for i in range(n_outputs))

        return call

    def _source(self, source: Iterator[Any], num_outputs: int) -> Any:
        self.source = source
        return self._operator("external_source", num_outputs)()

    def Pipeline(self, **how: Any) -> Recorder:  # noqa: N802
        self.calls["Pipeline"] = how
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def build(self) -> None: ...

    def schedule_run(self) -> None: ...

    def release_outputs(self) -> None: ...

    def set_outputs(self, *outputs: str) -> None:
        self.calls["set_outputs"] = {"inputs": outputs}

    def share_outputs(self, cuda_stream: Any = None) -> tuple[Any, Any]:
        self.shared.append(cuda_stream)
        start = 2 * len(self.shared) - 2
        images = torch.full((2, *SIZE, 3), len(self.shared), dtype=torch.uint8)
        rows = np.array([[start], [start + 1]], np.int32)
        return SimpleNamespace(as_tensor=lambda: images), SimpleNamespace(as_array=lambda: rows)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    there = Recorder()
    monkeypatch.setattr(loader, "_dali", lambda: there)
    return there


def reading(decoder: Decoder, changes: loader.Changes | None = None) -> loader.Reading:
    paths = [Path(f"{row}.png") for row in range(4)]
    return loader.Reading(paths, np.arange(4), *SIZE, 2, decoder, changes=changes)


def test_on_a_gpu_pixels_are_decoded_where_they_stay(recorder: Recorder) -> None:
    loader._pipeline(reading(GPU), 2, NOTHING)
    calls = recorder.calls
    assert calls["Pipeline"]["device_id"] == 1
    assert calls["Pipeline"]["num_threads"] == 3
    assert calls["Pipeline"]["prefetch_queue_depth"] == 2
    assert calls["decoders.image"]["device"] == "mixed"
    assert calls["decoders.image"]["hw_decoder_load"] == 0.25
    assert calls["resize"]["inputs"] == ("decoders.image",)
    assert calls["set_outputs"]["inputs"] == ("resize", "external_source 1")


def test_without_a_gpu_the_pipeline_is_the_same_but_for_the_device(recorder: Recorder) -> None:
    loader._pipeline(reading(CPU), 2, NOTHING)
    told = {name: dict(how) for name, how in recorder.calls.items()}
    loader._pipeline(reading(Decoder(GPU.device, CPU.threads)), 2, NOTHING)
    assert told["Pipeline"].pop("device_id") is None
    assert told["decoders.image"].pop("device") == "cpu"
    assert recorder.calls["Pipeline"].pop("device_id") == 1
    assert recorder.calls["decoders.image"].pop("device") == "mixed"
    assert recorder.calls == told


def test_an_image_is_shifted_before_it_is_mirrored(recorder: Recorder) -> None:
    by: NDArray[np.int64] = np.arange(8).reshape(2, 4)
    changes = loader.Changes(np.array([True, False, False, True]), by)
    loader._pipeline(reading(GPU, changes), 2, iter([[b"a", b"b"], [b"c", b"d"]]))
    calls = recorder.calls
    assert calls["slice"]["inputs"] == ("resize",) and calls["flip"]["inputs"] == ("slice",)
    assert calls["slice"]["start"] == "external_source 2"
    assert calls["flip"]["horizontal"] == "external_source 3"
    fed = [(start.tolist(), who.tolist()) for *_, start, who in recorder.source]
    assert fed == [([[0, 4], [1, 5]], [1, 0]), ([[2, 6], [3, 7]], [0, 1])]


def test_on_a_gpu_outputs_are_bound_to_the_stream_that_uses_them(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    runs = list(loader._read_dali(reading(GPU)))
    assert recorder.shared == ["stream of cuda:1"] * 2
    assert recorder.calls["Pipeline"]["prefetch_queue_depth"] == 2  # there are no more runs
    assert [rows.tolist() for rows, _ in runs] == [[0, 1], [2, 3]]
    assert [int(images.unique()) for _, images in runs] == [1, 2]
    list(loader._read_dali(reading(CPU)))
    assert recorder.shared[2:] == [None, None]


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_dali_itself_says_that_there_is_no_gpu() -> None:
    with pytest.raises(RuntimeError, match="while CUDA is not available"):
        loader._pipeline(reading(GPU), 1, NOTHING)


# ------------------------------------------------------------------------------ memory given back


def test_memory_is_given_back_without_importing_dali_for_it() -> None:
    code = "import sys; from csc_gpu.backend import loader; loader.release(); "
    code += "sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_dali_was_used_it_is_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    backend = SimpleNamespace(ReleaseUnusedMemory=lambda: asked.append("release"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", SimpleNamespace(backend=backend))
    monkeypatch.setitem(sys.modules, "nvidia.dali.backend", backend)
    loader.release()
    assert asked == ["release"]


@needs_dali
def test_dali_gives_memory_back_when_asked(tmp_path: Path) -> None:
    corpus = on_disk(tmp_path, 3)
    list(streamed(corpus, 2))
    loader.release()
    assert_same(streamed(corpus, 2), at_rest(corpus, 2))
