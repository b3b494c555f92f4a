"""One snapshot seen at several scales: features scaled, projected, clustered, described.

Before they are clustered rows are put into an order of their own, so that the order in which they
come changes nothing, not even a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.segregate.sample import Joined
from csc_gpu.segregate.settings import BY_LABEL, Settings
from csc_gpu.types import Array, Clusters, Sighting

HASH_FACTOR = 6364136223846793005
"""Knuth's multiplier for 64-bit linear congruential generators (MMIX)."""
BLOCK = 65_536
"""Rows embedded at a time, so that no second copy of all the features is ever held."""
CURVE = 101
"""Points of the k-distance curve that are kept."""
SMALLEST_EPS = 1e-6
"""DBSCAN wants a radius above zero, also where most rows are equal."""


def observe(
    points: Array,
    labels: NDArray[np.int64],
    epoch: float,
    settings: Settings,
    backend: Backend,
    *,
    scales: Sequence[float] | None = None,
) -> Sighting:
    """One snapshot's features (N, D): strays, and clusters at these scales, or at all.

    All rows are clustered together, or each label's alone, as the rule wants it; too many of them
    as a sample, which the others join. Sizes and labels of clusters are of all rows even so,
    densities of those asked for their k-distance among the rows that DBSCAN saw.
    """
    xp = backend.xp
    labels = xp.asarray(labels)
    settings = settings.suited(len(xp.unique(labels)))
    stray = strays(points, labels, xp)
    scales = sorted(settings.scales if scales is None else scales)
    if not scales:
        return Sighting(epoch, (), least_neighbours(len(points), settings), stray)
    order = own_order(points, labels, xp)
    z, labels = embed(points, order, settings.pca, xp), labels[order]
    n_classes, back = int(labels.max()) + 1, xp.argsort(order)
    if settings.rule in BY_LABEL:
        rooms = [xp.flatnonzero(labels == label) for label in backend.to_numpy(xp.unique(labels))]
    else:
        rooms = [slice(None)]  # a view, no copy
    rooms = [Room(z, rows, settings, backend) for rows in rooms]
    asked, reach = (
        xp.concatenate([getattr(r, name) for r in rooms]) for name in ("asked", "reach")
    )
    clusterings = []
    for scale in scales:
        of_row, n_clusters = xp.full(len(z), -1, xp.int32), 0
        for room in rooms:
            eps, found = room.clustered(scale)
            of_row[room.rows] = xp.where(found >= 0, found + n_clusters, -1)
            n_clusters = int(of_row.max()) + 1
        size, held, density = describe(of_row, labels, n_classes, reach, of_row[asked], xp)
        told = eps if len(rooms) == 1 else float("nan")  # each label has a radius of its own
        clusterings.append(Clusters(of_row[back], size, held, density, told, scale))
    seen = sum(room.seen for room in rooms)
    least = least_neighbours(seen, settings)
    # with fewer than two components (or all of them) z holds no two principal ones
    drawn = z if 2 <= settings.pca < points.shape[1] else embed(points, order, 2, xp)
    return Sighting(
        epoch,
        tuple(clusterings),
        least,
        stray,
        seen if seen < len(z) else 0,
        _plane(drawn, xp)[back],
        xp.quantile(reach, xp.linspace(0, 1, CURVE)),
    )


def _plane(z: Array, xp: ModuleType) -> Array:
    """The first two columns, the second empty if there is one alone. (N, 2) float16"""
    plane = xp.zeros((len(z), 2), xp.float16)
    plane[:, : z.shape[1]] = z[:, :2]
    return plane


class Room:
    """Rows that are clustered together: all of them by DBSCAN, or a sample that the others join."""

    def __init__(self, z: Array, rows: Array, settings: Settings, backend: Backend) -> None:
        """z (N, D) are the embedded rows in an order of their own, `rows` those of this room."""
        self.rows, self._z, self._backend = rows, z, backend
        xp, room = backend.xp, z[rows]
        self.seen = settings.seen(len(room))
        self._least = least_neighbours(self.seen, settings)
        self._sample: Array = slice(None)
        joins = self.seen < len(room)
        if joins:
            self._sample = evenly(len(room), self.seen, xp)
        some = room[self._sample]
        # a sample is asked as a whole, for that tells who is a core row
        asked = evenly(self.seen, self.seen if joins else settings.k_rows, xp)
        self.reach = backend.neighbors(some, min(self._least, self.seen), some[asked])
        self.asked = xp.arange(len(z))[rows][self._sample][asked]
        self._joined = Joined(room, self._sample, self.reach, xp) if joins else None

    def clustered(self, scale: float) -> tuple[float, Array]:
        """The radius at a scale, no finer one than before, and the cluster of every row. (n,)"""
        eps = max(float(self._backend.xp.quantile(self.reach, scale)), SMALLEST_EPS)
        points = self._z[self.rows][self._sample]
        found = self._backend.dbscan(points, eps=eps, min_samples=self._least)
        return eps, self._joined.clusters(found, eps) if self._joined else found


