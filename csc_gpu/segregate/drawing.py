"""Some rows of the snapshots that counted, in two dimensions: for people, no rule reads it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.segregate.rules import RULES
from csc_gpu.segregate.settings import Settings
from csc_gpu.types import Array, Clusters, Drawing, Mask, Sighting

SUSPECTS = 500
"""Suspects that are drawn, at most."""
OTHERS = 1000
"""Other rows that are drawn, at most."""


def drawing(
    sightings: Sequence[Sighting], suspect: Mask, settings: Settings, backend: Backend
) -> Drawing | None:
    """What to draw of these snapshots; None if none of them was clustered."""
    seen = [sighting for sighting in sightings if sighting.plane is not None]
    if not seen:
        return None
    rows = drawn(suspect)
    planes: list[Array] = [sighting.plane for sighting in seen]
    up, down = backend.xp.asarray(rows), backend.to_numpy
    shown = [decisive(sighting, settings, backend) for sighting in seen]
    return Drawing(
        rows=rows,
        epoch=np.array([sighting.epoch for sighting in seen]),
        plane=np.stack([down(plane[up]).astype(np.float16) for plane in planes]),
        scale=np.array([clusters.scale for clusters in shown]),
        cluster=np.stack([down(clusters.of_row[up]).astype(np.int32) for clusters in shown]),
        reach=np.stack([down(sighting.reach).astype(np.float32) for sighting in seen]),
    )


def drawn(suspect: Mask) -> NDArray[np.int64]:
    """Suspects and other rows, drawn at random where there are many, in order. (V,)"""
    rng = np.random.default_rng(0)
    kinds = ((np.flatnonzero(suspect), SUSPECTS), (np.flatnonzero(~suspect), OTHERS))
    some = [rng.permutation(rows)[:most] for rows, most in kinds]
    return np.sort(np.concatenate(some))


def decisive(sighting: Sighting, settings: Settings, backend: Backend) -> Clusters:
    """The clusters at the scale at which most rows are named; at the coarsest, if none are."""
    rule, xp = RULES[settings.rule], backend.xp

    def named(clusters: Clusters) -> int:
        if not len(clusters.size):
            return 0
        return int((clusters.size * rule.names(clusters, settings, xp)).sum())

    counted = [c for c in sighting.clusterings if c.scale <= settings.coarsest]
    return max(reversed(counted or sighting.clusterings), key=named)
