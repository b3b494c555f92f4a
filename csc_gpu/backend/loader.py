"""From image files to uint8 pixels, through NVIDIA DALI; the only module that knows DALI.

JPEG and PNG of any size and colour mode become RGB arrays of one size, upright by their EXIF
orientation. An equal size leaves the pixels untouched; another size squashes (bilinear,
antialiased, not cropped). Alpha is dropped, 16-bit PNGs are rounded to 8 bits.

One broken file kills a whole DALI batch and its pipeline, so `find_broken` reads every file once
before `decode` does. Pillow's verdict alone is not enough: it passes a PNG without its end and some
headers that DALI refuses. So a file must pass Pillow, which says what is wrong, and then DALI.

Where DALI cannot be installed (macOS, Windows) Pillow does both jobs under the same contract. At an
equal size the pixels agree (16-bit colour: to one level); after shrinking they are close, no more.

On a CUDA device the same pipeline decodes and resizes there, and the pixels never come to the host.
No GPU has run it yet; broken files are looked for on the host all the same.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import os
import stat
import struct
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.ContainerIO import ContainerIO

from csc_gpu.backend import Augment, Batch, Decoder, resident
from csc_gpu.backend.passes import WHOLE, Changes, Portion, draw, even_parts
from csc_gpu.backend.workspace import is_out_of_memory
from csc_gpu.cache import keep, stamp
from csc_gpu.errors import CorpusError
from csc_gpu.files import Piece, Place
from csc_gpu.types import Array, Corpus, Mask

Progress = Callable[[int, int], None]
"""progress(done, total), in files; called from the caller's own thread."""

FORMATS = ("JPEG", "PNG")
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
CHECKED_TOGETHER = 64
"""Files that one thread checks in one go: enough to pay for a DALI pipeline (about 5 ms)."""
DECODED_BYTES = 1 << 29
"""Most memory for the decoded images of one batch: 256 photos of 12 megapixels would take 9 GB."""
CACHE_VERSION = 3
"""Raise it when `find_broken` becomes stricter: older caches are then ignored."""
MARK = np.dtype("<u8")
"""What tells an image from all others, in files that remember something about it."""
SIZED = np.dtype([("mark", MARK), ("height", "<u4"), ("width", "<u4")])
READERS = 8
"""Threads that read encoded images ahead; most of their time they wait for the disk."""
READ_TOGETHER = 32
"""Images that one of them reads in one go."""
FEWEST = 2
"""Images that must be left of a batch: BatchNorm has nothing to normalise over one."""
OPEN_FILES = 128
"""Shards kept open while a pass reads pieces of them."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class RowsMismatch(RuntimeError):
    """The decoder did not deliver every row exactly once: our bug, never the user's."""


@dataclass(frozen=True)
class Broken:
    """One image that cannot be used, and why, in one short line."""

    path: Place
    reason: str


# ---------------------------------------------------------------------------- what is broken


def find_broken(
    places: Sequence[Place],
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    threads: int = 2,
) -> list[Broken]:
    """Decode every image fully once; name those that do not decode, in the order of `places`.

    `cache` is a file that remembers the good ones by place, size and dates, 8 bytes each. It is
    written even when the check is interrupted; an unreadable one is ignored.
    """
    known = _read_cache(cache, MARK)
    marks = _marks(places)  # before reading: a later change will be noticed
    rows = np.flatnonzero(~np.isin(marks, known) | (marks == 0))
    good = np.zeros(len(places), bool)
    groups = [rows[i : i + CHECKED_TOGETHER] for i in range(0, len(rows), CHECKED_TOGETHER)]
    done = len(places) - len(rows)
    broken = []
    pool = ThreadPoolExecutor(threads)
    try:
        with _strict_pillow():
            verdicts = pool.map(lambda group: _reasons([places[row] for row in group]), groups)
            for group, reasons in zip(groups, verdicts, strict=True):
                for row, reason in zip(group, reasons, strict=True):
                    good[row] = reason is None
                    if reason is not None:
                        broken.append(Broken(places[row], reason))
                done += len(group)
                if progress is not None:
                    progress(done, len(places))
    finally:
        pool.shutdown(cancel_futures=True)
        if cache is not None and len(rows):
            keep(cache, np.union1d(known, marks[good]).astype(MARK).tobytes())
    return broken


