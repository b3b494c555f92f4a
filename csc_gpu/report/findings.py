"""All that a run has left behind, read back: what the page is made of."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import csc, harmless, run
from csc_gpu.config import flattened, names, override, read_toml, typed
from csc_gpu.errors import CorpusError
from csc_gpu.types import Drawing, Mask

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Findings:
    """A finished run, or the verdict on a feature file; parts that it does not have are empty."""

    folder: Path
    summary: Mapping[str, Any]
    settings: csc.Settings
    score: Mapping[str, Any]  # score.json
    log: Lines  # the events of log.jsonl
    clusters: Lines  # clusters.csv
    suspects: run.Suspects | None
    drawing: Drawing | None

    @property
    def size(self) -> tuple[int, int] | None:
        """H and W of its images; None where there were none."""
        size = self.summary.get("image_size")
        return (size[0], size[1]) if size else None

    def events(self, name: str) -> Lines:
        """The lines of the log about one event."""
        return [line for line in self.log if line.get("event") == name]

    def suspected(self, most: int) -> list[str]:
        """The labels with most suspects, so many of them."""
        counts = self.summary.get("suspects_by_class") or {}
        return sorted(counts, key=lambda name: -counts[name])[:most]

    def rows(self, label: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of a label: suspects, the likeliest first, and the others."""
        assert self.suspects is not None
        ours = labelled(self.suspects, label)
        guilty = np.flatnonzero(ours & self.suspects.suspect)
        likeliest = np.argsort(-self.suspects.score[guilty], kind="stable")
        return guilty[likeliest], np.flatnonzero(ours & ~self.suspects.suspect)

    def command(self) -> str:
        """The command that gives this run again, as far as the run tells."""
        about, usual = self.summary, csc.Settings()
        if "seed" not in about:
            return ""
        given, default = flattened(self.settings), flattened(usual)
        changed = [name for name in given if given[name] != default[name]]
        words = ["csc-gpu", "train", quoted(about["source"]), "--out", quoted(str(self.folder))]
        words += ["--defense", about["defense"]] if about["defense"] != "csc" else []
        words += ["--seed", str(about["seed"])] + (["--cpu"] if about["backend"] == "cpu" else [])
        values = ((name, given[name]) for name in changed)
        told = (
            f"{name}={typed(tuple(value) if isinstance(value, list) else value)}"
            for name, value in values
        )
        return " ".join(words + [word for change in told for word in ("--set", quoted(change))])


def labelled(suspects: run.Suspects, label: str) -> Mask:
    """The rows that carry this label. (N,)"""
    return np.array([name == label for name in suspects.labels], bool)


def quoted(word: str) -> str:
    """The word as a shell takes it."""
    import shlex

    return shlex.quote(word)


def read(folder: Path) -> Findings:
    """Raises CorpusError if it is no run, ConfigError if its settings are none."""
    summary = run.read_document(folder, "summary.json")
    if "verdict" not in summary or "versions" not in summary:
        raise CorpusError(f"{folder} is no run of ours: summary.json lacks a verdict")
    scored = (folder / "score.json").exists()
    suspects, drawing = folder / "suspects.csv", folder / "drawing.npz"
    return Findings(
        folder.resolve(),
        summary,
        settings_of(folder),
        run.read_document(folder, "score.json") if scored else {},
        _log(folder / "log.jsonl"),
        _clusters(folder / "clusters.csv"),
        run.load_suspects(suspects) if suspects.exists() else None,
        run.load_drawing(drawing) if drawing.exists() else None,
    )


def settings_of(folder: Path) -> csc.Settings:
    """The run's settings; names that only an older version knew are left out."""
    given, known = read_toml(folder / "settings.toml"), names(csc.Settings())
    return override(csc.Settings(), {name: given[name] for name in known if name in given})


def _log(path: Path) -> Lines:
    """The events, but for lines that were cut off."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def _clusters(path: Path) -> Lines:
    numbers = ("epoch", "scale", "eps", "size", "purity", "diversity", "density")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except OSError:
        return []
    try:
        return [
            line
            | {name: float(line[name] or "nan") for name in numbers}
            | {"label": harmless.plain(line["label"]), "named": line["named"] == "True"}
            for line in lines
        ]
    except (KeyError, ValueError) as fault:
        raise CorpusError(f"{path} is no list of clusters of ours: {fault}") from fault
