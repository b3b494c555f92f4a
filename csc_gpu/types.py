"""The values that flow through the pipeline. All are frozen.

Shape letters, fixed for the package: N rows, C classes, D feature dimensions, K clusters, Q scales,
S snapshots, M held-out images, B batch, H W image height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from csc_gpu.files import Files
from csc_gpu.tolerance import Tolerance, listed

Array = Any
"""An array of the backend: numpy.ndarray with --cpu, cupy.ndarray on a GPU."""

Mask = NDArray[np.bool_]
Log = Callable[..., None]
"""log(event, **fields): where long work says how far it is."""


def quiet(event: str, **fields: object) -> None:
    """The log of someone who does not want one."""


@dataclass(frozen=True)
class Corpus:
    """Labelled images. A row keeps its id whatever is shuffled or left out."""

    labels: NDArray[np.int64]  # (N,) 0..C-1
    classes: tuple[str, ...]  # C names; the place in this list is the label
    ids: NDArray[np.int64]  # (N,) the row's number in the source
    paths: tuple[str, ...]  # N names, relative to the source
    pixels: Array | None = None  # (N, H, W, 3) uint8 RGB once resident: NumPy, or torch on a GPU
    files: Files = field(default_factory=Files)  # N places while the pixels are on disk
    read_at: tuple[int, int] | None = None  # H and W to which files are read
    file_bytes: int = 0  # most that one file takes decoded, before it is resized; 0: not known
    tolerance: Tolerance | None = None  # rows that may prove broken while they are first read

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def images(self) -> Array:
        """The resident pixels. (N, H, W, 3) uint8"""
        if self.pixels is None:
            raise ValueError("this corpus is still on disk; read it with backend.reader.read")
        return self.pixels

    @property
    def image_size(self) -> tuple[int, int]:
        """H and W of every image, wherever the pixels are."""
        if self.pixels is not None:
            height, width = self.pixels.shape[1:3]
            return int(height), int(width)
        if self.read_at is None:
            raise ValueError("this corpus has no size yet; read it with backend.reader.read")
        return self.read_at

    @property
    def is_sound(self) -> Mask:
        """Rows that have not proved broken. (N,) bool"""
        broken = self.tolerance.broken if self.tolerance else ()
        return ~np.isin(self.ids, list(broken))

    def sound(self) -> Corpus:
        """The corpus of the rows that have not proved broken."""
        return self if self.is_sound.all() else self.take(np.flatnonzero(self.is_sound))

    def take(self, rows: NDArray[np.int64]) -> Corpus:
        """The corpus of these rows, in this order; ids and paths go with them."""
        return replace(
            self,
            labels=self.labels[rows],
            ids=self.ids[rows],
            paths=tuple(self.paths[row] for row in rows),
            pixels=None if self.pixels is None else self.pixels[rows],
            files=self.files.take(rows) if self.files else self.files,
        )


@dataclass(frozen=True)
class Split:
    """What a source holds: rows to train on, and rows held out."""

    train: Corpus
    test: Corpus
    broken: tuple[str, ...] = ()  # files left out because they do not decode

    def sound(self) -> Split:
        """The same without the rows to train on that have proved broken since; they are listed."""
        late = listed(self.train.tolerance.in_order()) if self.train.tolerance else ()
        return replace(self, train=self.train.sound(), broken=self.broken + late)


@dataclass(frozen=True)
class AnswerKey:
    """What only the evaluator sees: who is poison, and what the trigger does to held-out images."""

    is_poison: Mask  # (N,) stamped rows that teach the backdoor
    is_cover: Mask  # (N,) stamped rows that keep their true label; counted as clean
    orig_labels: NDArray[np.int64]  # (N,) before relabelling; -1: not known
    given_labels: NDArray[np.int64]  # (N,) as the defender sees them
    paths: tuple[str, ...]  # N, to join with a run's suspects
    test: NDArray[np.uint8]  # (M, H, W, 3) clean held-out images
    triggered: NDArray[np.uint8]  # (T, H, W, 3) those with an attack label, stamped, in order
    test_labels: NDArray[np.int64]  # (M,) true labels
    attack_labels: NDArray[np.int64]  # (M,) what the attacker wants; -1: not under attack, T others
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DefenderView:
    """All that a defense may see: the corpus, and a small trusted set if there is one."""

    train: Corpus
    trusted: Corpus | None = None


@dataclass(frozen=True)
class Clusters:
    """One clustering of N rows. A row outside every cluster is noise, -1."""

    of_row: Array  # (N,) int32, -1..K-1, on the device
    size: Array  # (K,) rows in each cluster
    labels: Array  # (K, C) how many rows of each label a cluster holds
    density: Array  # (K,) 1 / mean k-distance of its rows
    eps: float  # DBSCAN radius, in units of the embedded features; NaN: one for each label
    scale: float  # the quantile of the k-distance that eps was taken from


@dataclass(frozen=True)
class Sighting:
    """One snapshot seen at every scale, finest first."""

    epoch: float
    clusterings: tuple[Clusters, ...]  # Q, or none if the rule does not count this snapshot
    min_samples: int
    stray: Array  # (N,) bool, on the device: nearer to another label's mean than to its own
    sampled: int = 0  # rows that DBSCAN saw, where it did not see all
    plane: Array | None = None  # (N, 2) float16: two principal components; None if not clustered
    reach: Array | None = None  # (R,) quantiles of the k-distance, evenly from 0 to 1


@dataclass(frozen=True)
class Reclassified:
    """A fresh model, trained without some rows, predicts every row."""

    candidates: Mask  # (N,) left out because they may be poison
    controls: Mask  # (N,) left out although nobody suspects them: how wrong is it on unseen rows?
    predicted: NDArray[np.int64]  # (N,) 0..C-1


@dataclass(frozen=True)
class Transfer:
    """A pattern, the mean of a group of images less that of another, tried on other labels."""

    label: int
    groups: str  # fingerprint of the two groups: masks would take 2 N bytes for every question
    share: float  # of the images tried, how many get the label once the pattern is added. 0..1
    source: int = -1  # whose images get it most; -1: of no label were enough tried
    most: float = 0.0  # share of its images that do. 0..1

    @staticmethod
    def fingerprint(group: Mask, rest: Mask) -> str:
        """What tells these two groups (N,) from all others."""
        bits = np.packbits(group).tobytes() + np.packbits(rest).tobytes()
        return hashlib.sha256(bits).hexdigest()


class Witness(Protocol):
    """What can be asked about a suspicion: the trained model, its features, the images."""

    def points(self) -> Array:
        """Features of all rows under the trained model. (N, D) on the device"""

    def transfers(self, group: Mask, rest: Mask, label: int) -> Transfer:
        """How many of the other labels' images get `label` once group's pattern is added."""

    def reclassify(self, candidates: Mask) -> Reclassified:
        """Predictions of a fresh model trained without these rows: AC's exclusion."""


