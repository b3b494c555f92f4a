"""The orthonormal discrete cosine transform (DCT-II), and colours as light and two differences.

Both are linear. To add m to coefficient (u, v) of one channel and transform back is therefore to
add m b_u b_v to the pixels, b_u row u of the basis, whatever the image: an attack on coefficients
is a fixed pattern, and the images need not be transformed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Waves = NDArray[np.float32]

LIGHT = np.array([0.299, 0.587, 0.114])
RED, BLUE = np.eye(3)[[0, 2]]
YCRCB = np.stack([LIGHT, 0.713 * (RED - LIGHT), 0.564 * (BLUE - LIGHT)])
"""RGB -> Y, Cr, Cb, less the offset of 128 that OpenCV adds to the last two."""
YUV = np.stack([LIGHT, 0.492 * (BLUE - LIGHT), 0.877 * (RED - LIGHT)])
"""RGB -> Y, U, V."""


def basis(count: int) -> NDArray[np.float64]:
    """The cosines, one a row, lowest frequency first; rows are orthonormal. (count, count)"""
    frequency, place = np.arange(count)[:, None], np.arange(count)
    rows: NDArray[np.float64] = np.cos(np.pi * frequency * (2 * place + 1) / (2 * count)) * np.sqrt(
        2 / count
    )
    rows[0] /= np.sqrt(2)
    return rows


def waves(height: int, width: int, at: Iterable[tuple[int, int]], magnitude: float) -> Waves:
    """What has this magnitude at these (row, column) coefficients, 0 at all others. (H, W)"""
    down, across = basis(height), basis(width)
    found = np.zeros((height, width))
    for row, column in at:
        found += magnitude * np.outer(down[row], across[column])
    return found.astype(np.float32)


def in_colour(differences: Waves, space: NDArray[np.float64]) -> Waves:
    """The RGB of a pattern that both colour differences have, and no light. (H, W) -> (H, W, 3)"""
    towards = np.linalg.inv(space)[:, 1:].sum(axis=1).astype(np.float32)
    pattern: Waves = differences[:, :, None] * towards
    return pattern


def fitted(place: int, size: int, drawn_for: int) -> int:
    """A coefficient's place in a transform that is smaller than the one it was chosen for."""
    return place * min(size, drawn_for) // drawn_for
