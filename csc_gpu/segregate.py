"""Segregation: cluster the features of early snapshots, and name the suspects.

One snapshot is seen at several scales (`observe`): rows are L2-normalised, projected on their
principal components and clustered by DBSCAN at radii taken from quantiles of the k-distance. Then a
rule reads all the sightings. CSC (arXiv 2604.21416) describes its rule in two ways that disagree;
both are here as the paper's, `text` and `algorithm1`. `two-stage`, the default, and its first
stage, `persistence`, are ours.

Rows are put into an order of their own before any arithmetic, so that the order in which they come
changes nothing, not even a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.config import require
from csc_gpu.errors import CorpusError
from csc_gpu.types import Array, Clusters, Mask, Reclassified, Reclassify, Segregation, Sighting

HASH_FACTOR = 6364136223846793005
"""Knuth's multiplier for 64-bit linear congruential generators (MMIX)."""
BLOCK = 65_536
"""Rows embedded at a time, so that no second copy of all the features is ever held."""
SMALLEST_EPS = 1e-6
"""DBSCAN wants a radius above zero, also where most rows are equal."""
OUTSIDE = 0.8
"""Share of a core that must lie outside its label's home at a scale for the home to be believed."""
MOST_LEFT_OUT = 0.5
"""Candidates beyond the core are left out only if this share of all rows stays to train on."""
TRUSTED = 0.9
"""Share of poison among rows from which they are kept."""
UNSURE = 0.2
"""A model wrong on more than this share of the controls says nothing about single rows."""
MOST_SCALES = 64
"""One bit each says at which scales a row was hit."""
LARGEST_INT16 = 2**15 - 1
COARSE = 0.3
"""A core that stands apart at this scale is no ordinary benign island (those: .05, method 2.3)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How suspects are found."""

    rule: str = "two-stage"
    """two-stage, persistence, text or algorithm1."""
    pca: int = 16
    """Principal components to cluster in; 0: all feature dimensions."""
    scales: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Quantiles of the k-distance from which DBSCAN's radii are taken."""
    coarsest: float = 0.6
    """The coarsest scale that gives evidence; coarser ones only part rows from their home."""
    min_share: float = 0.002
    """DBSCAN's min_samples as a share of all rows."""
    min_rows: int = 8
    """DBSCAN's least min_samples, in rows."""
    purity: float = 0.95
    """Share of a cluster's commonest label from which it counts as pure."""
    persistence: int = 3
    """Scales at which a row must be hit for a vote of one snapshot (persistence, two-stage)."""
    votes: int = 1
    """Snapshots that must vote for a row."""
    pure_homes: float = 0.3
    """Below this share of labels whose home is pure, a pure home is itself a hit."""
    max_share: float = 0.2
    """No more than this share of all rows is flagged: the highest scores."""
    max_label_share: float = 0.75
    """No more than this share of a label's rows is flagged, nor taken for its core."""
    k_rows: int = 20_000
    """Rows asked for their k-distance, at most."""
    label_share: float = 0.1
    """Share of the core a label must hold to be suspected (two-stage)."""
    rounds: int = 3
    """Models trained without the candidates, at most (two-stage)."""
    check_epochs: int = 10
    """Epochs of each of them, if training has not fewer; train.min_steps holds for them too."""
    controls: float = 0.05
    """Share of unsuspected rows left out with the candidates, to learn how far to trust a check."""

    def __post_init__(self) -> None:
        caps = ("max_share", "max_label_share", "label_share", "controls")
        shares = ("min_share", "purity", "pure_homes", "coarsest", *caps)
        counts = ("min_rows", "persistence", "votes", "k_rows", "rounds", "check_epochs")
        require(self, "segregate", f"one of {', '.join(RULES)}", RULES.__contains__, "rule")
        require(self, "segregate", "in (0, 1]", lambda share: 0 < share <= 1, *shares)
        require(self, "segregate", "1 or more", lambda count: count >= 1, *counts)
        require(self, "segregate", "0 or more", lambda dims: dims >= 0, "pca")
        most = f"at most {MOST_SCALES} quantiles in (0, 1)"
        require(self, "segregate", most, _are_quantiles, "scales")
        finest = f"{min(self.scales)} or more, the finest of segregate.scales"
        require(self, "segregate", finest, lambda scale: scale >= min(self.scales), "coarsest")