def _marks(places: Sequence[Place]) -> NDArray[np.uint64]:
    """What tells each image, as it is now and for this decoder, from all others. 0: no file"""
    stamp_of = lru_cache(OPEN_FILES)(stamp)  # for pieces of one file
    kind = f"{CACHE_VERSION} {'dali' if _has_dali() else 'pillow'}"

    def mark(place: Place) -> int:
        path, *piece = place if isinstance(place, Piece) else (place,)
        now = stamp_of(path)
        told = f"{kind} {os.path.abspath(path)} {piece} {now}".encode(errors="surrogateescape")
        return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest()) if now else 0

    return np.fromiter(map(mark, places), np.uint64, len(places))


def _read_cache(cache: Path | None, kind: np.dtype[Any]) -> NDArray[Any]:
    """What a file remembers about images; nothing when in doubt."""
    try:
        content = cache.read_bytes() if cache else b""
    except OSError:
        content = b""
    return np.frombuffer(content if len(content) % kind.itemsize == 0 else b"", kind)


def _reasons(places: Sequence[Place]) -> list[str | None]:
    """Why each image is broken, None for a good one."""
    return _judged([contents_of(place) for place in places])


def _judged(contents: Sequence[bytes | str]) -> list[str | None]:
    """Why each image, or what there is instead, is broken; None for a good one.

    DALI sees none that Pillow refuses: a PNG cut off in the middle has crashed it.
    """
    reasons = [c if isinstance(c, str) else _pillow_reason(c) for c in contents]
    if _has_dali():
        passed = [row for row, reason in enumerate(reasons) if reason is None]
        images = [cast(bytes, contents[row]) for row in passed]
        for at in _refused_by_dali(images):
            reasons[passed[at]] = f"DALI cannot decode this {signature(images[at])}"
    return reasons


