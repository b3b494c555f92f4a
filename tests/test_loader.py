"""Reading image files: every row at its place, no pixel changed unasked, no broken file missed."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from csc_gpu.backend import Decoder, loader
from csc_gpu.errors import CorpusError

Pixels = NDArray[np.uint8]
CPU = Decoder(torch.device("cpu"), threads=2)
needs_dali = pytest.mark.skipif(not loader._has_dali(), reason="DALI is not installed")


@pytest.fixture(params=[pytest.param("dali", marks=needs_dali), "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with both decoders: they have one contract."""
    monkeypatch.setattr(loader, "_has_dali", lambda: request.param == "dali")
    return str(request.param)


def decode(paths: list[Path], **how: Any) -> Pixels:
    images: Pixels = loader.decode(paths, decoder=CPU, **how)
    return images


def noise(height: int = 6, width: int = 5, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def smooth() -> Image.Image:
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    return Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=-1))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def numbered(folder: Path, n: int, size: int = 4) -> list[Path]:
    """n PNGs; every pixel of file i is (i % 256, i // 256, 7)."""
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.new("RGB", (size, size), (i % 256, i // 256, 7)).save(path)
    return paths


def numbers(images: Pixels) -> list[int]:
    assert (images == images[:, :1, :1]).all() and (images[..., 2] == 7).all()
    return [int(low) + 256 * int(high) for low, high in images[:, 0, 0, :2]]


def chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(pixels: NDArray[np.generic], depth: int, colour: int, interlaced: bool = False) -> bytes:
    """A PNG of a kind that Pillow does not write."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)]
        passes += [(2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b""
    for top, left, down, right in passes:
        part = pixels[top::down, left::right]
        lines += b"".join(b"\0" + line.tobytes() for line in part) if part.size else b""
    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def good_files(folder: Path) -> list[Path]:
    """One file of every kind that we promise to read."""
    image, rng = smooth(), np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = rng.integers(0, 65536, (5, 4, 3)).astype(">u2")
    contents = {
        "rgb.jpg": encoded(image, "JPEG"),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "turned.jpg": encoded(image, "JPEG", exif=turned),
        "phone.jpg": encoded(image, "MPO", save_all=True, append_images=[image]),
        "trailing.jpg": encoded(image, "JPEG") + b"camera notes",
        "really a png.jpg": encoded(image, "PNG"),
        "rgb.png": encoded(image, "PNG"),
        "grey.png": encoded(image.convert("L"), "PNG"),
        "black and white.png": encoded(image.convert("1"), "PNG"),
        "grey alpha.png": encoded(image.convert("LA"), "PNG"),
        "rgba.png": encoded(Image.fromarray(noise(channels=4)), "PNG"),
        "palette.png": encoded(image.quantize(16), "PNG"),
        "palette alpha.png": encoded(image.quantize(16), "PNG", transparency=bytes([0, 99])),
        "turned.png": encoded(image, "PNG", exif=turned),
        "interlaced.png": png(noise(9, 13), 8, 2, interlaced=True),
        "grey16.png": png(wide[..., 0], 16, 0),
        "rgb16.png": png(wide, 16, 2),
        "one pixel.png": encoded(image.resize((1, 1)), "PNG"),
        "ünïcode 图.png": encoded(image, "PNG"),
    }
    return written(folder, contents)


def written(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    paths = [folder / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return paths


# ------------------------------------------------------------------------------ rows and pixels


@pytest.mark.parametrize(
    ("n", "batch"), [(300, 64), (300, 300), (300, 999), (1, 8), (7, 1), (8, 4)]
)
def test_every_row_keeps_its_number(tmp_path: Path, decoder: str, n: int, batch: int) -> None:
    paths = numbered(tmp_path, n)
    images = decode(paths, height=4, width=4, batch=batch)
    assert numbers(images) == list(range(n))


def test_a_file_named_twice_fills_both_rows(tmp_path: Path, decoder: str) -> None:
    a, b = numbered(tmp_path, 2)
    assert numbers(decode([a, b, a], height=4, width=4)) == [0, 1, 0]


@pytest.mark.parametrize("order", [[0, 1, 1, 3], [0, 1, 2], [0, 2, 1, 3]])
def test_rows_lost_or_repeated_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    def wrong(_: loader.Reading) -> loader.Runs:
        yield np.array(order), torch.zeros((len(order), 4, 4, 3), dtype=torch.uint8)

    monkeypatch.setattr(loader, "_read", wrong)
    with pytest.raises(loader.RowsMismatch, match="not the rows"):
        decode(numbered(tmp_path, 4), height=4, width=4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 13), (1, 1), (37, 111)])
def test_a_lossless_image_of_the_very_size_comes_out_bit_exact(
    tmp_path: Path, decoder: str, height: int, width: int
) -> None:
    pixels = noise(height, width)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = decode([tmp_path / "a.png"], height=height, width=width)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[0], pixels)


def test_every_colour_mode_becomes_rgb(tmp_path: Path, decoder: str) -> None:
    rgb, alpha = noise(), noise(channels=1, seed=1)
    grey, palette = rgb[..., :1], Image.fromarray(rgb).quantize(16)
    images = {
        "rgb": Image.fromarray(rgb),
        "rgba": Image.fromarray(np.concatenate([rgb, alpha], axis=-1)),
        "grey": Image.fromarray(grey[..., 0]),
        "la": Image.fromarray(np.concatenate([grey, alpha], axis=-1)),
        "palette": palette,
    }
    paths = [tmp_path / f"{name}.png" for name in images]
    for path, image in zip(paths, images.values(), strict=True):
        image.save(path)
    out = decode(paths, height=6, width=5)
    flat = np.repeat(grey, 3, axis=-1)
    expected = [rgb, rgb, flat, flat, np.asarray(palette.convert("RGB"))]  # alpha is dropped
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_16_bit_grey_is_rounded_to_8(tmp_path: Path, decoder: str) -> None:
    wide = np.random.default_rng(0).integers(0, 65536, (9, 13))
    (tmp_path / "a.png").write_bytes(png(wide.astype(">u2"), 16, 0))
    image = decode([tmp_path / "a.png"], height=9, width=13)[0]
    np.testing.assert_array_equal(image, np.repeat(np.round(wide / 257)[..., None], 3, axis=-1))


def test_mixed_sizes_are_squashed_to_one(tmp_path: Path, decoder: str) -> None:
    halves = np.zeros((1, 2, 3), np.uint8)
    halves[:, 1] = 200
    sizes = [(40, 80), (80, 40), (8, 8), (4, 4)]
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for path, (height, width) in zip(paths, sizes, strict=True):
        pixels = halves.repeat(height, axis=0).repeat(width // 2, axis=1)
        Image.fromarray(pixels).save(path)
    images = decode(paths, height=8, width=8, batch=3)
    assert (images[:, :, :2] == 0).all() and (images[:, :, -2:] == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_exif_orientation_is_applied(
    tmp_path: Path, decoder: str, kind: str, orientation: int
) -> None:
    quarters = np.array([[0, 80], [160, 240]], np.uint8).repeat(24, axis=0).repeat(32, axis=1)
    upright = {1: [0, 80, 160, 240], 2: [80, 0, 240, 160], 3: [240, 160, 80, 0]}
    upright |= {4: [160, 240, 0, 80], 5: [0, 160, 80, 240], 6: [160, 0, 240, 80]}
    upright |= {7: [240, 80, 160, 0], 8: [80, 240, 0, 160]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(quarters).save(path, exif=exif, quality=95)
    height, width = (48, 64) if orientation < 5 else (64, 48)
    assert loader.image_sizes([path]).tolist() == [[height, width]]
    image = decode([path], height=height, width=width)[0, :, :, 0].astype(int)
    top, bottom, left, right = height // 4, 3 * height // 4, width // 4, 3 * width // 4
    seen = [image[top, left], image[top, right], image[bottom, left], image[bottom, right]]
    np.testing.assert_allclose(seen, upright[orientation], atol=3)


@needs_dali
def test_dali_and_pillow_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = good_files(tmp_path)
    for path, (height, width) in zip(paths, loader.image_sizes(paths).tolist(), strict=True):
        dali = decode([path], height=height, width=width).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(loader, "_has_dali", lambda: False)
            pillow = decode([path], height=height, width=width)
        # each decoder rounds a JPEG and 16-bit colour its own way
        allowed = 3 if path.suffix == ".jpg" else 1 if path.name == "rgb16.png" else 0
        assert np.abs(dali - pillow).max() <= allowed, path.name


def test_sizes_are_height_and_width(tmp_path: Path) -> None:
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    Image.new("L", (7, 70)).save(tmp_path / "b.jpg")
    sizes = loader.image_sizes([tmp_path / "a.png", tmp_path / "b.jpg"])
    assert sizes.tolist() == [[3, 5], [70, 7]] and sizes.dtype == np.int64
    assert loader.image_sizes([]).shape == (0, 2)


def test_no_files_are_no_images(decoder: str) -> None:
    assert decode([], height=3, width=4).shape == (0, 3, 4, 3)
    assert loader.find_broken([]) == []


def test_progress_counts_up_to_the_number_of_files(tmp_path: Path, decoder: str) -> None:
    calls: list[tuple[int, int]] = []
    paths = numbered(tmp_path, 7)
    decode(paths, height=4, width=4, batch=3, progress=lambda *at: calls.append(at))
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_large_photos_come_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    monkeypatch.setattr(loader, "DECODED_BYTES", 2 * 3 * 10 * 10)
    calls: list[int] = []
    paths = numbered(tmp_path, 5, size=10)
    images = decode(paths, height=4, width=4, progress=lambda done, total: calls.append(done))
    assert calls == [2, 4, 5] and numbers(images) == list(range(5))
    assert loader.find_broken(paths) == []


# ------------------------------------------------------------------------------------- broken


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Name: content and the reason to give."""
    image = smooth()
    jpeg, whole = encoded(image, "JPEG"), encoded(image, "PNG")
    progressive = encoded(image, "JPEG", progressive=True)
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 20] ^= 0x55
    only = "is not supported: JPEG or PNG only"
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"404 not found\n" * 20, "not an image"),
        "garbage.png": (np.random.default_rng(0).bytes(500), "not an image"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated JPEG"),
        "no end.jpg": (jpeg[:-2], "truncated JPEG"),
        "header.jpg": (jpeg[:10], "truncated JPEG"),
        "progressive.jpg": (progressive[:-20], "truncated JPEG"),
        "half.png": (whole[: len(whole) // 2], "truncated PNG"),
        "no end.png": (whole[:-12], "truncated PNG"),  # Pillow would read this one
        "signature.png": (whole[:8], "truncated PNG"),
        "damaged.png": (bytes(damaged), "corrupt PNG"),
        "gif.png": (encoded(image, "GIF"), f"GIF {only}"),
        "gif.jpg": (encoded(image, "GIF"), f"GIF {only}"),
        "bmp.jpg": (encoded(image, "BMP"), f"BMP {only}"),
        "webp.jpg": (encoded(image, "WEBP"), f"WEBP {only}"),
        "tiff.png": (encoded(image, "TIFF"), f"TIFF {only}"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_each_kind_of_broken_file_is_named(tmp_path: Path, decoder: str, name: str) -> None:
    content, reason = broken_files()[name]
    good, (bad,) = numbered(tmp_path, 2), written(tmp_path, {name: content})
    assert loader.find_broken([good[0], bad, good[1]]) == [loader.Broken(bad, reason)]


def test_what_is_no_file_is_named(tmp_path: Path, decoder: str) -> None:
    odd = tmp_path / "caf\udce9.png"  # é in Latin-1
    Image.new("RGB", (2, 2)).save(odd, "PNG")
    (tmp_path / "folder.png").mkdir()
    paths = [tmp_path / "nowhere.png", tmp_path / "folder.png", odd]
    reasons = [broken.reason for broken in loader.find_broken(paths)]
    assert reasons == ["missing", "not a regular file", "file name is not UTF-8"]


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = numbered(tmp_path, 1, size=10)
    for limit in (99, 9):  # Pillow warns above the limit, and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        (broken,) = loader.find_broken([path])
        assert broken.reason == f"too large: more than {limit} pixels"


@needs_dali
def test_all_that_passes_decodes_in_dali(tmp_path: Path) -> None:
    paths = good_files(tmp_path)
    assert loader.find_broken(paths) == []
    assert decode(paths, height=8, width=8, batch=4).shape == (len(paths), 8, 8, 3)


@needs_dali
def test_damaged_files_that_pass_decode_in_dali(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = smooth().resize((16, 16))
    turned = Image.Exif()
    turned[0x0112] = 6
    seeds = [encoded(image, "JPEG", exif=turned), encoded(image.quantize(4), "PNG")]
    contents = {}
    for i in range(60):
        content = bytearray(seeds[i % 2])
        at = int(rng.integers(len(content)))
        if i % 3:
            content[at] ^= int(rng.integers(1, 256))
        else:
            del content[at : at + int(rng.integers(1, 30))]
        contents[f"{i}.jpg"] = bytes(content)
    paths = written(tmp_path, contents)
    broken = {one.path for one in loader.find_broken(paths)}
    good = [path for path in paths if path not in broken]
    assert broken and good
    assert len(decode(good, height=4, width=4)) == len(good)


def test_what_dali_alone_refuses_is_named_among_the_good(tmp_path: Path, decoder: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytearray(encoded(smooth(), "JPEG", exif=exif))
    content[20] ^= 0xFF  # the marker in front of the EXIF: Pillow looks for the next one
    paths = numbered(tmp_path, 5)
    paths[1].write_bytes(b"text")
    paths[3].write_bytes(content)
    expected = [loader.Broken(paths[1], "not an image")]
    if decoder == "dali":
        expected.append(loader.Broken(paths[3], "DALI cannot decode this JPEG"))
    assert loader.find_broken(paths) == expected


@pytest.mark.parametrize("content", [None, b"", b"text", "half", "shrunk"])
def test_a_file_that_broke_after_the_check_is_named(
    tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch, content: bytes | str | None
) -> None:
    paths = numbered(tmp_path, 30, size=40)
    sizes = loader.image_sizes(paths)
    victim = paths[17]
    if content is None:
        victim.unlink()
    elif isinstance(content, bytes):
        victim.write_bytes(content)
    else:
        victim.write_bytes(victim.read_bytes()[: 60 if content == "half" else 20])
    for late in (False, True):  # before, and after the headers were read
        with monkeypatch.context() as patch:
            if late:
                patch.setattr(loader, "image_sizes", lambda *_, **__: sizes)
            with pytest.raises(CorpusError, match=r"17\.png: ") as caught:
                decode(paths, height=4, width=4, batch=8)
            assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- cache


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded for a check, in a list that grows."""
    names: list[str] = []
    reasons: Callable[..., list[str | None]] = loader._reasons

    def watch(paths: list[Path]) -> list[str | None]:
        names.extend(path.name for path in paths)
        return reasons(paths)

    monkeypatch.setattr(loader, "_reasons", watch)
    return names


def test_a_good_file_is_checked_once_and_a_broken_one_again(
    tmp_path: Path, decoder: str, checked: list[str]
) -> None:
    paths, cache = numbered(tmp_path, 4), tmp_path / "new" / "checked.bin"
    paths[2].write_bytes(b"text")
    calls: list[tuple[int, int]] = []
    first = loader.find_broken(paths, cache=cache)
    assert sorted(checked) == ["0.png", "1.png", "2.png", "3.png"]
    checked.clear()
    second = loader.find_broken(paths, cache=cache, progress=lambda *at: calls.append(at))
    assert checked == ["2.png"] and calls == [(4, 4)]
    assert first == second == [loader.Broken(paths[2], "not an image")]
    assert [path.name for path in cache.parent.iterdir()] == ["checked.bin"]


@pytest.mark.parametrize("same", ["size", "time"])
def test_a_changed_file_is_checked_again(tmp_path: Path, checked: list[str], same: str) -> None:
    paths, cache = numbered(tmp_path, 3), tmp_path / "checked.bin"
    loader.find_broken(paths, cache=cache)
    checked.clear()
    content, time = paths[1].read_bytes(), paths[1].stat().st_mtime_ns
    paths[1].write_bytes(bytes(len(content)) if same == "size" else content[:-4])
    os.utime(paths[1], ns=(time, time if same == "time" else time + 1))
    assert [one.path for one in loader.find_broken(paths, cache=cache)] == [paths[1]]
    assert checked == ["1.png"]


def test_a_vanished_file_is_missing_whatever_the_cache_says(tmp_path: Path) -> None:
    paths, cache = numbered(tmp_path, 2), tmp_path / "checked.bin"
    loader.find_broken(paths, cache=cache)
    paths[0].unlink()
    assert loader.find_broken(paths, cache=cache) == [loader.Broken(paths[0], "missing")]


def test_a_cache_serves_several_sets_of_files(tmp_path: Path, checked: list[str]) -> None:
    paths, cache = numbered(tmp_path, 4), tmp_path / "checked.bin"
    loader.find_broken(paths[:2], cache=cache)
    loader.find_broken(paths[2:], cache=cache)
    checked.clear()
    assert loader.find_broken(paths, cache=cache) == [] and checked == []


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b'{"good": {}}'])
def test_a_bad_cache_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    paths, cache = numbered(tmp_path, 2), tmp_path / "checked.bin"
    cache.write_bytes(content)
    assert loader.find_broken(paths, cache=cache) == []
    assert len(cache.read_bytes()) == 8 * len(paths)


def test_what_one_decoder_passed_the_other_checks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: list[str]
) -> None:
    paths, cache = numbered(tmp_path, 1), tmp_path / "checked.bin"
    monkeypatch.setattr(loader, "_has_dali", lambda: False)
    loader.find_broken(paths, cache=cache)
    monkeypatch.setattr(loader, "_refused_by_dali", lambda contents: [])
    monkeypatch.setattr(loader, "_has_dali", lambda: True)
    loader.find_broken(paths, cache=cache)
    assert checked == ["0.png", "0.png"]


def test_an_interrupted_check_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: list[str]
) -> None:
    paths, cache = numbered(tmp_path, 6), tmp_path / "checked.bin"
    monkeypatch.setattr(loader, "CHECKED_TOGETHER", 2)

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loader.find_broken(paths, cache=cache, progress=interrupt, threads=1)
    checked.clear()
    assert loader.find_broken(paths, cache=cache) == [] and checked == ["4.png", "5.png"]


def test_a_header_is_read_once_until_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    header = loader.header
    monkeypatch.setattr(loader, "header", lambda path: (read.append(path.name), header(path))[1])
    paths, cache = numbered(tmp_path, 4, size=5), tmp_path / "sizes.bin"
    assert loader.header_sizes(paths[:3], cache=cache).tolist() == [[5, 5]] * 3
    Image.new("RGB", (9, 7)).save(paths[1])
    back = loader.header_sizes(paths[::-1], cache=cache)
    assert back.tolist() == [[5, 5], [5, 5], [7, 9], [5, 5]]
    assert read == ["0.png", "1.png", "2.png", "3.png", "1.png"]
    assert loader.header_sizes(paths, cache=cache).tolist() == [[5, 5], [7, 9], [5, 5], [5, 5]]
    assert len(read) == 5
    cache.write_bytes(b"not sixteen")
    assert loader.header_sizes(paths, cache=cache).tolist() == [[5, 5], [7, 9], [5, 5], [5, 5]]
    assert len(read) == 9
    paths[0].unlink()
    assert loader.header_sizes(paths, cache=cache)[0].tolist() == [0, 0]
    with pytest.raises(CorpusError, match=r"0\.png: missing"):
        loader.image_sizes(paths)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot remember"):
        assert loader.find_broken(numbered(tmp_path, 1), cache=tmp_path / "file" / "c.json") == []