@dataclass(frozen=True)
class Segregation:
    """Who is suspect, and why. Higher scores are more suspect; suspects score .5 and above."""

    suspect: Mask  # (N,)
    score: NDArray[np.float32]  # (N,) 0..1
    table: Mapping[str, NDArray[Any]]  # (N,) each: cluster, cluster_size, ... as in suspects.csv
    notes: Mapping[str, Any]  # what the rule did, for the summary
    checks: tuple[Reclassified, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    clusters: tuple[Mapping[str, Any], ...] = ()  # every cluster at every scale, as in clusters.csv


@dataclass(frozen=True)
class Drawing:
    """Some rows at the snapshots that counted, in two dimensions, to be looked at. On the host."""

    rows: NDArray[np.int64]  # (V,) places in the corpus
    epoch: NDArray[np.float64]  # (S,)
    plane: NDArray[np.float16]  # (S, V, 2) two principal components
    scale: NDArray[np.float64]  # (S,) the one at which most rows are named
    cluster: NDArray[np.int32]  # (S, V) at that scale; -1: noise
    reach: NDArray[np.float32]  # (S, R) quantiles of the k-distance, evenly from 0 to 1


@dataclass(frozen=True)
class Outcome:
    """What a defense hands back."""

    model: Any  # models.Net, with n_classes outputs, or one more: the virtual class
    undefended: Any  # models.Net as trained, before the defense changed it; None: there was none
    n_classes: int
    segregation: Segregation | None
    snapshots: Mapping[str, NDArray[Any]]  # features (S, N, D), epoch (S,), if they were to be kept
    seconds: Mapping[str, float]  # wall time of each stage
    recovered: Any = None  # recover.Recovered, if it was asked for
    drawing: Drawing | None = None  # for the report, if anything was clustered
    paths: tuple[str, ...] = ()  # N names of the rows, relative to the source; of csc alone
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)  # of each stage, where known

    @property
    def suspects(self) -> tuple[str, ...]:
        """The suspects by name, in the order of the rows; none where no rows have names."""
        named = self.paths and self.segregation
        rows = np.flatnonzero(named.suspect) if named else ()
        return tuple(self.paths[row] for row in rows)