def strays(points: Array, labels: Array, xp: ModuleType) -> Array:
    """Rows (N, D) nearer, by angle, to another label's mean than to that of their own. (N,) bool"""
    present = xp.unique(labels)
    total = xp.zeros((len(present), points.shape[1]), xp.float32)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(points), BLOCK)]
    for block in blocks:
        is_of = (labels[block] == present[:, None]).astype(xp.float32)  # (C, B)
        total += is_of @ _unit(taken(points, block, xp), xp)
    means = _unit(total, xp)
    stray = xp.empty(len(points), bool)
    for block in blocks:
        stray[block] = present[(taken(points, block, xp) @ means.T).argmax(axis=1)] != labels[block]
    return stray


def taken(points: Array, rows: Array, xp: ModuleType) -> Array:
    """Some rows of features (N, D), whatever they are kept as and wherever. (B, D) float32"""
    return points[rows].astype(xp.float32, copy=False)


def _unit(rows: Array, xp: ModuleType) -> Array:
    length = xp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / xp.where(length > 0, length, 1)


def evenly(n: int, most: int, xp: ModuleType) -> Array:
    """At most so many of n positions, evenly. In an order of the rows' own, a random sample."""
    return xp.linspace(0, n - 1, min(n, most)).astype(xp.int64)


def least_neighbours(n: int, settings: Settings) -> int:
    """DBSCAN's min_samples for n rows, by settings that suit their labels."""
    return max(settings.min_rows, round(settings.min_share * n))


def own_order(points: Array, labels: Array, xp: ModuleType) -> Array:
    """An order of the rows that depends on what they hold, not on how they come. (N,)

    Rows are sorted by a 64-bit hash of their bits and label, in whole numbers, which do not round.
    """
    key = labels.astype(xp.uint64)
    for start in range(0, len(points), BLOCK):
        block = slice(start, start + BLOCK)
        bits = xp.ascontiguousarray(taken(points, block, xp)).view(xp.uint32)
        for column in bits.T:
            key[block] = key[block] * xp.uint64(HASH_FACTOR) + column
    return xp.argsort(key, kind="stable")


def embed(points: Array, order: Array, dims: int, xp: ModuleType) -> Array:
    """Rows in this order, scaled to length 1, centred, on `dims` principal components. (N, dims)

    Block by block: beside the features no more is held than a block and the result.
    """
    n, n_features = points.shape
    blocks = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]

    def unit(block: slice) -> Array:
        return _unit(taken(points, order[block], xp), xp)

    total = sum(unit(block).sum(axis=0, dtype=xp.float64) for block in blocks)
    mean = (total / n).astype(xp.float32)
    projected = 0 < dims < n_features
    if projected:
        scatter = xp.zeros((n_features, n_features), xp.float64)
        for block in blocks:
            centred = unit(block) - mean
            scatter += centred.T @ centred
        axes = xp.linalg.eigh(scatter)[1][:, ::-1][:, :dims].astype(xp.float32)
    z = xp.empty((n, dims if projected else n_features), xp.float32)
    for block in blocks:
        if projected:
            xp.matmul(unit(block) - mean, axes, out=z[block])
        else:
            xp.subtract(unit(block), mean, out=z[block])
    return z


def describe(
    of_row: Array, labels: Array, n_classes: int, reach: Array, of_asked: Array, xp: ModuleType
) -> tuple[Array, Array, Array]:
    """Of each cluster: its rows (K,), its rows of each label (K, C), its density (K,).

    Density is the number of asked rows over the sum of their k-distances: rows reach their k-th
    neighbour sooner where it is dense. Infinite where they are all equal, 0 where none was asked.
    """
    n_clusters = int(of_row.max()) + 1
    inside = of_row >= 0
    cell = of_row[inside].astype(xp.int64) * n_classes + labels[inside]
    held = xp.bincount(cell, minlength=n_clusters * n_classes).astype(xp.int32)
    held = held.reshape(n_clusters, n_classes)
    asked = of_asked >= 0
    count = xp.bincount(of_asked[asked], minlength=n_clusters)
    total = xp.bincount(of_asked[asked], weights=reach[asked], minlength=n_clusters)
    density = xp.where(count > 0, np.inf, 0.0)
    density = xp.where(total > 0, count / xp.where(total > 0, total, 1), density)
    return held.sum(axis=1), held, density


def diversity(clusters: Clusters, xp: ModuleType) -> Array:
    """Entropy of the labels in each cluster, in bits: 0 when all rows agree. (K,)"""
    share = clusters.labels / clusters.size[:, None]
    return -(share * xp.log2(xp.where(share > 0, share, 1.0))).sum(axis=1)


def purity(clusters: Clusters) -> Array:
    """Share of each cluster's commonest label. (K,)"""
    return clusters.labels.max(axis=1) / clusters.size


def home_of(clusters: Clusters, xp: ModuleType) -> Array:
    """The cluster that holds most rows of each label; -1 where all of them are noise. (C,)"""
    if not len(clusters.size):
        return xp.full(clusters.labels.shape[1], -1)
    return xp.where(clusters.labels.max(axis=0) > 0, clusters.labels.argmax(axis=0), -1)


def mixed_homes(clusters: Clusters, settings: Settings, xp: ModuleType) -> bool:
    """Whether few labels have a home of their own."""
    home = home_of(clusters, xp)
    if not len(clusters.size):
        return True
    own = clusters.labels.argmax(axis=1)[home] == xp.arange(len(home))
    pure = (home >= 0) & own & (purity(clusters)[home] >= settings.purity)
    return bool(pure.mean() < settings.pure_homes)
