"""Which clusters a rule names, and what all the sightings together say of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.segregate.clusters import diversity, home_of, mixed_homes, purity
from csc_gpu.segregate.settings import MOST_SCALES, Settings
from csc_gpu.types import Array, Clusters, Sighting

T = TypeVar("T")
LARGEST_INT16 = 2**15 - 1


def not_the_largest(clusters: Clusters, settings: Settings, xp: ModuleType) -> Array:
    """CSC's Algorithm 1: every cluster but the largest. (K,) bool"""
    return xp.arange(len(clusters.size)) != clusters.size.argmax()


def pure_and_dense(clusters: Clusters, settings: Settings, xp: ModuleType) -> Array:
    """CSC's text: not the largest, of low diversity, and at least as dense as it. (K,) bool"""
    dense = clusters.density >= clusters.density[clusters.size.argmax()]
    return not_the_largest(clusters, settings, xp) & (purity(clusters) >= settings.purity) & dense


def not_its_labels_largest(clusters: Clusters, settings: Settings, xp: ModuleType) -> Array:
    """For clusters of one label each: all but the largest of their label. (K,) bool"""
    return home_of(clusters, xp)[clusters.labels.argmax(axis=1)] != xp.arange(len(clusters.size))


def away_from_home(clusters: Clusters, settings: Settings, xp: ModuleType) -> Array:
    """Ours: a pure cluster that is not its label's home, the cluster with most rows of the label.

    Where few homes are pure, as on hard data, a pure home is odd too, and named. (K,) bool
    """
    major = clusters.labels.argmax(axis=1)
    pure = purity(clusters) >= settings.purity
    away = home_of(clusters, xp)[major] != xp.arange(len(major))
    return pure & (away | mixed_homes(clusters, settings, xp))


@dataclass(frozen=True)
class Rule:
    """Which clusters are named, and what else it takes for a row to be suspect."""

    names: Callable[[Clusters, Settings, ModuleType], Array]
    said: str  # why a cluster is named, to a reader
    persistent: bool = False  # only rows named at settings.persistence scales of a snapshot
    verified: bool = False  # then ask the images, a probe and a model trained without them


AWAY = "of one label, and away from where that label is at home"
RULES: dict[str, Rule] = {
    "two-stage": Rule(away_from_home, AWAY, persistent=True, verified=True),
    "persistence": Rule(away_from_home, AWAY, persistent=True),
    "text": Rule(pure_and_dense, "of one label, dense, and not the largest"),
    "algorithm1": Rule(not_the_largest, "not the largest"),
    "per_label": Rule(not_its_labels_largest, "not the largest of its label"),
}


def looked_at(snapshots: Sequence[T], settings: Settings) -> dict[T, tuple[float, ...]]:
    """The scales at which each of the watched snapshots, in order, is clustered; () for some.

    Scales that give no evidence only part rows from their home, at the last, and cost most.
    """
    rule = RULES[settings.rule]
    scales = tuple(sorted(settings.scales))
    counted = snapshots[-settings.latest :] if rule.persistent else snapshots
    found: dict[T, tuple[float, ...]] = {snapshot: () for snapshot in snapshots}
    found |= {s: tuple(q for q in scales if q <= settings.coarsest) for s in counted}
    if rule.verified:
        found[snapshots[-1]] = scales
    return found


@dataclass(frozen=True)
class Evidence:
    """What a rule saw of each row, all (N,), on the host."""

    votes: NDArray[np.int64]  # snapshots in which the row was hit often enough
    share: NDArray[np.float32]  # largest share of the scales at which one snapshot hit it
    table: dict[str, NDArray[Any]]  # the columns of suspects.csv that speak of clusters


