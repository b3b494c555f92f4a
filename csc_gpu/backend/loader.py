"""From image files to uint8 pixels, through NVIDIA DALI; the only module that knows DALI.

JPEG and PNG of any size and colour mode become RGB arrays of one size, upright by their EXIF
orientation. An equal size leaves the pixels untouched; another size squashes (bilinear,
antialiased, not cropped). Alpha is dropped, 16-bit PNGs are rounded to 8 bits.

One broken file kills a whole DALI batch and its pipeline, so `find_broken` reads every file once
before `decode` does. Pillow's verdict alone is not enough: it passes a PNG without its end and some
headers that DALI refuses. So a file must pass Pillow, which says what is wrong, and then DALI.

Where DALI cannot be installed (macOS, Windows) Pillow does both jobs under the same contract. At an
equal size the pixels agree (16-bit colour: to one level); after shrinking they are close, no more.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import stat
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from csc_gpu.errors import CorpusError

Progress = Callable[[int, int], None]
"""progress(done, total), in files; called from the caller's own thread."""

FORMATS = ("JPEG", "PNG")
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
CHECKED_TOGETHER = 64
"""Files that one thread checks in one go: enough to pay for a DALI pipeline (about 5 ms)."""
DECODED_BYTES = 1 << 29
"""Most memory for the decoded images of one batch: 256 photos of 12 megapixels would take 9 GB."""
BATCHES_AHEAD = 2
"""Batches DALI works on while one is copied out."""
CACHE_VERSION = 2
"""Raise it when `find_broken` becomes stricter: older caches are then ignored."""

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
    """One file that cannot be used, and why, in one short line."""

    path: Path
    reason: str


# ---------------------------------------------------------------------------- what is broken


def find_broken(
    paths: Sequence[Path],
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    threads: int = 2,
) -> list[Broken]:
    """Decode every file fully once; name those that do not decode, in the order of `paths`.

    `cache` is a JSON file that remembers the good ones by absolute path, size and dates. It is
    written even when the check is interrupted; an unreadable one is ignored.
    """
    good = _read_cache(cache)
    stamps = [_stamp(path) for path in paths]  # before reading: a later change will be noticed
    rows = [
        row
        for row, path in enumerate(paths)
        if stamps[row] is None or good.get(os.path.abspath(path)) != stamps[row]
    ]
    groups = [rows[i : i + CHECKED_TOGETHER] for i in range(0, len(rows), CHECKED_TOGETHER)]
    done = len(paths) - len(rows)
    broken = []
    pool = ThreadPoolExecutor(threads)
    try:
        with _strict_pillow():
            verdicts = pool.map(_reasons, [[paths[row] for row in group] for group in groups])
            for group, reasons in zip(groups, verdicts, strict=True):
                for row, reason in zip(group, reasons, strict=True):
                    stamp = stamps[row]
                    if reason is not None:
                        broken.append(Broken(paths[row], reason))
                    elif stamp is not None:
                        good[os.path.abspath(paths[row])] = stamp
                done += len(group)
                if progress is not None:
                    progress(done, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)
        if cache is not None and rows:
            _write_cache(cache, good)
    return broken


def _reasons(paths: Sequence[Path]) -> list[str | None]:
    """Why each file is broken, None for a good one; the file is read once for both decoders."""
    contents = [_contents(path) for path in paths]
    reasons = [c if isinstance(c, str) else _pillow_reason(c) for c in contents]
    if _has_dali():
        passed = [row for row, reason in enumerate(reasons) if reason is None]
        images = [cast(bytes, contents[row]) for row in passed]
        for at in _refused_by_dali(images):
            reasons[passed[at]] = f"DALI cannot decode this {_signature(images[at])}"
    return reasons


def _contents(path: Path) -> bytes | str:
    """The bytes of a file, or as a str the reason why there are none."""
    try:
        str(path).encode()
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            return "not a regular file"
        return path.read_bytes() or "empty file"
    except UnicodeEncodeError:  # DALI takes no other names
        return "file name is not UTF-8"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _pillow_reason(content: bytes) -> str | None:
    """Why Pillow cannot decode this file fully, None when it can."""
    kind = _signature(content)
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


def _signature(content: bytes) -> str | None:
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


def _stamp(path: Path) -> list[int] | None:
    """Size, mtime and ctime in ns, None when there is no such file.

    Poisoned sets have files of one size and one mtime, so these alone would not show a change.
    """
    try:
        status = path.stat()
    except (OSError, UnicodeEncodeError):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _cache_kind() -> dict[str, object]:
    """What a cache must say about itself to be believed here."""
    return {"version": CACHE_VERSION, "decoder": "dali" if _has_dali() else "pillow"}


def _read_cache(cache: Path | None) -> dict[str, object]:
    """Stamp of every file known to be good, by absolute path; nothing when in doubt."""
    if cache is None:
        return {}
    try:
        known = json.loads(cache.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict) or not isinstance(known.get("good"), dict):
        return {}
    if any(known.get(key) != value for key, value in _cache_kind().items()):
        return {}
    return cast(dict[str, object], known["good"])


def _write_cache(cache: Path, good: dict[str, object]) -> None:
    """Replace the cache in one step; not being able to is a warning, for the check is done."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({**_cache_kind(), "good": good}, file)
            os.replace(name, cache)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"cannot remember the checked files in {cache}: {error}", stacklevel=3)


# -------------------------------------------------------------------------------- size, pixels


def image_sizes(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Height and width of each file, from its header, as `decode` sees it upright. (N, 2)"""
    sizes = np.empty((len(paths), 2), dtype=np.int64)
    for row, path in enumerate(paths):
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                turned = _orientation(image) >= 5
        except (OSError, Image.DecompressionBombError) as error:
            raise _blame(path) from error
        sizes[row] = (width, height) if turned else (height, width)
    return sizes


