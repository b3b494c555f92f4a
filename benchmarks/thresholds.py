"""How far may the constants of the default rule move? Cells judged again with each a quarter off.

    python -m benchmarks.thresholds judge CELL CELL ... --out LINES
    python -m benchmarks.thresholds table LINES

CELL is a trained cell of benchmarks.detection. One JSON line a cell, constant and factor; what has
a line is skipped. A snapshot is clustered once, and images are asked a question once; what a check
says is kept in CELL/checks, so that only other candidates cost a training.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.cells import Cell, open_cell, read_cell
from benchmarks.command import Commands, json_lines
from benchmarks.detection import LINES, sighted
from csc_gpu.errors import CorpusError

RESULTS = Path(__file__).parent / "results" / "thresholds.jsonl"
FACTORS = (0.75, 1.25)
CONSTANTS = {
    "court": (
        "OUTSIDE", "MOST_OF_LABEL", "USUAL", "MARGIN", "ALONE", "SURELY", "OF_SOURCE", "MOSTLY",
        "APART",
    ),
    "testimony": (
        "TRUSTED", "UNEXPLAINED", "UNSURE", "LARGE", "BEYOND_CHANCE", "SCATTERED",
        "MOST", "KIND",
    ),
    "verify": ("CONTRADICTED", "CLEARLY", "MOST_LEFT_OUT"),
    "kin": ("REACHED", "KNOWN", "LIFT"),
    "settings": ("purity", "pure_homes", "persistence", "label_share", "max_label_share"),
}  # fmt: skip
"""Modules of csc_gpu.segregate and what they hold constant; of `settings`, those of stage 1.

Not moved: what is a count (rows asked, folds, rounds), what clusters (its radii, min_share), which
snapshots are seen, and how long the check's net learns.
"""
NOT_SHARES = ("APART", "LIFT", "BEYOND_CHANCE", "CLEARLY", "persistence")
"""All else is a share, and does not go above 1."""
AS_IT_IS = "as it is"


def moved(name: str, value: float, factor: float) -> float:
    """A constant times a factor: at most 1 if it is a share, whole and another one if it counts."""
    if isinstance(value, int):
        return round(value * factor) if round(value * factor) != value else value + (factor > 1)
    return value * factor if name in NOT_SHARES else min(1.0, value * factor)


def variants() -> Iterator[tuple[str, str, float]]:
    """(module, constant, factor) of every judgement; the first is as it is."""
    yield "", AS_IT_IS, 1.0
    for module, names in CONSTANTS.items():
        yield from ((module, name, factor) for name in names for factor in FACTORS)


@contextmanager
def changed(module: str, name: str, factor: float, settings: Any) -> Iterator[tuple[Any, float]]:
    """The segregation settings with one constant moved, and its value; moved back at the end."""
    from dataclasses import replace

    if not module:
        yield settings, float("nan")
    elif module == "settings":
        value = moved(name, getattr(settings, name), factor)
        yield replace(settings, **{name: value}), value
    else:
        where = importlib.import_module(f"csc_gpu.segregate.{module}")
        was = getattr(where, name)
        try:
            setattr(where, name, moved(name, was, factor))
            yield settings, getattr(where, name)
        finally:
            setattr(where, name, was)


class Remembering:
    """A witness of a cell that is asked a question once; checks are kept in its folder."""

    def __init__(self, cell: Cell) -> None:
        from csc_gpu import csc
        from csc_gpu.witness import Trained

        fresh = lambda seed: csc.fresh_model(cell.corpus, cell.settings, cell.backend, seed=seed)  # noqa: E731
        self.witness = Trained(
            cell.model,
            cell.corpus,
            fresh,
            cell.settings.train,
            cell.settings.segregate,
            cell.backend,
            csc.Stopwatch(cell.backend),
            seed=cell.told["seed"],
        )
        weights = (cell.place / "run" / "undefended.safetensors").read_bytes()
        trained = repr((cell.settings.train, cell.settings.segregate.check_epochs))
        of = hashlib.sha256(weights + trained.encode()).hexdigest()[:16]
        self.folder, self.known, self.trained = cell.place / "checks" / of, {}, 0

    def points(self) -> Any:
        """As Trained's."""
        return self.witness.points()

    def transfers(self, group: Any, rest: Any, label: int) -> Any:
        """As Trained's."""
        asked = digest(group), digest(rest), label
        if asked not in self.known:
            self.known[asked] = self.witness.transfers(group, rest, label)
        return self.known[asked]

    def reclassify(self, candidates: Any) -> Any:
        """As Trained's."""
        from csc_gpu.types import Reclassified

        kept = self.folder / f"{digest(candidates)}.npz"
        if not kept.exists():
            found = self.witness.reclassify(candidates)
            self.trained += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            np.savez(kept, controls=found.controls, predicted=found.predicted)
        with np.load(kept, allow_pickle=False) as stored:
            return Reclassified(candidates, stored["controls"], stored["predicted"])


