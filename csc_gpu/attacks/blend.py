"""Blend (Chen et al. 2017, arXiv 1712.05526): one fixed picture or noise over the whole image.

x' = (1 - alpha) x + alpha t, rounded. The noise is one pattern for all images: a fresh one each
would leave nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from csc_gpu.config import require
from csc_gpu.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is blended in, and how strongly."""

    alpha: float = 0.2
    """Share of the trigger in the blend."""
    picture: str = ""
    """Path of a picture; empty: uniform noise."""
    pattern_seed: int = 0
    """Which noise."""

    def __post_init__(self) -> None:
        require(self, "attack", "in (0, 1]", lambda share: 0 < share <= 1, "alpha")

    def variant(self, number: int) -> Settings:
        """The trigger of the number-th target: other noise. Raises ConfigError for a picture."""
        if number and self.picture:
            raise ConfigError("several targets need several triggers; blend has one picture")
        return replace(self, pattern_seed=self.pattern_seed + number)


def stamp(images: NDArray[np.uint8], settings: Settings) -> NDArray[np.uint8]:
    """Blend the trigger in. (B, H, W, 3) -> (B, H, W, 3)"""
    trigger = _trigger(images.shape[1], images.shape[2], settings)
    blended = (1 - settings.alpha) * images.astype(np.float32) + settings.alpha * trigger
    return np.rint(blended).clip(0, 255).astype(np.uint8)


def _trigger(height: int, width: int, settings: Settings) -> NDArray[np.float32]:
    if not settings.picture:
        rng = np.random.default_rng(settings.pattern_seed)
        return rng.integers(0, 256, (height, width, 3)).astype(np.float32)
    try:
        with Image.open(Path(settings.picture)) as picture:
            fitted = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError) as fault:
        raise ConfigError(f"cannot read attack.picture: {fault}") from fault
    return np.asarray(fitted, np.float32)
