"""Pictures as triggers, fitted to the images they are put on, and what puts them there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csc_gpu.attacks.attack import Pixels
from csc_gpu.errors import ConfigError

Floats = NDArray[np.float32]


def picture(path: str, height: int, width: int, setting: str = "attack.picture") -> Floats:
    """The picture in a file, resized if need be; black where it is transparent. (H, W, 3) float32,
    0..255

    Raises ConfigError, naming the setting, for a file that is no picture.
    """
    pixels = _read(path, height, width, setting, Image.Resampling.BILINEAR)
    # what lies under transparent pixels is whatever the last program left there
    return np.asarray(pixels[:, :, :3] * (pixels[:, :, 3:] > 0), np.float32)


def mask(path: str, height: int, width: int, setting: str = "attack.mask") -> Floats:
    """Where a picture is not black, 1, else 0; of one with transparent places: where it has none.
    (H, W, 1) float32

    Raises ConfigError, naming the setting, for a file that is no picture, or nothing at this size.
    """
    nearest = Image.Resampling.NEAREST  # a mask has no half-tones
    pixels = _read(path, height, width, setting, nearest)
    drawn, opaque = pixels[:, :, :3].max(axis=2, keepdims=True) > 0, pixels[:, :, 3:] > 0
    found = drawn if opaque.all() else opaque  # a sticker may be black
    if not found.any():
        raise ConfigError(
            f"{setting}: {path} is black all over at {height}x{width}, so nothing would be stamped"
        )
    return np.asarray(found, np.float32)


def over(images: Pixels, trigger: Floats, where: Floats | float) -> Pixels:
    """The trigger over the images: x + where (t - x), rounded. (B, H, W, 3)

    trigger (H, W, 3) or (B, H, W, 3) in 0..255; where is 0..1, one number or a mask that fits.
    """
    x = images.astype(np.float32)
    return rounded(x + where * (trigger - x))


def rounded(images: NDArray[np.floating]) -> Pixels:
    """Grey levels of 0..255, to the nearest; what is outside is clipped, never wrapped."""
    pixels: Pixels = np.rint(images).clip(0, 255).astype(np.uint8)
    return pixels


def _read(path: str, height: int, width: int, setting: str, filter_: Image.Resampling) -> Pixels:
    """Red, green, blue and how opaque. (H, W, 4)"""
    try:
        with Image.open(Path(path)) as found:
            if found.mode[0] in "IF":  # convert("RGB") would turn all of it white
                raise ConfigError(
                    f"cannot read {setting}: {path} has more than 8 bits a pixel and channel "
                    f"({found.mode}); save it with 8"
                )
            return np.asarray(found.convert("RGBA").resize((width, height), filter_))
    except OSError as fault:
        raise ConfigError(f"cannot read {setting}: {fault}") from fault
    except (SyntaxError, ValueError, Image.DecompressionBombError) as fault:  # broken chunks
        raise ConfigError(f"cannot read {setting}: {path}: {fault}") from fault
