"""TensorBoard: curves of every training, and the clusters of every snapshot as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.errors import ConfigError
from csc_gpu.train import Moment
from csc_gpu.types import Array, Sighting

ROWS = 20
"""Clusters of a snapshot and scale that the table shows, the largest."""


class Board:
    """A writer of TensorBoard files in a folder; `down` brings arrays of the device to the host.

    Raises ConfigError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, down: Callable[[Array], NDArray[Any]]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as fault:
            raise ConfigError(
                "tensorboard is not installed: pip install 'csc-gpu[tensorboard]', or leave "
                "--tensorboard out"
            ) from fault
        self._writer: Any = SummaryWriter(str(folder))
        self._down = down

    def epoch(self, stage: str, at: Moment, told: dict[str, float]) -> None:
        """Loss, learning rate and what else is told, at the end of an epoch."""
        for name, value in {"loss": float(at.loss), "lr": at.lr, **told}.items():
            self._writer.add_scalar(f"{stage}/{name}", value, at.step)

    def snapshot(self, sighting: Sighting) -> None:
        """How many clusters each scale has, and the largest of the coarsest scale as a table."""
        at = round(100 * sighting.epoch)  # steps are whole numbers: hundredths of an epoch
        for clusters in sighting.clusterings:
            name = f"snapshot/clusters at {clusters.scale:g}"
            self._writer.add_scalar(name, len(clusters.size), at)
        if sighting.clusterings:
            self._writer.add_text("snapshot/largest clusters", table(sighting, self._down), at)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def table(sighting: Sighting, down: Callable[[Array], NDArray[Any]]) -> str:
    """The largest clusters of a snapshot's coarsest scale, as Markdown."""
    clusters = sighting.clusterings[-1]
    size, labels, density = map(down, (clusters.size, clusters.labels, clusters.density))
    lines = ["| cluster | rows | label | purity | density |", "|---|---|---|---|---|"]
    for row in np.argsort(-size, kind="stable")[:ROWS]:
        purity = labels[row].max() / max(1, labels[row].sum())
        label = labels[row].argmax()
        lines.append(f"| {row} | {size[row]} | {label} | {purity:.3f} | {density[row]:.4g} |")
    return "\n".join(lines)
