"""The defenses by name: each takes a DefenderView and returns an Outcome.

A new one is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csc_gpu import csc
from csc_gpu.defenses import (
    abl,
    ac,
    ct,
    d_br,
    d_st,
    dbd,
    dp_sgd,
    nad,
    nc,
    none_defense,
    plain,
    scan,
    spectral,
    spectre,
    strip,
)
from csc_gpu.types import Outcome, Segregation

RESERVE, RATE = "reserve", "rate"
"""What a defense may need beside the corpus: clean images; the poisoning rate, told by a setting
<name>.rate (the matrix tells the true one, and says so in the row)."""


@dataclass(frozen=True)
class Entry:
    """A defense and its settings."""

    run: Callable[..., Outcome]  # (view, settings, backend, *, seed, log, kept) -> Outcome
    settings: Callable[[], Any]  # a csc.Common with a section of its own
    summary: str
    needs: tuple[str, ...] = ()
    judge: Callable[..., Segregation] | None = None
    """(features (N, D), labels (N,), settings, backend, *, seed) -> its verdict without images."""

    @property
    def needed(self) -> str:
        """What it needs, in a word or two; - for nothing."""
        return ", ".join(self.needs) or "-"


DEFENSES: dict[str, Entry] = {
    "csc": Entry(csc.defend, csc.Settings, "Cluster Segregation Concealment, arXiv 2604.21416"),
    "plain": Entry(plain.defend, plain.Settings, "no defense: ordinary training, the control"),
    "ac": Entry(ac.defend, ac.Settings, "Activation Clustering, arXiv 1811.03728", judge=ac.judge),
    "spectral": Entry(
        spectral.defend,
        spectral.Settings,
        "Spectral Signatures, arXiv 1811.00636",
        needs=(RATE,),
        judge=spectral.judge,
    ),
    "scan": Entry(scan.defend, scan.Settings, "SCAn, USENIX Security 2021", needs=(RESERVE,)),
    "spectre": Entry(
        spectre.defend,
        spectre.Settings,
        "SPECTRE, arXiv 2104.11315",
        needs=(RATE,),
        judge=spectre.judge,
    ),
    "strip": Entry(strip.defend, strip.Settings, "STRIP, arXiv 1902.06531", needs=(RESERVE,)),
    "ct": Entry(ct.defend, ct.Settings, "Confusion Training, arXiv 2205.13616", needs=(RESERVE,)),
    "abl": Entry(abl.defend, abl.Settings, "Anti-Backdoor Learning, arXiv 2110.11571"),
    "d-br": Entry(d_br.defend, d_br.Settings, "Effective Backdoor Defense, removal, NeurIPS 2022"),
    "d-st": Entry(d_st.defend, d_st.Settings, "Effective Backdoor Defense, training, NeurIPS 2022"),
    "nad": Entry(
        nad.defend,
        nad.Settings,
        "Neural Attention Distillation, arXiv 2101.05930",
        needs=(RESERVE,),
    ),
    "nc": Entry(
        nc.defend,
        nc.Settings,
        "Neural Cleanse with unlearning, IEEE S&P 2019",
        needs=(RESERVE,),
    ),
    "none-defense": Entry(none_defense.defend, none_defense.Settings, "NONE, arXiv 2202.06382"),
    "dp-sgd": Entry(
        dp_sgd.defend, dp_sgd.Settings, "DP-SGD, gradient shaping, arXiv 2002.11497; uses Opacus"
    ),
    "dbd": Entry(dbd.defend, dbd.Settings, "Decoupling-based Backdoor Defense, arXiv 2202.03423"),
}
