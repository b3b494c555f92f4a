"""A sample of the rows that are clustered together, and every other row joined to it.

Where all pairs are out of reach DBSCAN sees a sample, and every row takes the cluster of its
nearest core row in the sample, if that lies within the radius (compare DBSCAN++, ICML 2019).
min_samples is the same share of the sample as of all rows, so that it means the same density.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from csc_gpu.types import Array

AT_A_TIME = 2**24
"""Squared distances held at a time."""


class Joined:
    """The nearest core row of every row, while the radius grows: a core row stays one."""

    def __init__(self, z: Array, sample: Array, reach: Array, xp: ModuleType) -> None:
        """z (N, D) are all rows, sample (M,) some of them, reach (M,) those rows' k-distances."""
        self._z, self._sample, self._reach, self._xp = z, sample, reach, xp
        self._radius = -1.0
        self._distance = xp.full(len(z), float("inf"), xp.float32)  # to the nearest core row so far
        self._nearest = xp.zeros(len(z), xp.int32)  # its place in the sample

    def clusters(self, found: Array, eps: float) -> Array:
        """The cluster of every row, from those of the sample (M,) at no smaller radius than before.

        The rows of the sample are treated as all others, so that equal rows are in one cluster.
        (N,) int32, -1 for noise
        """
        xp, reach = self._xp, self._reach
        new = xp.flatnonzero((reach <= eps) & (reach > self._radius))
        self._radius = eps
        for some, distance, row in nearest(self._z, self._z[self._sample[new]], xp):
            closer = distance < self._distance[some]
            self._nearest[some] = xp.where(closer, new[row], self._nearest[some])
            self._distance[some] = xp.where(closer, distance, self._distance[some])
        of_core = xp.where(reach <= eps, found, -1)
        return xp.where(self._distance <= eps, of_core[self._nearest], -1).astype(xp.int32)


def nearest(rows: Array, points: Array, xp: ModuleType) -> Iterator[tuple[slice, Array, Array]]:
    """Block by block: how far each row (N, D) is from its nearest point (P, D), and which it is.

    Who is nearest comes from |p|^2 - 2xp in float32, one product a block; how far is then measured.
    """
    if not len(points):
        return
    lengths = (points * points).sum(axis=1)
    turned = xp.ascontiguousarray((-2 * points).T)
    step = max(1, AT_A_TIME // len(points))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        squared = rows[some] @ turned
        squared += lengths
        row = squared.argmin(axis=1)
        yield some, xp.linalg.norm(rows[some] - points[row], axis=1), row