def digest(rows: Any) -> str:
    """A mask (N,) in short."""
    return hashlib.sha256(np.packbits(rows).tobytes()).hexdigest()[:16]


@click.group(cls=Commands)
def cli() -> None:
    """Judge cells with each constant moved, and make the table."""


@cli.command()
@click.argument("cells", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def judge(cells: tuple[Path, ...], out: Path) -> None:
    """Judge every cell with each constant of the rule moved, but for what has a line."""
    from csc_gpu import csc, run, segregate
    from csc_gpu.backend.doctor import describe

    done = {(line["cell"], line["constant"], line["factor"]) for line in read(out)}
    for place in cells:
        read_cell(place)
    for place in cells:
        todo = [v for v in variants() if (place.name, *v[1:]) not in done]
        if not todo:
            continue
        cell = open_cell(place, {})
        usual, clock = cell.settings.segregate, csc.Stopwatch(cell.backend)
        sightings = sighted(cell.snapshots, usual, cell.backend, clock)
        witness, poison = Remembering(cell), cell.poison
        for module, name, factor in todo:
            start, before = time.process_time(), witness.trained
            with changed(module, name, factor, usual) as (settings, value):
                found = segregate.segregate(
                    sightings, cell.corpus.labels, settings, cell.backend, witness
                )
            line = {
                "cell": place.name,
                "attack": cell.told["attack"],
                "constant": name,
                "factor": factor,
                "value": None if value != value else value,
                "tpr": float(found.suspect[poison].mean()) if poison.any() else None,
                "fpr": float(found.suspect[~poison].mean()),
                "suspects": digest(found.suspect),
                "checks_trained": witness.trained - before,
                "cpu_seconds": round(time.process_time() - start, 1),
                "commit": run.commit(),
                "date": time.strftime("%Y-%m-%d"),
                "versions": describe(),
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            told = "-" if line["tpr"] is None else f"{line['tpr']:.3f}"
            click.echo(f"{place.name} {name} x {factor}: recall {told}, {line['fpr']:.4f}")


@cli.command()
@click.argument("lines", type=LINES, default=RESULTS)
def table(lines: Path) -> None:
    """Of each constant and factor: in how many cells the suspects change, and the worst of them."""
    found = read(lines)
    if not found:
        raise CorpusError(f"{lines} holds no line; judge writes them")
    click.echo(markdown(found))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if it is not there."""
    lines = json_lines(path)
    if any("constant" not in line for line in lines):
        raise CorpusError(f"{path} holds other lines; give a file that judge has written here")
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """One line for each constant and factor that changes a verdict, and one for all that do not."""
    usual = {line["cell"]: line for line in lines if line["constant"] == AS_IT_IS}
    rows = ["| constant | moved to | cells that change | furthest recall | furthest false alarms |"]
    rows.append("|---|---|---|---|---|")
    same = []
    for _, name, factor in list(variants())[1:]:
        ours = [line for line in lines if (line["constant"], line["factor"]) == (name, factor)]
        ours = [line for line in ours if line["cell"] in usual]
        if not ours:
            continue
        value = f"{ours[0]['value']:.3g}"
        other = [line for line in ours if line["suspects"] != usual[line["cell"]]["suspects"]]
        if not other:
            same.append(f"`{name}` {value}")
            continue
        told = [name, value, f"{len(other)} of {len(ours)}"]
        told += [furthest(other, usual, "tpr", 3), furthest(other, usual, "fpr", 4)]
        rows.append(f"| {' | '.join([f'`{told[0]}`', *told[1:]])} |")
    rows.append(f"\nIn none of {len(usual)} cells: {', '.join(same) or '-'}.")
    return "\n".join(rows)


def furthest(
    lines: list[dict[str, Any]], usual: dict[str, dict[str, Any]], name: str, digits: int
) -> str:
    """From what to what a figure moves, in the cell where it moves most, and its name."""
    known = [line for line in lines if line[name] is not None]
    if not known:
        return "-"
    most = max(known, key=lambda line: abs(line[name] - usual[line["cell"]][name]))
    was = usual[most["cell"]][name]
    return f"{was:.{digits}f} to {most[name]:.{digits}f} ({most['cell']})"


if __name__ == "__main__":
    cli()