class Handle:
    """A file open for reading at any place, by several threads; closed when nobody needs it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def contents_of(place: Place, handle: Callable[[Path], Handle] = Handle) -> bytes | str:
    """The encoded bytes of an image, or as a str the reason why there are none."""
    path = place.path if isinstance(place, Piece) else place
    try:
        str(path).encode()
        if isinstance(place, Piece):
            file = handle(path)  # held, so that it stays open
            content = os.pread(file.number, place.size, place.start)
            return content if len(content) == place.size else "the shard ends before it"
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            return "not a regular file"
        return path.read_bytes() or "empty file"
    except UnicodeEncodeError:  # suspects.csv could not name it
        return "file name is not UTF-8"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _pillow_reason(content: bytes) -> str | None:
    """Why Pillow cannot decode this file fully, None when it can."""
    kind = signature(content)
    if kind is None:
        try:
            with Image.open(io.BytesIO(content)) as image:
                return f"{image.format} is not supported: JPEG or PNG only"
        except Exception:  # a decoder fed with anything raises anything
            return "not an image"
    if kind == "PNG" and (reason := _png_reason(content)) is not None:
        return reason
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            _orientation(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"too large: more than {Image.MAX_IMAGE_PIXELS} pixels"
    except Exception as error:  # a decoder fed with anything raises anything
        cut = "truncated" in str(error).lower() or (kind == "JPEG" and b"\xff\xd9" not in content)
        return f"{'truncated' if cut else 'corrupt'} {kind}"
    return None


def signature(content: bytes) -> str | None:
    """The format by the first bytes, which is all that DALI looks at too: names may lie."""
    return next((kind for head, kind in SIGNATURES.items() if content.startswith(head)), None)


def _png_reason(content: bytes) -> str | None:
    """Why the chunks of a PNG do not hold together: Pillow stops reading after the last pixel."""
    at = 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        name, end = content[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(content):
            break
        critical = name[:1].isupper()
        if (
            critical
            and zlib.crc32(content[at + 4 : end]) != struct.unpack_from(">I", content, end)[0]
        ):
            return "corrupt PNG"
        if name == b"IEND":
            return None
        at = end + 4
    return "truncated PNG"


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow as a judge: truncated files and decompression bombs are errors, the rest is silent."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # entered once around the pool: catch_warnings swaps global state and is not for worker threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


# -------------------------------------------------------------------------------- size, pixels


def image_sizes(places: Sequence[Place]) -> NDArray[np.int64]:
    """Height and width of each image, from its header, as `decode` sees it upright. (N, 2)"""
    sizes = header_sizes(places)
    for row in np.flatnonzero(sizes[:, 0] == 0).tolist()[:1]:
        raise _blame(places[row])
    return sizes


def header_sizes(places: Sequence[Place], *, cache: Path | None = None) -> NDArray[np.int64]:
    """The same; 0 and 0 where a header tells none.

    `cache` is a file that remembers them, as that of `find_broken` does, 16 bytes each.
    """
    known = _read_cache(cache, SIZED)  # in the order of marks
    found = np.zeros(len(places), SIZED)
    if cache is not None:
        found["mark"] = _marks(places)
    if len(known):
        at = np.searchsorted(known["mark"], found["mark"]).clip(max=len(known) - 1)
        same = (known["mark"][at] == found["mark"]) & (found["mark"] != 0)
        found[same] = known[at[same]]
    rows = np.flatnonzero(found["height"] == 0)
    with _strict_pillow():
        for row in rows.tolist():
            found["height"][row], found["width"][row] = _header_size(places[row])
    if cache is not None and len(rows):
        told = found[(found["mark"] != 0) & (found["height"] != 0)]
        every = np.concatenate([known, told])
        keep(cache, every[np.unique(every["mark"], return_index=True)[1]].tobytes())
    return np.stack([found["height"], found["width"]], axis=1).astype(np.int64)


def _header_size(place: Place) -> tuple[int, int]:
    """Height and width; 0 and 0 where the header tells none."""
    try:
        with header(place) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            turned = _orientation(image) >= 5
    except Exception:  # a decoder fed with anything raises anything
        return 0, 0
    return (width, height) if turned else (height, width)


def decoded_bytes(sizes: NDArray[np.int64]) -> int:
    """Most that one of the images of these sizes (N, 2) takes decoded."""
    return 3 * int(sizes.prod(axis=1).max())


@contextmanager
def header(place: Place) -> Iterator[Any]:
    """The image as a file of which only the beginning need be read."""
    path = place.path if isinstance(place, Piece) else place
    if not path.is_file():  # opening a pipe would wait for ever
        raise CorpusError(f"{path} is missing, or not a regular file")
    with path.open("rb") as file:
        yield ContainerIO(file, place.start, place.size) if isinstance(place, Piece) else file


def decode(
    places: Sequence[Place],
    *,
    height: int,
    width: int,
    decoder: Decoder,
    batch: int = 256,
    file_bytes: int = 0,
    progress: Progress | None = None,
) -> Array:
    """Decode and resize all images. (N, height, width, 3) uint8 RGB, row i is places[i]

    NumPy with a decoder on the processor; a torch tensor on the decoder's device otherwise.
    `batch` shrinks for large photos: file_bytes is the most that one takes decoded, 0 if nobody
    has looked. Raises CorpusError for one that `find_broken` would name.
    """
    total = len(places)
    out = torch.empty((total, height, width, 3), dtype=torch.uint8, device=decoder.device)
    if total:
        largest = file_bytes or decoded_bytes(image_sizes(places))
        batch = max(1, min(batch, total, DECODED_BYTES // largest))
        reading = Reading(places, np.arange(total), height, width, batch, decoder)
        runs = _read(reading)
        for run in range(reading.n_runs):
            wanted = reading.rows[reading.part(run)]
            images = _expected(runs, wanted)
            out[wanted[0] : wanted[-1] + 1] = images
            if progress is not None:
                progress(int(wanted[-1]) + 1, total)
    return out.numpy() if out.device.type == "cpu" else out


def stream(
    corpus: Corpus,
    size: int,
    decoder: Decoder,
    *,
    order: NDArray[np.int64] | None,
    augment: Augment | None,
    rng: np.random.Generator | None,
    portion: Portion = WHOLE,
) -> Iterator[Batch]:
    """The batches of `resident.batches`, read from the corpus's files on the way.

    The same rows and changes from the same rng; the images are of corpus.image_size, on the
    decoder's device. Raises CorpusError for a file that no longer decodes. With a tolerance that is
    not settled files are judged before they are decoded; rows that prove broken are left out.
    """
    (height, width), device = corpus.image_size, decoder.device
    order = np.arange(len(corpus)) if order is None else order
    if not len(order):
        nothing = torch.empty((0, height, width, 3), dtype=torch.uint8, device=device)
        yield from resident.batches(
            nothing, corpus.labels, size, order=order, augment=augment, rng=rng
        )
        return
    every = even_parts(np.arange(len(order)), size)  # positions in the order
    drawn, given = draw(augment, rng, every), portion.of(every)
    if not given:
        return
    parts = [np.arange(part.start, part.stop, part.step) for part in given]
    # a part is read in as many runs as its decoded files need, all of one size: what is short
    # repeats its last row, which is dropped
    longest = len(every[0][portion.rows])
    runs_a_part = -(-longest // max(1, DECODED_BYTES // max(1, corpus.file_bytes)))
    batch = -(-longest // runs_a_part)
    full = runs_a_part * batch
    at = np.concatenate([np.pad(part, (0, full - len(part)), mode="edge") for part in parts])
    changes = None if drawn is None else Changes(drawn.mirrored[at], drawn.by[:, at])
    rows = order[at]
    is_sound = corpus.is_sound[rows]
    # in place of an image known to be broken a sound one is read, and dropped
    files = corpus.files.take(np.where(is_sound, rows, rows[is_sound.argmax()]))
    judge = None if corpus.tolerance is None or corpus.tolerance.settled else _Judge(corpus, rows)
    reading = Reading(files, rows, height, width, batch, decoder, changes=changes, judge=judge)
    all_rows = torch.from_numpy(order).to(device)
    all_labels = torch.from_numpy(corpus.labels).to(device)[all_rows]
    runs = _read(reading)
    for here, part in zip(given, parts, strict=True):
        images = _expected(runs, order[part[:batch]])
        if runs_a_part > 1:  # a run is overwritten by the next: keep it
            rest = range(batch, full, batch)
            some = (_expected(runs, order[part[start : start + batch]]).clone() for start in rest)
            images = torch.cat([images.clone(), *some])
        if corpus.tolerance is None:
            yield Batch(resident.to_float(images), all_labels[here], all_rows[here])
        else:
            left = torch.from_numpy(_left(corpus, order[part])).to(device)
            images = resident.to_float(images[left])
            yield Batch(images, all_labels[here][left], all_rows[here][left])


def _left(corpus: Corpus, rows: NDArray[np.int64]) -> Mask:
    """Which of the rows of a batch are sound; raises CorpusError if too many are not. (B,) bool"""
    assert corpus.tolerance is not None
    corpus.tolerance.require_few()
    left: Mask = ~np.isin(corpus.ids[rows], list(corpus.tolerance.broken))
    if left.sum() < min(FEWEST, len(rows)):
        raise CorpusError(
            f"of a batch of {len(rows)} images {left.sum()} decode; replace the others, "
            f"{corpus.paths[rows[0]]} among them, or set a larger train.batch"
        )
    return left


class _Judge:
    """Notes which images of a pass do not decode, and gives others in their place."""

    def __init__(self, corpus: Corpus, rows: NDArray[np.int64]) -> None:
        """`rows` (n,) are those of the pass, in the order of reading."""
        self._corpus, self._rows = corpus, rows

    def __call__(self, start: int, contents: Sequence[bytes | str]) -> list[bytes]:
        """The contents read from `start` on, or for images that are broken a blank one."""
        sound = []
        for at, (content, reason) in enumerate(zip(contents, _judged(contents), strict=True)):
            if reason is not None:
                corpus, row = self._corpus, int(self._rows[start + at])
                assert corpus.tolerance is not None
                corpus.tolerance.note(int(corpus.ids[row]), corpus.paths[row], reason)
            sound.append(blank() if reason is not None else cast(bytes, content))
        return sound


@lru_cache(1)
def blank() -> bytes:
    """A picture of one pixel."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def _expected(runs: Runs, wanted: NDArray[np.int64]) -> torch.Tensor:
    """The images of the next run, which must be of these rows; what fills it up is dropped."""
    rows, images = next(runs, (wanted[:0], torch.empty(0)))
    if not np.array_equal(rows[: len(wanted)], wanted):
        raise RowsMismatch(f"not the rows {wanted[:9].tolist()}: {rows[:9].tolist()}")
    return images[: len(wanted)]