def _are_quantiles(scales: tuple[float, ...]) -> bool:
    return 0 < len(scales) <= MOST_SCALES and all(0 < scale < 1 for scale in scales)


# --- one snapshot, clustered ------------------------------------------------------------------


def observe(
    points: Array, labels: NDArray[np.int64], epoch: float, settings: Settings, backend: Backend
) -> Sighting:
    """Cluster one snapshot's features (N, D) at every scale."""
    xp = backend.xp
    labels = xp.asarray(labels)
    order = own_order(points, labels, xp)
    z, labels = embed(points, order, settings.pca, xp), labels[order]
    min_samples = least_neighbours(len(z), settings)
    asked = xp.linspace(0, len(z) - 1, min(len(z), settings.k_rows)).astype(xp.int64)
    reach = backend.neighbors(z, min(min_samples, len(z)), z[asked])
    n_classes = int(labels.max()) + 1
    back = xp.argsort(order)
    clusterings = []
    for scale in sorted(settings.scales):
        eps = max(float(xp.quantile(reach, scale)), SMALLEST_EPS)
        of_row = backend.dbscan(z, eps=eps, min_samples=min_samples)
        size, held, density = describe(of_row, labels, n_classes, reach, of_row[asked], xp)
        clusterings.append(Clusters(of_row[back], size, held, density, eps, scale))
    return Sighting(epoch, tuple(clusterings), min_samples)


def least_neighbours(n: int, settings: Settings) -> int:
    """DBSCAN's min_samples for n rows."""
    return max(settings.min_rows, round(settings.min_share * n))


def own_order(points: Array, labels: Array, xp: ModuleType) -> Array:
    """An order of the rows that depends on what they hold, not on how they come. (N,)

    Rows are sorted by a 64-bit hash of their bits and label, in whole numbers, which do not round.
    """
    bits = xp.ascontiguousarray(points, dtype=xp.float32).view(xp.uint32)
    key = labels.astype(xp.uint64)
    for column in bits.T:
        key = key * xp.uint64(HASH_FACTOR) + column
    return xp.argsort(key, kind="stable")


def embed(points: Array, order: Array, dims: int, xp: ModuleType) -> Array:
    """Rows in this order, scaled to length 1, centred, on `dims` principal components. (N, dims)

    Block by block: beside the features no more is held than a block and the result.
    """
    n, n_features = points.shape
    blocks = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]

    def unit(block: slice) -> Array:
        rows = points[order[block]]
        length = xp.linalg.norm(rows, axis=1, keepdims=True)
        return rows / xp.where(length > 0, length, 1)

    total = sum(unit(block).sum(axis=0, dtype=xp.float64) for block in blocks)
    mean = (total / n).astype(points.dtype)
    projected = 0 < dims < n_features
    if projected:
        scatter = xp.zeros((n_features, n_features), xp.float64)
        for block in blocks:
            centred = unit(block) - mean
            scatter += centred.T @ centred
        axes = xp.linalg.eigh(scatter)[1][:, ::-1][:, :dims].astype(points.dtype)
    z = xp.empty((n, dims if projected else n_features), points.dtype)
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
    neighbour sooner where it is dense.
    """
    n_clusters = int(of_row.max()) + 1
    inside = of_row >= 0
    cell = of_row[inside].astype(xp.int64) * n_classes + labels[inside]
    held = xp.bincount(cell, minlength=n_clusters * n_classes).reshape(n_clusters, n_classes)
    asked = of_asked >= 0
    count = xp.bincount(of_asked[asked], minlength=n_clusters)
    total = xp.bincount(of_asked[asked], weights=reach[asked], minlength=n_clusters)
    return held.sum(axis=1), held, count / xp.where(total > 0, total, 1)


def diversity(clusters: Clusters, xp: ModuleType) -> Array:
    """Entropy of the labels in each cluster, in bits: 0 when all rows agree. (K,)"""
    share = clusters.labels / clusters.size[:, None]
    return -(share * xp.log2(xp.where(share > 0, share, 1.0))).sum(axis=1)


def purity(clusters: Clusters) -> Array:
    """Share of each cluster's commonest label. (K,)"""
    return clusters.labels.max(axis=1) / clusters.size