def decode(
    paths: Sequence[Path],
    *,
    height: int,
    width: int,
    batch: int = 256,
    threads: int = 2,
    shuffle: bool = False,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Decode and resize all files. (N, height, width, 3) uint8 RGB, row i is paths[i]

    `shuffle` changes the order of reading and nothing else. `batch` shrinks for large photos.
    Raises CorpusError for a file that `find_broken` would name.
    """
    total = len(paths)
    out = np.empty((total, height, width, 3), dtype=np.uint8)
    if total == 0:
        return out
    seen = np.zeros(total, dtype=np.int64)
    largest = 3 * int(image_sizes(paths).prod(axis=1).max())  # bytes
    batch = max(1, min(batch, total, DECODED_BYTES // largest))
    batches = _decode_dali if _has_dali() else _decode_pil
    for rows, images in batches(paths, height, width, batch, threads, shuffle):
        out[rows] = images
        np.add.at(seen, rows, 1)
        if progress is not None:
            progress(int(seen.sum()), total)
    if (seen != 1).any():
        raise RowsMismatch(f"rows not seen exactly once: {np.flatnonzero(seen != 1)[:9].tolist()}")
    return out


Batches = Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]
"""(rows, images) with shapes (B,) and (B, H, W, 3); images may be overwritten by the next step."""


def _decode_dali(
    paths: Sequence[Path], height: int, width: int, batch: int, threads: int, shuffle: bool
) -> Batches:
    """Every file once, by DALI."""
    total, done = len(paths), 0
    n_batches = -(-total // batch)
    build = partial(_file_pipeline, paths, height, width, batch, threads, shuffle)
    pipeline = _or_blame(build, paths)
    for _ in range(min(BATCHES_AHEAD, n_batches)):
        _or_blame(pipeline.schedule_run, paths)
    for number in range(n_batches):
        unseen = paths if shuffle else paths[done:]
        images, rows = _or_blame(pipeline.share_outputs, unseen)
        n_new = min(batch, total - done)  # the reader fills the last batch up with copies
        yield rows.as_array()[:n_new, 0].astype(np.int64), images.as_array()[:n_new]
        done += n_new
        pipeline.release_outputs()
        if number + BATCHES_AHEAD < n_batches:
            _or_blame(pipeline.schedule_run, unseen)


def _file_pipeline(
    paths: Sequence[Path], height: int, width: int, batch: int, threads: int, shuffle: bool
) -> Any:
    """The pipeline from files to (images, rows). Here alone a device is chosen for reading."""
    dali = _dali()
    pipeline = dali.Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=None,
        seed=0,
        prefetch_queue_depth=BATCHES_AHEAD,
    )
    with pipeline:
        encoded, rows = dali.fn.readers.file(
            files=[os.path.abspath(path) for path in paths],
            labels=list(range(len(paths))),
            random_shuffle=shuffle,
            pad_last_batch=True,
            # not mmap, the default: a file that shrinks while it is read would be a bus error
            dont_use_mmap=True,
        )
        images = dali.fn.decoders.image(
            encoded, device="cpu", output_type=dali.types.RGB, adjust_orientation=True
        )
        # the identity at equal size, bit for bit; a test holds DALI to it
        images = dali.fn.resize(
            images,
            resize_y=height,
            resize_x=width,
            interp_type=dali.types.INTERP_LINEAR,
            antialias=True,
        )
        pipeline.set_outputs(images, rows)
    pipeline.build()
    return pipeline


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


def _decode_pil(
    paths: Sequence[Path], height: int, width: int, batch: int, threads: int, shuffle: bool
) -> Batches:
    """Every file once, by Pillow, where there is no DALI."""
    total = len(paths)
    order = np.random.default_rng(0).permutation(total) if shuffle else np.arange(total)
    read = partial(_read_pil, height=height, width=width)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, total, batch):
            rows = order[start : start + batch].astype(np.int64)
            images = []
            for row, image in zip(rows, pool.map(read, [paths[row] for row in rows]), strict=True):
                if image is None:
                    raise _blame(paths[row])
                images.append(image)
            yield rows, np.stack(images)


def _read_pil(path: Path, height: int, width: int) -> NDArray[np.uint8] | None:
    """One file by Pillow, None when it does not decode. (height, width, 3)"""
    try:
        with Image.open(path, formats=FORMATS) as image:
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
    if upright is not None:
        rgb = rgb.transpose(upright)
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


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


def _or_blame(step: Callable[[], Any], paths: Sequence[Path]) -> Any:
    """step(); when DALI breaks, a CorpusError that names the file among `paths`."""
    try:
        return step()
    except RuntimeError as error:
        text = str(error)
        named = [path for path in paths if os.path.abspath(path) in text]
        if named:
            raise _blame(max(named, key=lambda path: len(str(path)))) from error
        # DALI names no file that it cannot recognise: look for the first bad one ourselves
        with _strict_pillow():
            found = next((path for path in paths if _reasons([path]) != [None]), None)
        if found is not None:
            raise _blame(found) from error
        said = [line for line in text.splitlines() if line.strip()]
        reason = next(
            (said[i + 1] for i, s in enumerate(said[:-1]) if s == "encountered:"), said[0]
        )
        raise CorpusError(f"cannot decode the images: {reason}") from error


def _blame(path: Path) -> CorpusError:
    """The error for one file that was expected to decode."""
    with _strict_pillow():
        reason = _reasons([path])[0]
    return CorpusError(
        f"cannot decode {path}: {reason or 'it changed while it was read'}; "
        "replace or remove it, then check the files again"
    )