def release() -> None:
    """Give the memory that DALI keeps unused back to the driver; nothing where DALI was not used.

    Not yet run on a GPU.
    """
    if "nvidia.dali" in sys.modules:
        importlib.import_module("nvidia.dali.backend").ReleaseUnusedMemory()


@dataclass(frozen=True)
class Reading:
    """One pass over images, in runs of equal length."""

    places: Sequence[Place]  # n, in the order of reading
    rows: NDArray[np.int64]  # (n,) what to call them
    height: int  # pixels, as is the width
    width: int
    batch: int  # images in a run
    decoder: Decoder
    changes: Changes | None = None  # of n images, in the order of places
    judge: _Judge | None = None  # of images that may be broken

    @property
    def n_runs(self) -> int:
        """How many runs it takes, the last one filled up or short."""
        return -(-len(self.places) // self.batch)

    def part(self, run: int) -> slice:
        """Where in `places` a run lies, counted from 0."""
        return slice(run * self.batch, (run + 1) * self.batch)


Runs = Iterator[tuple[NDArray[np.int64], torch.Tensor]]
"""(rows, images) with shapes (B,) and (B, H, W, 3) uint8, the images on the decoder's device; they
may be overwritten by the next step."""


def _read(reading: Reading) -> Runs:
    """Every file once, by DALI if it is installed."""
    return _read_dali(reading) if _has_dali() else _read_pil(reading)


def _read_dali(reading: Reading) -> Runs:
    """Every image once, by DALI. With a CUDA device not yet run on a GPU."""
    device = reading.decoder.device
    ahead = min(reading.decoder.prefetch, reading.n_runs)
    with _encoded(reading) as encoded:
        pipeline = _pipeline(reading, ahead, encoded)
        for number in range(reading.n_runs):
            # what is read ahead may break ahead
            near = slice(reading.part(number).start, reading.part(number + ahead).stop)
            suspects = reading.places[near]
            if number == 0:
                for _ in range(ahead):
                    _or_blame(pipeline.schedule_run, suspects)
            current = None if device.type == "cpu" else torch.cuda.current_stream(device)
            share = partial(pipeline.share_outputs, cuda_stream=current)
            images, rows = _or_blame(share, suspects)
            pixels = torch.utils.dlpack.from_dlpack(images.as_tensor())
            yield rows.as_array()[:, 0], pixels
            pipeline.release_outputs()
            if number + ahead < reading.n_runs:
                _or_blame(pipeline.schedule_run, suspects)


Encoded = Iterator[list[bytes]]
"""The encoded images of one run after the other."""


@contextmanager
def _encoded(reading: Reading) -> Iterator[Encoded]:
    """Reads a pass's images with threads, as many runs ahead of need as the decoder works on.

    Raises CorpusError, which names the image, where one cannot be read.
    """
    handle = lru_cache(OPEN_FILES)(Handle)
    pool = ThreadPoolExecutor(READERS)

    def some(start: int, stop: int) -> list[bytes]:
        contents = [contents_of(place, handle) for place in reading.places[start:stop]]
        if reading.judge is not None:
            return reading.judge(start, contents)
        for place, content in zip(reading.places[start:stop], contents, strict=True):
            if isinstance(content, str):
                raise _blame(place, content)
        return cast(list[bytes], contents)

    def run_of(number: int) -> list[Future[list[bytes]]]:
        here = reading.part(number)
        stop = min(here.stop, len(reading.places))
        starts = range(here.start, stop, READ_TOGETHER)
        return [pool.submit(some, at, min(at + READ_TOGETHER, stop)) for at in starts]

    def runs() -> Encoded:
        begun = deque(run_of(number) for number in range(min(ahead, reading.n_runs)))
        for number in range(reading.n_runs):
            if number + ahead < reading.n_runs:
                begun.append(run_of(number + ahead))
            yield [content for part in begun.popleft() for content in part.result()]

    ahead = reading.decoder.prefetch
    try:
        yield runs()
    finally:
        pool.shutdown(cancel_futures=True)


def _pipeline(reading: Reading, ahead: int, encoded: Encoded) -> Any:
    """The pipeline from encoded images to (images, rows), the rows on the host.

    Here alone a device is chosen for reading. Raises DALI's RuntimeError where there is no GPU.
    """
    dali, decoder = _dali(), reading.decoder
    pipeline = dali.Pipeline(
        batch_size=reading.batch,
        num_threads=decoder.threads,
        device_id=decoder.device.index,  # None on the processor
        seed=0,
        prefetch_queue_depth=ahead,
    )
    changes = reading.changes
    with pipeline:
        images, rows, *changed = dali.fn.external_source(
            source=_fed(reading, encoded), num_outputs=2 if changes is None else 4
        )
        images = dali.fn.decoders.image(
            images,
            device="cpu" if decoder.device.type == "cpu" else "mixed",
            hw_decoder_load=decoder.hw_load,  # means nothing to the processor
            output_type=dali.types.RGB,
            adjust_orientation=True,
        )
        # the identity at equal size, bit for bit; a test holds DALI to it
        images = dali.fn.resize(
            images,
            resize_y=reading.height,
            resize_x=reading.width,
            interp_type=dali.types.INTERP_LINEAR,
            antialias=True,
        )
        if changes is not None:
            start, mirrored = changed
            images = dali.fn.slice(
                images,
                start=start,
                shape=[reading.height, reading.width],
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=[0],
            )
            images = dali.fn.flip(images, horizontal=mirrored)  # of what was shifted
        pipeline.set_outputs(images, rows)
    pipeline.build()
    return pipeline


def _fed(reading: Reading, encoded: Encoded) -> Iterator[tuple[Any, ...]]:
    """For each run its images, (B,) of bytes, and rows, (B, 1); if they are changed also from where
    they are read, (B, 2), and who is mirrored, (B,)."""
    for run, contents in enumerate(encoded):
        here = reading.part(run)
        images = [np.frombuffer(content, np.uint8) for content in contents]
        fed = images, reading.rows[here, None]
        if reading.changes is None:
            yield fed
        else:
            by, mirrored = reading.changes.by[:, here].T, reading.changes.mirrored[here]
            yield *fed, by.astype(np.int32), mirrored.astype(np.int32)


def _refused_by_dali(contents: Sequence[bytes]) -> list[int]:
    """Positions of the encoded images that DALI does not decode."""
    dali = _dali()

    def decodes(some: Sequence[bytes]) -> bool:
        pipeline = dali.Pipeline(
            batch_size=len(some), num_threads=1, device_id=None, prefetch_queue_depth=1
        )
        with pipeline:
            encoded = dali.fn.external_source(name="encoded", device="cpu")
            images = dali.fn.decoders.image(encoded, device="cpu", output_type=dali.types.RGB)
            pipeline.set_outputs(images.shape())
        pipeline.build()
        pipeline.feed_input("encoded", [np.frombuffer(one, dtype=np.uint8) for one in some])
        try:
            pipeline.run()
        except RuntimeError:
            return False
        return True

    refused = []
    for group in _that_fit(contents):
        if not decodes([contents[at] for at in group]):
            refused += [at for at in group if not decodes([contents[at]])]
    return refused


def _that_fit(contents: Sequence[bytes]) -> Iterator[list[int]]:
    """Positions in groups whose decoded images take at most DECODED_BYTES, or a single one."""
    group: list[int] = []
    used = 0
    for at, content in enumerate(contents):
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            needed = 3 * image.width * image.height
        if group and used + needed > DECODED_BYTES:
            yield group
            group, used = [], 0
        group.append(at)
        used += needed
    if group:
        yield group


def _read_pil(reading: Reading) -> Runs:
    """Every image once, by Pillow, where there is no DALI."""
    decoded = partial(_decoded_pil, height=reading.height, width=reading.width)
    with _encoded(reading) as encoded, ThreadPoolExecutor(reading.decoder.threads) as pool:
        for run, contents in enumerate(encoded):
            here = reading.part(run)
            images = []
            for at, image in enumerate(pool.map(decoded, contents), here.start):
                if image is None:
                    raise _blame(reading.places[at])
                images.append(image)
            pixels = torch.from_numpy(np.stack(images))
            if reading.changes is not None:
                by = torch.from_numpy(reading.changes.by[:, here])
                mirrored = torch.from_numpy(reading.changes.mirrored[here])
                pixels = resident.changed(pixels, mirrored, by, int(by.abs().max()))
            yield reading.rows[here], pixels.to(reading.decoder.device)


def _decoded_pil(content: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """One image by Pillow, None when it does not decode. (height, width, 3)"""
    rgb = _upright_pil(content)
    if rgb is not None and rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return None if rgb is None else np.asarray(rgb)


def picture(place: Place) -> Image.Image:
    """One image as it is, RGB and upright; raises CorpusError if it does not decode."""
    content = contents_of(place)
    if isinstance(content, str):
        raise _blame(place, content)
    rgb = _upright_pil(content)
    if rgb is None:
        raise _blame(place)
    return rgb


def _upright_pil(content: bytes) -> Image.Image | None:
    """One image by Pillow in its own size, None when it does not decode."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            image.info.pop("transparency", None)  # dropped like every alpha, and without a warning
            upright = _UPRIGHT.get(_orientation(image))
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8 bits
                wide = np.asarray(image).astype(np.float64)
                rgb = Image.fromarray(np.round(wide / 257).astype(np.uint8)).convert("RGB")
            else:
                rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    return rgb if upright is None else rgb.transpose(upright)


def _orientation(image: Image.Image) -> int:
    """How the picture is turned by its EXIF, 1 upright, up to 8; 5 and above swap the sides."""
    # not image.getexif(): it decodes a whole PNG, and believes XMP, which DALI does not
    content = image.info.get("exif")
    if not content:
        return 1
    exif = Image.Exif()
    try:
        exif.load(content)
        turned = exif.get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error):
        return 1
    return turned if turned in _UPRIGHT else 1


def _dali() -> Any:
    """NVIDIA DALI, imported when it is used; untyped, for its own annotations are incomplete."""
    return importlib.import_module("nvidia.dali")


def _has_dali() -> bool:
    """Whether DALI is installed, without importing it: that takes a second."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even a package named nvidia
        return False


def _or_blame(step: Callable[[], Any], places: Sequence[Place]) -> Any:
    """step(); when DALI breaks, a CorpusError that names the image among `places`."""
    try:
        return step()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # DALI knows no names: look for the first bad one ourselves
        with _strict_pillow():
            reasons = ((place, _reasons([place])[0]) for place in places)
            found = next(((place, reason) for place, reason in reasons if reason), None)
        if found is not None:
            raise _blame(*found) from error
        said = [line for line in str(error).splitlines() if line.strip()]
        reason = next(
            (said[i + 1] for i, s in enumerate(said[:-1]) if s == "encountered:"), said[0]
        )
        raise CorpusError(f"cannot decode the images: {reason}") from error


def _blame(place: Place, reason: str | None = None) -> CorpusError:
    """The error for one image that was expected to decode."""
    if reason is None:
        with _strict_pillow():
            reason = _reasons([place])[0]
    return CorpusError(
        f"cannot decode {place}: {reason or 'it changed while it was read'}; "
        "replace or remove it, then check the files again"
    )
