"""Segregation: cluster the features of early snapshots, and name the suspects.

One snapshot is seen at several scales (clusters.py): rows are L2-normalised, projected on their
principal components and clustered by DBSCAN, all of them or a sample that the others join
(sample.py), at radii taken from quantiles of the k-distance. Then a rule reads all the sightings
(rules.py). CSC (arXiv 2604.21416) describes its rule in two ways that disagree; both are here as
the paper's, `text` and `algorithm1`. `two-stage`, the default, and its first stage, `persistence`,
are ours; stage 2 (verify.py, court.py, testimony.py) asks the model and the images.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.backend import Backend
from csc_gpu.errors import CorpusError
from csc_gpu.segregate.clusters import observe
from csc_gpu.segregate.drawing import drawing
from csc_gpu.segregate.records import of_sighting, of_verdict, shared, to_sighting, to_verdict
from csc_gpu.segregate.rules import RULES, gather, listing, looked_at
from csc_gpu.segregate.settings import Settings
from csc_gpu.segregate.verify import Verdict, verify
from csc_gpu.types import Mask, Segregation, Sighting, Witness

__all__ = [
    "RULES",
    "Settings",
    "at_most",
    "capped",
    "drawing",
    "looked_at",
    "observe",
    "of_sighting",
    "of_verdict",
    "segregate",
    "shared",
    "to_sighting",
    "to_verdict",
    "voted_core",
]


def segregate(
    sightings: Sequence[Sighting],
    labels: NDArray[np.int64],
    settings: Settings,
    backend: Backend,
    witness: Witness | None = None,
) -> Segregation:
    """Name the suspects from all sightings; without a witness, two-stage stops after stage 1.

    Raises CorpusError if there is nothing to look at.
    """
    if not sightings:
        raise CorpusError("no snapshot was watched, so there is nothing to segregate")
    rule = RULES[settings.rule]
    evidence = gather(sightings, rule, settings, backend)
    core, freed = voted_core(evidence.votes, labels, settings)
    suited = settings.suited(len(np.unique(labels)))
    notes: dict[str, Any] = {
        "rule": settings.rule,
        "pca": suited.pca,
        "min_share": suited.min_share,
        "sampled": max(seen.sampled for seen in sightings),
        "core_rows": int(core.sum()),
        "freed_labels": freed,
    }
    found = Verdict(core, evidence.share, {})
    if rule.verified:
        found = verify(core, evidence.share, sightings, labels, settings, backend, witness)
    suspect, capped_ = capped(found.suspect, found.belief, labels, settings, found.proved)
    score = np.where(suspect, 0.5 + 0.5 * found.belief, 0.49 * found.belief).astype(np.float32)
    return Segregation(
        suspect=suspect,
        score=score,
        table={**evidence.table, "reason": np.where(suspect, settings.rule, "")},
        notes=notes | found.notes | {"capped": capped_},
        checks=found.checks,
        transfers=found.transfers,
        clusters=tuple(line for s in sightings for line in listing(s, rule, settings, backend)),
    )


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
    suspect: Mask,
    belief: NDArray[np.float32],
    labels: NDArray[np.int64],
    settings: Settings,
    proved: Collection[int] = (),
) -> tuple[Mask, bool]:
    """At most so many rows of each label, but for those proved, and of all: the likeliest.

    A tie over a limit goes free as a whole, so that no order of the rows decides.
    """
    kept = suspect
    for label in np.setdiff1d(labels[suspect], list(proved)):
        kept = at_most(settings.max_label_share, kept, labels == label, belief)
    kept = at_most(settings.max_share, kept, np.ones(len(labels), bool), belief)
    return kept, bool((kept != suspect).any())


def at_most(share: float, suspect: Mask, among: Mask, belief: NDArray[np.float32]) -> Mask:
    """The suspects (N,), but among these rows at most such a share: the likeliest. (N,)"""
    limit, ours = int(share * among.sum()), suspect & among
    if ours.sum() <= limit:
        return suspect
    first_out = np.sort(belief[ours])[::-1][limit]
    free: Mask = ours & (belief <= first_out)
    return suspect & ~free
