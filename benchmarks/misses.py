"""What misses and false alarms cost: concealment from suspects that are wrong on purpose.

    python -m benchmarks.misses CELL CELL ... --verdict two-stage.csv

CELL is a cell of benchmarks.detection, judged. The suspects are its poison without the part that
the detector believes in least (its own misses) or a random part, or with clean rows that it
believes in most; each is concealed, and scored. After misses the suspects are also grown: rows of
their labels that the concealed head sends to the virtual class join them, up to three times. The
extractor is frozen, so features are computed once. One JSON line a cell and set of suspects.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.cells import open_cell, read_cell
from benchmarks.command import Command
from csc_gpu.errors import CorpusError

RESULTS = Path(__file__).parent / "results" / "misses.jsonl"
RECALLS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)
FALSE_ALARMS = (0.002, 0.005, 0.01, 0.02, 0.05)
ROUNDS = 3


class Heads:
    """A cell with the features of its rows, clean and triggered held-out images."""

    def __init__(self, place: Path, verdict: str) -> None:
        from csc_gpu import conceal, evaluate, run
        from csc_gpu.features import features

        there = open_cell(place, {})
        self.backend, self.conceal, self.settings = there.backend, conceal, there.settings.conceal
        self.labels, self.n_classes = there.corpus.labels, there.corpus.n_classes
        self.key, self.poison, self.model = there.key, there.poison, there.model
        told = run.load_suspects(place / verdict)
        if set(told.paths) != set(there.corpus.paths):
            raise CorpusError(f"{place / verdict} is of another corpus; judge the cell again")
        of = dict(zip(told.paths, told.score, strict=True))
        self.score = np.array([of[path] for path in there.corpus.paths])
        self.found = np.isin(
            there.corpus.paths, np.array(told.paths)[told.suspect]
        )  # what the detector itself names
        take = lambda corpus: features(self.model, corpus, self.backend)  # noqa: E731
        self.points = take(there.corpus)
        self.test = take(evaluate.unlabelled(self.key.test))
        self.triggered = take(evaluate.unlabelled(self.key.triggered))
        self.seed = there.told["seed"]

    def concealed(self, suspect: Any) -> torch.nn.Linear:
        """The head with a virtual class for these suspects (N,)."""
        head = self.conceal.widened(copy.deepcopy(self.model.head))
        labels = np.where(suspect, self.n_classes, self.labels)
        weight = torch.ones(self.n_classes + 1)
        weight[-1] = self.conceal.virtual_weight(float(suspect.mean()), self.settings.share)
        points = torch.from_numpy(self.points)
        self.conceal.fine_tune(
            head, points, labels, self.settings, self.backend, seed=self.seed, weight=weight
        )
        return head

    def grown(self, suspect: Any, head: torch.nn.Linear) -> Any:
        """The suspects and what the head sends to the virtual class of their labels (N,)."""
        mine = np.isin(self.labels, np.unique(self.labels[suspect]))
        return suspect | (mine & (guess(head, self.points) == self.n_classes))

    def scored(self, suspect: Any, head: torch.nn.Linear) -> dict[str, float]:
        """Recall, false alarms, accuracy and attack success with this head."""
        under = self.key.attack_labels >= 0
        wanted, true = self.key.attack_labels[under], self.key.test_labels[under]
        others = wanted != true
        return {
            "tpr": float(suspect[self.poison].mean()),
            "fpr": float(suspect[~self.poison].mean()),
            "acc": float((guess(head, self.test) == self.key.test_labels).mean()),
            "asr": float((guess(head, self.triggered)[others] == wanted[others]).mean()),
        }


@torch.inference_mode()
def guess(head: torch.nn.Linear, points: Any) -> Any:
    """The likeliest output of each row of features (N, D). (N,)"""
    return head(torch.from_numpy(points)).argmax(1).numpy()


def wrong_on_purpose(there: Heads) -> list[tuple[str, float, Any]]:
    """(kind, how much, suspects (N,)) of every trial."""
    rng = np.random.default_rng(0)
    poison, clean = np.flatnonzero(there.poison), np.flatnonzero(~there.poison)
    trials = [("the verdict", float("nan"), there.found)]
    orders = {
        "own": (poison[np.argsort(-there.score[poison], kind="stable")],
                clean[np.argsort(-there.score[clean], kind="stable")]),
        "random": (rng.permutation(poison), rng.permutation(clean)),
    }  # fmt: skip
    for name, (some, others) in orders.items():
        for recall in RECALLS:
            suspect = np.zeros(len(there.labels), bool)
            suspect[some[: round(recall * len(some))]] = True
            trials.append((f"{name} misses", recall, suspect))
        for share in FALSE_ALARMS:
            suspect = there.poison.copy()
            suspect[others[: round(share * len(others))]] = True
            trials.append((f"{name} false alarms", share, suspect))
    return trials


@click.command(cls=Command)
@click.argument("cells", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--verdict", default="two-stage.csv", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(cells: tuple[Path, ...], verdict: str, out: Path) -> None:
    """Conceal from suspects that are wrong on purpose, and from those grown of them."""
    from csc_gpu.backend.doctor import describe
    from csc_gpu.run import commit

    for place in cells:
        if read_cell(place)["attack"] == "none":
            raise CorpusError(f"{place} has no poison to miss; give a cell with an attack")
    out.parent.mkdir(parents=True, exist_ok=True)
    for place in cells:
        there = Heads(place, verdict)
        about = {"cell": place.name, "commit": commit(), "date": time.strftime("%Y-%m-%d"),
                 "processor": describe()["processor"]}  # fmt: skip
        for kind, amount, suspect in wrong_on_purpose(there):
            head = there.concealed(suspect)
            rounds = [there.scored(suspect, head)]
            while len(rounds) <= ROUNDS and "alarms" not in kind:
                more = there.grown(suspect, head)
                if (more == suspect).all():
                    break
                suspect, head = more, there.concealed(more)
                rounds.append(there.scored(suspect, head))
            line = {**about, "kind": kind, "amount": None if amount != amount else amount,
                    "rounds": rounds}  # fmt: skip
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            click.echo(f"{place.name} {kind} {amount}: " + "; ".join(map(said, rounds)))


def said(score: dict[str, float]) -> str:
    """One round as text."""
    return " ".join(f"{name} {value:.4f}" for name, value in score.items())


if __name__ == "__main__":
    main()
