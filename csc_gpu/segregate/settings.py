"""How suspects are found: every setting of segregation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from csc_gpu.config import require

RULES = ("two-stage", "persistence", "text", "algorithm1", "per_label")
BY_LABEL = ("per_label",)
"""Rules whose clusters are sought among the rows of each label by themselves."""
MODES = ("auto", "all", "sample")
ALL_PAIRS = 200_000
"""More rows than that are not clustered together unless segregate.mode is all."""
FITTING = -1
"""Means: as many labels need it."""
COMPONENTS = 16
LEAST, OF_A_LABEL = 0.002, 0.2
MOST_SCALES = 64
"""One bit each says at which scales a row was hit."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How suspects are found."""

    rule: str = "two-stage"
    """two-stage, persistence, text, algorithm1 or per_label."""
    mode: str = "auto"
    """all: DBSCAN sees all rows. sample: it sees a sample, and every other row joins its nearest
    core row within the radius. auto: a sample where more than 200,000 rows would be clustered
    together, else all."""
    sample: int = 50_000
    """Rows of the sample; an island needs min_share of them, so a smaller one finds less."""
    pca: int = FITTING
    """Principal components to cluster in; 0: all feature dimensions; -1: 16, or twice the root of
    the number of labels if that is more, for few dimensions do not part many labels."""
    scales: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Quantiles of the k-distance from which DBSCAN's radii are taken."""
    coarsest: float = 0.6
    """The coarsest scale that gives evidence; coarser ones only part rows from their home."""
    min_share: float = FITTING
    """DBSCAN's min_samples as a share of the rows it sees; -1: .002, or where many labels are
    clustered together a fifth of an average label's share if that is less, for an island of fewer
    rows is not seen, nor a label."""
    min_rows: int = 8
    """DBSCAN's least min_samples, in rows."""
    purity: float = 0.95
    """Share of a cluster's commonest label from which it counts as pure."""
    latest: int = 5
    """Snapshots that count, the last of those watched: while classes still part, benign ones make
    islands that pass for poison (persistence, two-stage; the other rules take all)."""
    persistence: int = 3
    """Scales at which a row must be hit for a vote of one snapshot (persistence, two-stage)."""
    votes: int = 1
    """Snapshots that must vote for a row."""
    pure_homes: float = 0.3
    """Below this share of labels whose home is pure, a pure home is itself a hit."""
    max_share: float = 0.2
    """No more than this share of all rows is flagged: the highest scores."""
    max_label_share: float = 0.75
    """No more than this share of a label's rows is taken for its core, or flagged unless a trigger
    commands the label and the check contradicts the rows."""
    k_rows: int = 20_000
    """Rows asked for their k-distance, at most."""
    label_share: float = 0.1
    """Rows of the core a label must hold to be suspected, against the label that has most of it."""
    check_epochs: int = 10
    """Epochs of the model trained without the candidates, if training has not fewer (two-stage);
    train.min_steps holds for it too."""
    controls: float = 0.05
    """Share of unsuspected rows left out with the candidates, to learn how far to trust a check."""

    def __post_init__(self) -> None:
        caps = ("max_share", "max_label_share", "label_share", "controls")
        shares = ("purity", "pure_homes", "coarsest", *caps)
        counts = ("min_rows", "persistence", "votes", "k_rows", "latest", "check_epochs", "sample")
        require(self, "segregate", f"one of {', '.join(RULES)}", RULES.__contains__, "rule")
        require(self, "segregate", f"one of {', '.join(MODES)}", MODES.__contains__, "mode")
        require(self, "segregate", "in (0, 1]", lambda share: 0 < share <= 1, *shares)
        require(self, "segregate", "1 or more", lambda count: count >= 1, *counts)
        require(self, "segregate", "-1 or more", lambda dims: dims >= FITTING, "pca")
        share = "in (0, 1], or -1"
        require(self, "segregate", share, lambda x: x == FITTING or 0 < x <= 1, "min_share")
        most = f"at most {MOST_SCALES} quantiles in (0, 1)"
        require(self, "segregate", most, _are_quantiles, "scales")
        finest = f"{min(self.scales)} or more, the finest of segregate.scales"
        require(self, "segregate", finest, lambda scale: scale >= min(self.scales), "coarsest")

    def suited(self, labels: int) -> Settings:
        """The same, with the components and min_share that fit so many labels where none is set."""
        pca, least = self.pca, self.min_share
        if pca == FITTING:
            pca = max(COMPONENTS, math.ceil(2 * labels**0.5))
        if least == FITTING:
            least = LEAST if self.rule in BY_LABEL else min(LEAST, OF_A_LABEL / labels)
        return replace(self, pca=pca, min_share=least)

    def seen(self, n: int) -> int:
        """How many of n rows that are clustered together DBSCAN sees."""
        is_sampled = self.mode == "sample" or (self.mode == "auto" and n > ALL_PAIRS)
        return min(n, self.sample) if is_sampled else n


def _are_quantiles(scales: tuple[float, ...]) -> bool:
    return 0 < len(scales) <= MOST_SCALES and all(0 < scale < 1 for scale in scales)
