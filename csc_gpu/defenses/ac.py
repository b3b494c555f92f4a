"""Activation Clustering (Chen et al. 2018, arXiv 1811.03728).

The features of each given label are reduced to ten independent components and split in two by
k-means. Then one of three ways decides which parts are poison (`decide`):

    exclusion    a net that has not learnt from the part classifies it: l rows get their label, p
                 the most frequent other one; poison if l / p is below 1 (section 4.3 of the paper)
    size         a part with less than 35 % of its label is poison
    silhouette   the smaller part is poison if the split fits well: silhouette above .10

The repair relabels poison to what it comes from, and goes on training. On features alone there is
no net to train: size decides there. An exclusion that is asked for even so trains a linear one,
which sees nothing in features that a net has learnt with the poison (measured: MNIST and CIFAR-10,
BadNets 5 %, recall 0 where size finds all): they hold the label already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csc_gpu import conceal, csc
from csc_gpu.backend import Backend
from csc_gpu.components import independent, principal
from csc_gpu.config import require
from csc_gpu.defenses.course import Course, verdict
from csc_gpu.segregate.clusters import own_order
from csc_gpu.types import Array, DefenderView, Mask, Outcome, Segregation

AUTO = "auto"
DECIDE = (AUTO, "exclusion", "size", "silhouette")
EXCLUDE, REPAIR = ("smaller", "each"), ("relabel", "remove")
SOURCE, REDUCE = ("row", "cluster"), ("ica", "pca")
Labels = NDArray[np.int64]
Reclassify = Callable[[Mask], Labels]
"""Rows to leave out (N,) -> the labels that a net gives all rows which has not seen these. (N,)"""
AT_A_TIME = 1024
"""Rows whose distances to all others are held together."""


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """How labels are split, which parts are poison, and what is done about it."""

    reduce: str = "ica"
    """ica or pca."""
    dims: int = 10
    """Components that are clustered."""
    tries: int = 10
    """Beginnings of k-means, of which the best counts."""
    least: int = 20
    """A label with fewer rows is not split."""
    decide: str = AUTO
    """auto, exclusion, size or silhouette. auto: exclusion where there are images, else size."""
    ratio: float = 1.0
    """exclusion: l / p below which a part is poison, T in the paper."""
    exclude: str = "smaller"
    """exclusion: smaller leaves the smaller parts of all labels out of one training; each trains
    once for each part of each label."""
    size: float = 0.35
    """size: a part with a smaller share of its label is poison."""
    silhouette: float = 0.1
    """silhouette: the smaller part is poison where the mean silhouette is higher."""
    repair: str = "relabel"
    """relabel: give poison the label it comes from and go on training; remove: train anew without
    it."""
    source: str = "row"
    """What poison is relabelled to. row: what the excluding net says of each; cluster: what it says
    most often of the part, as in the paper, whose parts come from one class."""
    repair_epochs: int = 10
    """relabel: epochs that training goes on for."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("reduce", REDUCE),
            ("decide", DECIDE),
            ("exclude", EXCLUDE),
            ("repair", REPAIR),
            ("source", SOURCE),
        ):
            require(self, "ac", f"one of {', '.join(allowed)}", allowed.__contains__, name)
        counts = ("dims", "tries", "repair_epochs")
        require(self, "ac", "1 or more", lambda count: count >= 1, *counts)
        require(self, "ac", "2 or more", lambda count: count >= 2, "least")
        require(self, "ac", "above 0", lambda value: 0 < value < 1e6, "ratio")
        require(self, "ac", "in [0, 1]", lambda share: 0 <= share <= 1, "size", "silhouette")


@dataclass(frozen=True, kw_only=True)
class Settings(csc.Common):
    """Common settings, and those of Activation Clustering."""

    ac: Clustering = field(default_factory=Clustering)


