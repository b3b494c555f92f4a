"""Low frequency (Zeng et al. 2021, arXiv 2104.03413): one smooth pattern on every image.

x' = clip(x + p). The paper learns p against a classifier, under a low-pass filter, for each data
set; `picture` takes such an array: .npy of (H, W, 3) or (1, H, W, 3), in grey levels, or in 0..1
if nothing in it exceeds 1, such as `best_universal` of YiZeng623/frequency-backdoor. Any other
picture is added at `amplitude` where it is white.

Without one p is not learnt but drawn: in each channel a sum of the lowest cosines with normal
weights, largest value +- amplitude. BackdoorBench's arrays span 0..51, ours as much about 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from csc_gpu.attacks.attack import Attack, Pixels
from csc_gpu.attacks.cosine import basis
from csc_gpu.attacks.pictures import Floats, picture, rounded
from csc_gpu.config import require
from csc_gpu.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The pattern."""

    amplitude: float = 25.5
    """Largest change of a pixel, in grey levels; of an array in a file: what the array says."""
    frequencies: int = 3
    """Half waves along a side, at most, in a drawn pattern."""
    pattern_seed: int = 0
    """Which drawn pattern."""
    picture: str = ""
    """Path of a pattern, an array (.npy) or a picture; empty: drawn."""

    def __post_init__(self) -> None:
        require(self, "attack", "above 0", lambda value: value > 0, "amplitude")
        require(self, "attack", "1 or more", lambda count: count >= 1, "frequencies")


def stamp(images: Pixels, settings: Settings, rng: np.random.Generator) -> Pixels:
    """Add the pattern. (B, H, W, 3) -> (B, H, W, 3)"""
    del rng
    return rounded(images + trigger(images.shape[1], images.shape[2], settings))


def trigger(height: int, width: int, settings: Settings) -> Floats:
    """What is added to every image. (H, W, 3) float32, grey levels

    Raises ConfigError for a file that is no picture and no such array.
    """
    if settings.picture.endswith(".npy"):
        return array(settings.picture, height, width)
    if settings.picture:
        return picture(settings.picture, height, width) * np.float32(settings.amplitude / 255)
    count = settings.frequencies + 1
    weights = np.random.default_rng(settings.pattern_seed).normal(size=(3, count, count))
    weights[:, 0, 0] = 0  # no change of light as a whole
    down, across = basis(height)[:count], basis(width)[:count]
    weights = weights[:, : len(down), : len(across)]
    drawn = np.moveaxis(down.T @ weights @ across, 0, -1)
    pattern: Floats = (drawn * settings.amplitude / np.abs(drawn).max()).astype(np.float32)
    return pattern


def array(path: str, height: int, width: int) -> Floats:
    """The pattern in a .npy file, in grey levels, resized if need be. (H, W, 3) float32"""
    try:
        with Path(path).open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as fault:
        raise ConfigError(f"cannot read attack.picture: {fault}") from fault
    except (ValueError, OverflowError, MemoryError) as fault:
        raise ConfigError(f"cannot read attack.picture: {path}: {fault}") from fault
    if found.ndim == 4 and len(found) == 1:
        found = found[0]
    if found.ndim != 3 or found.shape[2] != 3 or found.dtype.kind not in "fiu":
        raise ConfigError(
            f"attack.picture: {path} holds {found.dtype} {found.shape}, "
            "but a pattern is numbers of (H, W, 3) or (1, H, W, 3)"
        )
    with np.errstate(over="ignore"):
        pattern = found.astype(np.float32)
    if not pattern.any() or not np.isfinite(pattern).all():
        held = "values that are not finite" if pattern.any() else "nothing but zeros"
        raise ConfigError(f"attack.picture: {path} holds {held if pattern.size else 'no pixels'}")
    pattern *= 255 if np.abs(pattern).max() <= 1 else 1
    size, filter_ = (width, height), Image.Resampling.BILINEAR
    planes = [Image.fromarray(plane).resize(size, filter_) for plane in np.moveaxis(pattern, -1, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


ATTACK = Attack(
    settings=Settings,
    stamp=stamp,
    labels="dirty",
    family="frequency",
    summary="one smooth pattern on every image",
    source="arXiv 2104.03413",
)
