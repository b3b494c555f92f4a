"""The study's pictures: a dot for each cell, and the features of one cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Groups = Sequence[tuple[str, Mapping[str, Sequence[float | None]]]]
KINDS = {  # colour, order of drawing
    "benign, other labels": ("#d0d0d0", 0),
    "benign, of the label": ("#4c78a8", 1),
    "poison, found": ("#54a24b", 2),
    "poison, missed": ("#e45756", 3),
    "benign, flagged": ("#f58518", 4),
}


def dots(groups: Groups, titles: Sequence[str], path: Path) -> None:
    """A panel for each title, a line for each group of cells, a dot for each cell's value."""
    figure, panels = plt.subplots(
        1, len(titles), figsize=(3 + 2.6 * len(titles), 0.9 + 0.24 * len(groups)), sharey=True
    )
    for panel, title in zip(np.atleast_1d(panels), titles, strict=True):
        for line, (_, values) in enumerate(groups):
            known = [value for value in values[title] if value is not None]
            panel.plot(known, [line] * len(known), "o", ms=5, alpha=0.6, color="#4c78a8")
        panel.set_title(title, fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(labelsize=7)
    first = np.atleast_1d(panels)[0]
    first.set_yticks(range(len(groups)), [name for name, _ in groups])
    first.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scatter(points: Any, kinds: Any, title: str, path: Path) -> None:
    """Features (N, 2) on two principal axes, coloured by kind (N,), a key of KINDS."""
    figure, panel = plt.subplots(figsize=(6, 4.5))
    for kind, (colour, order) in KINDS.items():
        mine = kinds == kind
        panel.plot(
            *points[mine].T,
            ".",
            ms=3 + order,
            color=colour,
            label=f"{kind}: {mine.sum()}",
            zorder=order,
        )
    panel.legend(fontsize=7, markerscale=1.5)
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