# --- which clusters a rule names --------------------------------------------------------------


def not_the_largest(clusters: Clusters, settings: Settings, xp: ModuleType) -> Array:
    """CSC's Algorithm 1: every cluster but the largest. (K,) bool"""
    return xp.arange(len(clusters.size)) != clusters.size.argmax()


def pure_and_dense(clusters: Clusters, settings: Settings, xp: ModuleType) -> Array:
    """CSC's text: not the largest, of low diversity, and at least as dense as it. (K,) bool"""
    dense = clusters.density >= clusters.density[clusters.size.argmax()]
    return not_the_largest(clusters, settings, xp) & (purity(clusters) >= settings.purity) & dense


def away_from_home(clusters: Clusters, settings: Settings, xp: ModuleType) -> Array:
    """Ours: a pure cluster that is not its label's home, the cluster with most rows of the label.

    Where few homes are pure, as on hard data, a pure home is odd too, and named. (K,) bool
    """
    major = clusters.labels.argmax(axis=1)
    pure = purity(clusters) >= settings.purity
    away = home_of(clusters, xp)[major] != xp.arange(len(major))
    return pure & (away | _mixed(clusters, settings, xp))


def home_of(clusters: Clusters, xp: ModuleType) -> Array:
    """The cluster that holds most rows of each label; -1 where all of them are noise. (C,)"""
    if not len(clusters.size):
        return xp.full(clusters.labels.shape[1], -1)
    return xp.where(clusters.labels.max(axis=0) > 0, clusters.labels.argmax(axis=0), -1)


def _mixed(clusters: Clusters, settings: Settings, xp: ModuleType) -> bool:
    """Whether few labels have a home of their own."""
    home = home_of(clusters, xp)
    if not len(clusters.size):
        return True
    own = clusters.labels.argmax(axis=1)[home] == xp.arange(len(home))
    pure = (home >= 0) & own & (purity(clusters)[home] >= settings.purity)
    return bool(pure.mean() < settings.pure_homes)


@dataclass(frozen=True)
class Rule:
    """Which clusters are named, and what else it takes for a row to be suspect."""

    names: Callable[[Clusters, Settings, ModuleType], Array]
    persistent: bool = False  # only rows named at settings.persistence scales of a snapshot
    exclusion: bool = False  # then find the rows by training without them


RULES: dict[str, Rule] = {
    "two-stage": Rule(away_from_home, persistent=True, exclusion=True),
    "persistence": Rule(away_from_home, persistent=True),
    "text": Rule(pure_and_dense),
    "algorithm1": Rule(not_the_largest),
}


