"""A trained cell of benchmarks.detection, opened: its corpus, its key, its net, its snapshots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click


class BadInput(click.ClickException):
    """What a user can mend: one line, and exit status 2."""

    exit_code = 2


@contextmanager
def cell_in(place: Path) -> Iterator[None]:
    """What is wrong with the files of a cell is one line. Raises BadInput."""
    from csc_gpu.errors import CscError

    try:
        yield
    except (CscError, OSError, ValueError, KeyError) as fault:
        told = " ".join(str(fault).split())
        raise BadInput(f"{place} is no trained cell ({told}); train it again") from fault


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


def open_cell(place: Path, changes: Mapping[str, Any]) -> Cell:
    """The cell in a folder, on one core, with the data and training of its run and these changes.

    Raises BadInput if there is none, or its features are of another corpus.
    """
    with cell_in(place):
        return _opened(place, changes)


def _opened(place: Path, changes: Mapping[str, Any]) -> Cell:
    from csc_gpu import answers, csc, run, sources
    from csc_gpu.backend import open_backend
    from csc_gpu.config import override, read_toml

    summary = json.loads((place / "run" / "summary.json").read_text())
    of_run = read_toml(place / "run" / "settings.toml")
    kept = {name: of_run[name] for name in of_run if name.startswith(("data.", "train."))}
    settings, cpu = override(csc.Settings(), {**kept, **changes}), open_backend("cpu", 1)
    corpus = sources.load(str(place / "poisoned"), settings.data, backend=cpu).train
    key = answers.load_key(place / "poisoned" / "key.npz")
    at = {path: row for row, path in enumerate(key.paths)}
    snapshots = run.load_snapshots(place / "run" / "features.npz")
    if snapshots.names.paths != corpus.paths:
        raise ValueError("its features are of another corpus")
    return Cell(
        place=place,
        told=json.loads((place / "cell.json").read_text()),
        summary=summary,
        settings=settings,
        backend=cpu,
        corpus=corpus,
        key=key,
        rows=[at[path] for path in corpus.paths],
        model=run.load_model(place / "run" / "undefended.safetensors", summary, corpus.n_classes),
        snapshots=snapshots,
    )