def gather(
    sightings: Sequence[Sighting], rule: Rule, settings: Settings, backend: Backend
) -> Evidence:
    """Ask the rule about every cluster of every sighting, and add up by row.

    The rule is asked on the device. Of each row comes down one bit a scale and snapshot, and in the
    end the number of the cluster where it was last hit.
    """
    xp, down = backend.xp, backend.to_numpy
    middle = sightings[-1].clusterings[len(sightings[-1].clusterings) // 2]
    n, needed = len(middle.of_row), settings.persistence if rule.persistent else 1
    votes, share = np.zeros(n, np.int64), np.zeros(n, np.float32)
    first, low, high = (np.full(n, np.nan, np.float32) for _ in range(3))
    asked: list[Clusters] = [middle]
    last, cluster = np.zeros(n, np.intp), middle.of_row  # last: a place in `asked`
    for sighting in (seen for seen in sightings if seen.clusterings):
        clusterings = [c for c in sighting.clusterings if c.scale <= settings.coarsest]
        bits, cluster = _hits(clusterings, rule, cluster, settings, backend)
        for bit, clusters in enumerate(clusterings):
            hit = (bits >> bit & 1).astype(bool)
            low[hit] = np.fmin(low[hit], clusters.scale)
            high[hit] = np.fmax(high[hit], clusters.scale)
            last[hit] = len(asked)
            asked.append(clusters)
        hits = np.bitwise_count(bits)
        voted = hits >= min(needed, len(clusterings))
        first[voted & (votes == 0)] = sighting.epoch
        votes += voted
        share = np.maximum(share, (hits / len(clusterings)).astype(np.float32))
    short = max(len(clusters.size) for clusters in asked) < LARGEST_INT16
    of_row = down(cluster.astype(xp.int16 if short else xp.int32)).astype(np.int64)
    return Evidence(
        votes=votes,
        share=share,
        table={
            "cluster": of_row,
            **_described(asked, last, of_row, backend),
            "first_epoch": first,
            "n_snapshots": votes,
            "scale_min": low,
            "scale_max": high,
        },
    )


def _hits(
    clusterings: Sequence[Clusters],
    rule: Rule,
    cluster: Array,
    settings: Settings,
    backend: Backend,
) -> tuple[NDArray[Any], Array]:
    """At which clusterings each row is hit, one bit each (N,); and each row's last such cluster."""
    xp = backend.xp
    kinds = {8: xp.uint8, 16: xp.uint16, 32: xp.uint32, MOST_SCALES: xp.uint64}
    kind = next(kind for width, kind in kinds.items() if len(clusterings) <= width)
    bits = xp.zeros(len(cluster), kind)
    for bit, clusters in enumerate(clusterings):
        if not len(clusters.size):
            continue  # nothing but noise at this scale
        hit = _rows(clusters, rule.names(clusters, settings, xp), xp)
        bits |= hit * kind(1 << bit)
        cluster = xp.where(hit, clusters.of_row, cluster)
    return backend.to_numpy(bits), cluster


def _rows(clusters: Clusters, named: Array, xp: ModuleType) -> Array:
    """The rows of the named clusters. (N,) bool"""
    return xp.concatenate([named, xp.zeros(1, bool)])[clusters.of_row]  # noise, -1, takes the last


def _described(
    asked: Sequence[Clusters],
    last: NDArray[np.intp],
    of_row: NDArray[np.int64],
    backend: Backend,
) -> dict[str, NDArray[Any]]:
    """Size, purity and density of cluster of_row[i] of asked[last[i]], for every row i."""
    size = np.zeros(len(last), np.int64)
    pure, density = (np.full(len(last), np.nan, np.float32) for _ in range(2))
    for number in np.unique(last):
        rows = np.flatnonzero((last == number) & (of_row >= 0))
        if not len(rows):
            continue
        clusters, which = asked[number], of_row[rows]
        size[rows] = backend.to_numpy(clusters.size)[which]
        pure[rows] = backend.to_numpy(purity(clusters))[which]
        density[rows] = backend.to_numpy(clusters.density)[which]
    return {"cluster_size": size, "cluster_purity": pure, "cluster_density": density}


def listing(
    sighting: Sighting, rule: Rule, settings: Settings, backend: Backend
) -> Iterator[dict[str, Any]]:
    """Every cluster of a snapshot, scale by scale: what it is and whether the rule names it."""
    xp, down = backend.xp, backend.to_numpy
    for found in sighting.clusterings:
        if not len(found.size):
            continue
        columns = {
            "cluster": xp.arange(len(found.size)),
            "size": found.size,
            "label": found.labels.argmax(axis=1),
            "purity": purity(found),
            "diversity": diversity(found, xp),
            "density": found.density,
            "named": rule.names(found, settings, xp) & (found.scale <= settings.coarsest),
        }
        values = [down(column).tolist() for column in columns.values()]
        for line in zip(*values, strict=True):
            where = {"epoch": sighting.epoch, "scale": found.scale, "eps": found.eps}
            yield where | dict(zip(columns, line, strict=True))