# --- evidence over all snapshots ----------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What a rule saw of each row, all (N,), on the host."""

    votes: NDArray[np.int64]  # snapshots in which the row was hit often enough
    share: NDArray[np.float32]  # largest share of the scales at which one snapshot hit it
    mixed: bool  # whether homes were mixtures when the votes were cast
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
    last, cluster, mixed = np.zeros(n, np.intp), middle.of_row, []  # last: a place in `asked`
    for sighting in sightings:
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
        if voted.any():
            mixed.append(all(_mixed(c, settings, xp) for c in clusterings))
    short = max(len(clusters.size) for clusters in asked) < LARGEST_INT16
    of_row = down(cluster.astype(xp.int16 if short else xp.int32)).astype(np.int64)
    return Evidence(
        votes=votes,
        share=share,
        mixed=bool(mixed) and all(mixed),
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


# --- the verdict --------------------------------------------------------------------------------


def segregate(
    sightings: Sequence[Sighting],
    labels: NDArray[np.int64],
    settings: Settings,
    backend: Backend,
    reclassify: Reclassify | None = None,
) -> Segregation:
    """Name the suspects from all sightings; without `reclassify`, two-stage stops after stage 1.

    Raises CorpusError if there is nothing to look at.
    """
    if not sightings:
        raise CorpusError("no snapshot was watched, so there is nothing to segregate")
    rule = RULES[settings.rule]
    evidence = gather(sightings, rule, settings, backend)
    core, freed = voted_core(evidence.votes, labels, settings)
    belief = evidence.share.copy()
    notes: dict[str, Any] = {
        "rule": settings.rule,
        "core_rows": int(core.sum()),
        "freed_labels": freed,
    }
    suspect, checks = core, tuple[Reclassified, ...]()
    if rule.exclusion:
        suspect, belief, checks, told = exclude(
            sightings[-1], labels, core, evidence, settings, backend, reclassify
        )
        notes |= told
    suspect, notes["capped"] = capped(suspect, belief, labels, settings)
    score = np.where(suspect, 0.5 + 0.5 * belief, 0.49 * belief).astype(np.float32)
    reason = np.where(suspect, settings.rule, "")
    table = {**evidence.table, "reason": reason}
    listed = tuple(line for s in sightings for line in listing(s, rule, settings, backend))
    return Segregation(suspect, score, table, notes, checks, listed)


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


def voted_core(
    votes: NDArray[np.int64], labels: NDArray[np.int64], settings: Settings
) -> tuple[Mask, list[int]]:
    """The rows with enough votes; a label that would lose too many of its rows needs more votes.

    No label is taken whole: that is its home, not an island, and nothing would be left to train on.
    Labels that no number of votes brings under the cap go free, and are returned too.
    """
    core, freed = np.zeros(len(labels), bool), []
    for label in np.unique(labels[votes >= settings.votes]):
        ours = labels == label
        for needed in range(settings.votes, int(votes[ours].max()) + 1):
            chosen = ours & (votes >= needed)
            if chosen.sum() <= settings.max_label_share * ours.sum():
                core |= chosen
                break
        else:
            freed.append(int(label))
    return core, freed


def capped(
    suspect: Mask, belief: NDArray[np.float32], labels: NDArray[np.int64], settings: Settings
) -> tuple[Mask, bool]:
    """At most so many rows of each label and of all: those believed in most.

    A tie over a limit goes free as a whole, so that no order of the rows decides.
    """
    kept = suspect
    for label in np.unique(labels[suspect]):
        kept = _at_most(settings.max_label_share, kept, labels == label, belief)
    kept = _at_most(settings.max_share, kept, np.ones(len(labels), bool), belief)
    return kept, bool((kept != suspect).any())


def _at_most(share: float, suspect: Mask, among: Mask, belief: NDArray[np.float32]) -> Mask:
    limit, ours = int(share * among.sum()), suspect & among
    if ours.sum() <= limit:
        return suspect
    first_out = np.sort(belief[ours])[::-1][limit]
    free: Mask = ours & (belief <= first_out)
    return suspect & ~free


def suspected_labels(labels: NDArray[np.int64], core: Mask, settings: Settings) -> list[int]:
    """Labels that hold a tenth of the core and enough rows of it to be no accident."""
    held = np.bincount(labels[core])
    enough = max(settings.min_rows, settings.label_share * core.sum())
    return [int(label) for label in np.flatnonzero(held >= enough)]


def candidates(
    last: Sighting, labels: NDArray[np.int64], core: Mask, label: int, backend: Backend
) -> Mask:
    """The core of a label and all its rows that are not at home, noise included. (N,) bool

    Home is looked up at the coarsest scale at which the core still lies outside it.
    """
    xp, ours = backend.xp, labels == label
    mine: Mask = core & ours
    for clusters in reversed(last.clusterings):
        home = int(home_of(clusters, xp)[label])
        if home < 0:
            continue
        away = _unpacked(xp.packbits(clusters.of_row != home), len(labels), backend)
        if away[mine].mean() >= OUTSIDE:
            outside: Mask = mine | (ours & away)
            return outside
    return mine


def _unpacked(bits: Array, n: int, backend: Backend) -> Mask:
    """n bits, eight to a byte on the device, as a mask on the host. (n,)"""
    return np.unpackbits(backend.to_numpy(bits).astype(np.uint8), count=n).astype(bool)


def exclude(
    last: Sighting,
    labels: NDArray[np.int64],
    core: Mask,
    evidence: Evidence,
    settings: Settings,
    backend: Backend,
    reclassify: Reclassify | None,
) -> tuple[Mask, NDArray[np.float32], tuple[Reclassified, ...], dict[str, Any]]:
    """Find the rows of each attacked label by exclusionary re-classification.

    Poison with a false label is predicted otherwise by a model that never saw its kind; a benign
    island keeps its label. How far that can be trusted is read off the controls: benign rows that
    the model did not see either. Returns suspects, belief in 0..1, the checks, and notes.
    """
    live = suspected_labels(labels, core, settings)
    strong = {y: evidence.mixed and is_isolated(core & (labels == y), evidence) for y in live}
    core = core & np.isin(labels, live)
    kept = core.copy()
    notes: dict[str, Any] = {"suspected_labels": list(live), "cleared_labels": [], "rounds": []}
    checks: list[Reclassified] = []
    notes["verified"] = reclassify is not None
    if reclassify is None:
        return core, evidence.share, (), notes
    if live:
        wide = np.logical_or.reduce([candidates(last, labels, core, y, backend) for y in live])
        kept = wide if wide.mean() <= MOST_LEFT_OUT else core
    for _ in range(settings.rounds if live else 0):
        check = reclassify(kept)
        checks.append(check)
        before = kept
        for label in tuple(live):
            verdict = judge(label, labels, core, before, check, settings)
            notes["rounds"].append(verdict.told)
            kept = np.where(labels == label, verdict.poison, kept)
            if verdict.is_clear and not strong[label]:
                live.remove(label)
                notes["cleared_labels"].append(label)
                kept = kept & (labels != label)
            elif verdict.is_clear:
                kept = np.where(labels == label, core, kept)
        unsure = wrong_on(check.controls, check.predicted != labels) > UNSURE
        if not live or unsure or (kept == before).all():
            break
    belief = evidence.share
    if checks:
        differs = np.mean([check.predicted != labels for check in checks], axis=0)
        belief = np.where(kept, np.maximum(belief, differs), belief).astype(np.float32)
    return kept, belief, tuple(checks), notes


@dataclass(frozen=True)
class Judgement:
    """What one check says of one label."""

    poison: Mask  # (N,) rows of the label to go on suspecting
    is_clear: bool  # the core keeps its label although the model never saw it
    told: dict[str, Any]


def judge(
    label: int,
    labels: NDArray[np.int64],
    core: Mask,
    left_out: Mask,
    check: Reclassified,
    settings: Settings,
) -> Judgement:
    """Weigh each group of a label's rows by how many differ, beyond what benign rows do.

    If a share `differs` of a group is predicted otherwise, and a share `wrong` of unseen benign
    rows is, the group's share of poison is (differs - wrong) / (1 - wrong), were all poison to
    differ. Of the differing rows, poison / differs are then poison: enough, and they are kept.
    """
    ours = labels == label
    differs = check.predicted != labels
    wrong = wrong_on(check.controls, differs)
    own = check.controls & ours
    if own.sum() >= settings.min_rows:
        wrong = max(wrong, wrong_on(own, differs))

    def poison_share(group: Mask) -> float:
        share = float(differs[group].mean()) if group.any() else 0.0
        return max(0.0, (share - wrong) / (1 - wrong))

    sure = core & ours
    groups = (sure, left_out & ours & ~core, ours & ~left_out & ~check.controls)
    poison = sure.copy()
    if wrong <= UNSURE:  # else single rows cannot be told: the core stands or falls as a whole
        poison = np.zeros(len(labels), bool)
        for group in groups:
            share = poison_share(group)
            if share > 0 and share >= TRUSTED * float(differs[group].mean()):
                poison |= group & differs
    told = {
        "label": label,
        "wrong_on_controls": round(wrong, 4),
        "rows": [int(group.sum()) for group in groups],
        "poison_share": [round(poison_share(group), 4) for group in groups],
        "kept": int(poison.sum()),
    }
    return Judgement(poison, poison_share(sure) < 0.5, told)


def wrong_on(rows: Mask, differs: Mask) -> float:
    """Share of these rows that differ, as if one more had and one had not (Laplace). 0..1"""
    return (int((differs & rows).sum()) + 1) / (int(rows.sum()) + 2)


def is_isolated(core: Mask, evidence: Evidence) -> bool:
    """Whether most of a core still stands apart at a coarse scale."""
    return bool(np.median(evidence.table["scale_max"][core]) >= COARSE)