@dataclass(frozen=True)
class Part:
    """One of the two parts of a label."""

    label: int
    rows: NDArray[np.int64]  # positions in the corpus
    is_smaller: bool
    share: float  # of its label
    silhouette: float  # mean of the label's rows, -1..1; NaN if nobody asked
    near: NDArray[np.float64]  # (len(rows),) 0..1, 1 at this part's mean, .5 half-way


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train, split every label in two, decide, and mend the net."""
    course = Course(view, settings, backend, **how)
    settings = _settled(settings, "exclusion")
    chosen, model = settings.ac, course.trained()

    def without(rows: Mask) -> Labels:
        return course.predicted(course.retrained(rows, "exclude", again=1))

    points = course.features(model)
    with course.clock("judge"):
        found = decided(points, view.train.labels, settings, backend, course.seed, without)
        suspect = found.suspect
    if not suspect.any():
        return course.outcome(model, model, found)
    if chosen.repair == "remove":
        return course.outcome(course.retrained(suspect), model, found)
    truth = found.table.get("source")
    relabelled = np.where(suspect, without(suspect) if truth is None else truth, view.train.labels)
    mended = course.trained(
        "repair",
        model=copy.deepcopy(model),
        corpus=replace(view.train, labels=relabelled),
        again=3,
        epochs=chosen.repair_epochs,
        min_steps=0,
    )
    return course.outcome(mended, model, found)


def judge(
    points: Array, labels: Labels, settings: Settings, backend: Backend, *, seed: int = 0
) -> Segregation:
    """The verdict on features (N, D) with given labels (N,), without images."""

    def without(rows: Mask) -> Labels:
        return probed(points, labels, rows, backend, seed)

    return decided(points, labels, _settled(settings, "size"), backend, seed, without)


def _settled(settings: Settings, usual: str) -> Settings:
    """The same settings, auto replaced by what is usual."""
    if settings.ac.decide != AUTO:
        return settings
    return replace(settings, ac=replace(settings.ac, decide=usual))


def decided(
    points: Array,
    labels: Labels,
    settings: Settings,
    backend: Backend,
    seed: int,
    reclassify: Reclassify,
) -> Segregation:
    """Split every label, and decide about the parts."""
    chosen, n = settings.ac, len(labels)
    parts = split(points, labels, settings, backend, seed)
    suspect, belief = np.zeros(n, bool), np.zeros(n)
    cluster, size, source = np.full(n, -1), np.zeros(n, int), labels.copy()
    excluded = _excluded(parts, n, chosen, reclassify) if chosen.decide == "exclusion" else {}
    told: list[list[int]] = []
    for number, part in enumerate(parts):
        cluster[part.rows], size[part.rows] = number, len(part.rows)
        predicted = excluded.get(number)
        poison, evidence = _poison(part, predicted, chosen)
        if predicted is not None:
            told.append([part.label, len(part.rows), *_counts(part, predicted)])
        belief[part.rows] = evidence * part.near
        suspect[part.rows] = poison
        if predicted is not None:
            source[part.rows] = _source(predicted, part.label, chosen)
    table = {"cluster": cluster, "cluster_size": size}
    notes = {"decide": chosen.decide, "parts": len(parts), "exclusions": _count(parts, chosen)}
    if excluded:
        table["source"] = source
        notes["label, rows, l, p"] = told  # of every part that was excluded
    return verdict(suspect, belief, "ac", notes, **table)


def split(
    points: Array, labels: Labels, settings: Settings, backend: Backend, seed: int
) -> list[Part]:
    """The two parts of every label, the larger first; labels of too few rows are left out."""
    chosen, xp, parts = settings.ac, backend.xp, []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < chosen.least:
            continue
        ours = xp.ascontiguousarray(points[xp.asarray(rows)].astype(xp.float32))
        order = own_order(ours, xp.zeros(len(rows), xp.int64), xp)  # so that no other one counts
        rows, ours = rows[backend.to_numpy(order)], ours[order]
        if chosen.reduce == "ica":
            few = independent(ours, chosen.dims, xp, seed=seed)
        else:
            few, _ = principal(ours, chosen.dims, xp)
        few = xp.ascontiguousarray(few.astype(xp.float32))
        second = backend.kmeans(few, 2, seed=seed, tries=chosen.tries) == 1
        if not 0 < int(second.sum()) < len(rows):
            continue  # all rows are alike
        fits = silhouette(few, second, xp) if chosen.decide == "silhouette" else float("nan")
        away = [xp.linalg.norm(few - few[mine].mean(axis=0), axis=1) for mine in (~second, second)]
        near = backend.to_numpy(away[0] / (away[0] + away[1]))  # to the second part
        is_second = np.asarray(backend.to_numpy(second), bool)
        halves = []
        for mine, close in ((~is_second, 1 - near), (is_second, near)):
            share = float(mine.mean())
            halves.append(Part(int(label), rows[mine], False, share, fits, close[mine]))
        halves.sort(key=lambda part: -len(part.rows))
        parts += [halves[0], replace(halves[1], is_smaller=True)]
    return parts


def silhouette(points: Array, second: Array, xp: ModuleType) -> float:
    """Mean silhouette of rows (n, k) in two parts: (b - a) / max(a, b), a the mean distance to the
    others of its part, b to those of the other; 0 for a row that is a part by itself."""
    square = (points * points).sum(axis=1)
    count = xp.stack([(~second).sum(), second.sum()]).astype(xp.float64)
    member = xp.stack([~second, second]).astype(xp.float64).T  # (n, 2)
    total = 0.0
    for start in range(0, len(points), AT_A_TIME):
        block = slice(start, start + AT_A_TIME)
        squared = square[block, None] + square - 2 * points[block] @ points.T
        away = xp.sqrt(xp.clip(squared, 0, None)).astype(xp.float64) @ member  # (B, 2) sums
        own, mine = second[block].astype(xp.int64), xp.arange(len(squared))
        a = away[mine, own] / xp.clip(count[own] - 1, 1, None)
        b = away[mine, 1 - own] / count[1 - own]
        fits = (b - a) / xp.clip(xp.maximum(a, b), np.finfo(float).tiny, None)
        total += float(xp.where(count[own] > 1, fits, 0.0).sum())
    return total / len(points)


def probed(points: Array, labels: Labels, without: Mask, backend: Backend, seed: int) -> Labels:
    """What a linear classifier says of all rows that was trained on the others. (N,)"""
    xp = backend.xp
    ours = points.astype(xp.float32)
    ours = ours - ours.mean(axis=0)
    ours = ours / xp.clip(ours.std(axis=0).mean(), np.finfo(np.float32).tiny, None)
    known = backend.tensor(xp.ascontiguousarray(ours))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(known.shape[1], int(labels.max()) + 1).to(backend.device)
    rest = np.flatnonzero(~without)
    places = backend.tensor(xp.asarray(rest))
    conceal.fine_tune(head, known[places], labels[rest], conceal.Settings(), backend, seed=seed)
    with torch.inference_mode():
        told = backend.to_numpy(backend.array(head(known).argmax(1)))
    return told.astype(np.int64)


def _excluded(
    parts: list[Part], n: int, chosen: Clustering, reclassify: Reclassify
) -> dict[int, Labels]:
    """For each part that was left out of a training, by its number: its labels then."""
    smaller = [number for number, part in enumerate(parts) if part.is_smaller]
    each = [[number] for number in range(len(parts))]
    found: dict[int, Labels] = {}
    for together in each if chosen.exclude == "each" else [smaller] if smaller else []:
        rows = np.zeros(n, bool)
        for number in together:
            rows[parts[number].rows] = True
        told = reclassify(rows)
        found |= {number: told[parts[number].rows] for number in together}
    return found


def _count(parts: list[Part], chosen: Clustering) -> int:
    """Trainings for the exclusion."""
    if chosen.decide != "exclusion" or not parts:
        return 0
    return len(parts) if chosen.exclude == "each" else 1


def _poison(part: Part, predicted: Labels | None, chosen: Clustering) -> tuple[bool, float]:
    """Whether a part is poison, and how much speaks for it, 0..1."""
    if chosen.decide == "size":
        return part.share < chosen.size, 1 - part.share
    if chosen.decide == "silhouette":
        fits = max(0.0, part.silhouette) if part.is_smaller else 0.0
        return fits > chosen.silhouette, fits
    if predicted is None:
        return False, 0.0
    own, others = _counts(part, predicted)
    return own < chosen.ratio * others, others / max(1, own + others)


def _counts(part: Part, predicted: Labels) -> tuple[int, int]:
    """l and p: rows of a part that keep their label, and that get the most frequent other one."""
    counts = np.bincount(predicted, minlength=part.label + 1)
    return int(counts[part.label]), int(np.delete(counts, part.label).max(initial=0))


def _source(predicted: Labels, label: int, chosen: Clustering) -> Labels:
    """Where the rows of a poisoned part come from."""
    if chosen.source == "row":
        return predicted
    others = predicted[predicted != label]
    return np.full(len(predicted), np.bincount(others).argmax() if len(others) else label)
