"""Images of a run: suspects beside benign ones, what sets them apart, thumbnails for the map."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csc_gpu.report.findings import Findings
from csc_gpu.sources import Album

Pixels = NDArray[np.uint8]
SHOWN = 12
"""Images of each kind in the gallery of a label."""
AVERAGED = 400
"""Images of each kind that a mean is taken of, at most."""
FEWEST = 4
"""A mean of fewer images shows the images, not what they have in common."""
NOTHING = 8.0
"""Images that vary less at some place, in grey levels, are as good as equal there."""
LARGEST = 96
"""Longest side of an image in the gallery, in pixels."""
THUMB = 32
"""Longest side of a thumbnail, in pixels."""
COLUMNS = 40
"""Thumbnails side by side in their sheet."""
QUALITY = 80
"""Of the sheet of thumbnails, as JPEG."""


@dataclass(frozen=True)
class Shown:
    """One image of the gallery."""

    image: str  # as a data URI
    name: str


@dataclass(frozen=True)
class Gallery:
    """A label's suspects beside its other rows, and what tells them apart."""

    label: str
    n_suspects: int
    n_others: int
    suspects: list[Shown]
    others: list[Shown]
    means: list[Shown]  # of suspects, of others, the difference, where suspects agree; or none


@dataclass(frozen=True)
class Thumbnails:
    """One sheet with an image for every drawn row, line by line."""

    sheet: str  # a data URI
    width: int  # of a thumbnail, in pixels
    height: int
    columns: int


def gallery(found: Findings, album: Album, label: str) -> Gallery:
    """Raises CorpusError if an image cannot be read."""
    assert found.suspects is not None
    guilty, others = found.rows(label)
    rng = np.random.default_rng(0)
    kinds = [rng.permutation(rows)[:AVERAGED] for rows in (guilty, others)]
    kinds[0] = guilty[:AVERAGED]  # the likeliest
    pixels = [album.images(rows, LARGEST) for rows in kinds]
    paths = found.suspects.paths
    suspects, benign = (
        [Shown(png(image), paths[row]) for row, image in zip(rows[:SHOWN], images, strict=False)]
        for rows, images in zip(kinds, pixels, strict=True)
    )
    enough = min(map(len, pixels)) >= FEWEST
    means = compared(*pixels) if enough else []
    return Gallery(label, len(guilty), len(others), suspects, benign, means)


def compared(suspects: Pixels, others: Pixels) -> list[Shown]:
    """Two means, their difference, and where suspects vary less than others do."""
    mean, rest = (images.mean(axis=0, dtype=np.float32) for images in (suspects, others))
    return [
        Shown(png(_rounded(mean)), "mean of the suspects"),
        Shown(png(_rounded(rest)), "mean of the others"),
        Shown(png(difference(mean, rest)), "difference of the means, stretched"),
        Shown(png(agreement(suspects, others)), "bright: where suspects are alike, others not"),
    ]


def difference(mean: NDArray[np.float32], rest: NDArray[np.float32]) -> Pixels:
    """Grey where the means (H, W, 3) are equal; the largest difference is black or white."""
    off = mean - rest
    return _rounded(127.5 + 127.5 * off / max(float(np.abs(off).max()), 1.0))


def agreement(suspects: Pixels, others: Pixels) -> Pixels:
    """White where suspects (n, H, W, 3) do not vary and others do; black where both do, or none.

    (H, W, 3)
    """
    spread = [images.std(axis=0, dtype=np.float32).mean(axis=-1) for images in (suspects, others)]
    alike = (spread[1] - spread[0]) / np.maximum(spread[1], NOTHING)
    grey = _rounded(255 * np.clip(alike, 0, 1))
    return np.repeat(grey[..., None], 3, axis=-1)


def thumbnails(found: Findings, album: Album) -> Thumbnails:
    """Of every row that is drawn. Raises CorpusError if an image cannot be read."""
    assert found.drawing is not None
    images = album.images(found.drawing.rows, THUMB)
    n, height, width, _ = images.shape
    columns = min(n, COLUMNS)
    lines = -(-n // columns)
    sheet = np.zeros((lines * columns, height, width, 3), np.uint8)
    sheet[:n] = images
    tiled = sheet.reshape(lines, columns, height, width, 3).swapaxes(1, 2)
    file = io.BytesIO()
    Image.fromarray(tiled.reshape(lines * height, columns * width, 3)).save(
        file, "JPEG", quality=QUALITY, subsampling=0
    )
    return Thumbnails(_uri("jpeg", file.getvalue()), width, height, columns)


def png(image: Pixels) -> str:
    """One image (H, W, 3) as a data URI."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return _uri("png", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _rounded(values: NDArray[np.float32]) -> Pixels:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
