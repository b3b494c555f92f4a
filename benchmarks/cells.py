"""A trained cell of benchmarks.detection, opened: its corpus, its key, its net, its snapshots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csc_gpu.errors import CorpusError


@dataclass(frozen=True)
class Cell:
    """What lies in the folder of a cell, in the order of the corpus. N rows."""

    place: Path
    told: dict[str, Any]  # cell.json
    summary: dict[str, Any]  # of its run
    settings: Any  # csc.Settings
    backend: Any
    corpus: Any  # types.Corpus, the rows to train on
    key: Any  # answers.Key, of all rows
    rows: Any  # (N,) the place of each row in the key
    model: Any  # the undefended net
    snapshots: Any  # run.Snapshots

    @property
    def poison(self) -> Any:
        """Which rows are poison. (N,)"""
        return self.key.is_poison[self.rows]


def read_cell(place: Path) -> dict[str, Any]:
    """What cell.json says of a trained cell. Raises CorpusError without it, or without a run."""
    try:
        told: dict[str, Any] = json.loads((place / "cell.json").read_text())
    except (OSError, ValueError) as fault:
        raise CorpusError(
            f"{place} is no cell: cannot read its cell.json; give a folder in which "
            "benchmarks.detection train has trained one"
        ) from fault
    if not (place / "run" / "summary.json").exists():
        raise CorpusError(f"the cell {place} has no run; remove the folder and train it again")
    return told


def open_cell(place: Path, changes: Mapping[str, Any]) -> Cell:
    """The cell in a folder, on one core, with the data and training of its run and these changes.

    Raises CorpusError if something is missing, or its features are of another corpus.
    """
    from csc_gpu import answers, csc, run, sources
    from csc_gpu.backend import open_backend
    from csc_gpu.config import override, read_toml

    told = read_cell(place)
    summary = json.loads((place / "run" / "summary.json").read_text())
    of_run = read_toml(place / "run" / "settings.toml")
    kept = {name: of_run[name] for name in of_run if name.startswith(("data.", "train."))}
    settings, cpu = override(csc.Settings(), {**kept, **changes}), open_backend("cpu", 1)
    corpus = sources.load(str(place / "poisoned"), settings.data, backend=cpu).train
    key = answers.load_key(place / "poisoned" / "key.npz")
    at = {path: row for row, path in enumerate(key.paths)}
    snapshots = run.load_snapshots(place / "run" / "features.npz")
    if snapshots.names.paths != corpus.paths:
        raise CorpusError(f"{place}: the features are of another corpus; train it again")
    return Cell(
        place=place,
        told=told,
        summary=summary,
        settings=settings,
        backend=cpu,
        corpus=corpus,
        key=key,
        rows=[at[path] for path in corpus.paths],
        model=run.load_model(place / "run" / "undefended.safetensors", summary, corpus.n_classes),
        snapshots=snapshots,
    )
