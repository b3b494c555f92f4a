"""The rows of a matrix as tables and plots: Markdown, CSV, and one HTML page that needs no other.

Figures are means over seeds with n and the standard deviation (of n - 1; none for a single run).
Where the attack did not take hold without a defense, no suppression is claimed: the row says so.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from csc_gpu import matrix, run
from csc_gpu.backend import Backend
from csc_gpu.config import flattened
from csc_gpu.defenses import DEFENSES, RATE, RESERVE
from csc_gpu.errors import CorpusError
from csc_gpu.progress import Console
from csc_gpu.scoring import EFFECTIVE
from csc_gpu.segregate import Settings as Segregation

Row = Mapping[str, Any]
COLUMNS: dict[str, tuple[str, ...]] = {
    "acc before": ("before", "acc"),
    "asr before": ("before", "asr"),
    "acc": ("after", "acc"),
    "asr": ("after", "asr"),
    "ra": ("after", "ra"),
    "virtual, triggered": ("after", "virtual_triggered"),
    "virtual, clean": ("after", "virtual_clean"),
    "recall": ("detection", "tpr"),
    "false alarms": ("detection", "fpr"),
    "auroc": ("detection", "auroc"),
    "recovered acc": ("recovered", "acc"),
    "recovered asr": ("recovered", "asr"),
    "recovered ra": ("recovered", "ra"),
    "seconds": ("seconds_in_all",),
    "x plain": ("times_plain",),
    "images x plain": ("images_times_plain",),
}
"""What a table shows, and where a row has it."""
DIGITS = {"seconds": 1, "x plain": 2, "images x plain": 2, "false alarms": 4}
ALIKE = ("data", "attack", "rate", "rate_of", "label_noise", "attack_options", "defense", "changed")
"""Rows that differ in these are told apart by what a line of a table shows."""
SETUP = ("source", "reserve", "rows", "image_size")
"""Rows that agree in these, too, and in the settings, differ by chance alone: seed and target."""
IMAGES = "images x plain"
NOT_TAKEN = "attack did not take hold"


@dataclass(frozen=True)
class Figure:
    """A mean over the seeds that have the figure."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """None where no row has the figure."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of n - 1; None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """mean, +- spread where there is one, - for nothing."""
        if self.mean is None:
            return "-"
        told = f"{self.mean:.{digits}f}"
        return told if self.spread is None else f"{told} ± {self.spread:.{digits}f}"


@dataclass(frozen=True)
class Line:
    """What is known of a defense against an attack: rows that differ in the seed."""

    rows: tuple[Row, ...]  # those that did not fail
    failed: tuple[Row, ...]
    apart: str = ""  # what tells it from other lines that would look the same

    @property
    def first(self) -> Row:
        """A row that stands for all."""
        return (*self.rows, *self.failed)[0]

    @property
    def n(self) -> int:
        """Seeds."""
        return len({row["seed"] for row in self.rows})

    @property
    def cell(self) -> tuple[str, str]:
        """Data set, and attack with its rate."""
        row = self.first
        rate = "" if row["attack"] == "none" else f" {row['rate']:g}"
        rate += " of target" if rate and row["rate_of"] == "target" else ""
        noise = f", label noise {row['label_noise']:g}" if row["label_noise"] else ""
        options = "".join(f", {name}={value}" for name, value in row["attack_options"].items())
        return row["data"], f"{row['attack']}{rate}{options}{noise}"

    @property
    def defense(self) -> str:
        """Its name; * if it was told the poisoning rate, † if it was given clean images."""
        all_rows = (*self.rows, *self.failed)
        told = "*" if any(row.get("told_rate") for row in all_rows) else ""
        given = "†" if any(RESERVE in row.get("needs", ()) for row in all_rows) else ""
        return f"{self.first['defense']}{told}{given}"

    @property
    def changed(self) -> str:
        """Settings that the plan gave, and what else tells it from lines that look the same."""
        given = (f"{name}={value}" for name, value in self.first["changed"].items())
        return " ".join((*given, *filter(None, [self.apart])))

    @property
    def told(self) -> str:
        """The last column of a table: the remark, and what was changed."""
        return "; ".join(part for part in (self.remark, self.changed) if part)

    def figure(self, column: str) -> Figure:
        """One column over the seeds; of one that is there twice, with two targets, the mean."""
        found: dict[int, list[float]] = {}
        for row in self.rows:
            value = _at(row, COLUMNS[column])
            if value is not None:
                found.setdefault(row["seed"], []).append(float(value))
        return Figure(tuple(statistics.fmean(values) for values in found.values()))

    @property
    def remark(self) -> str:
        """What keeps its figures from being taken at their face."""
        told = []
        before = self.figure("asr before").mean
        if before is not None and before < EFFECTIVE and self.first["attack"] != "none":
            told.append(NOT_TAKEN)
        if self.failed:
            told.append(f"{len(self.failed)} failed: {self.failed[0]['error']}")
        return "; ".join(told)


def lines(rows: Iterable[Row]) -> list[Line]:
    """Rows gathered over seeds, in the order in which they first come; of a key the last counts."""
    last = {row["key"]: row for row in rows}
    looks: dict[str, list[tuple[dict[str, Any], list[Row]]]] = {}  # lines that look the same
    for row in last.values():
        same = looks.setdefault(json.dumps([row[name] for name in ALIKE], sort_keys=True), [])
        ours = made_with(row)
        fitting = (
            (told, members)
            for told, members in same
            if all(told[name] == ours[name] for name in told.keys() & ours.keys())
        )
        told, members = next(fitting, ({}, []))
        if not members:
            same.append((told, members))
        told |= ours  # a row that failed may say less
        members.append(row)
    return [
        Line(
            tuple(row for row in members if not row["error"]),
            tuple(row for row in members if row["error"]),
            _apart(told, [other for other, _ in same]),
        )
        for same in looks.values()
        for told, members in same
    ]


def made_with(row: Row) -> dict[str, Any]:
    """What a row says of its corpus and settings, those that came later as they are now unless set.

    Settings of the machine are left out, and a rate that was told, as it follows from the corpus.
    """
    told = {name: row[name] for name in SETUP if name in row}
    if "settings" not in row:
        return told
    settings = _suited(_usual(row["defense"]) | row["settings"], row.get("classes"))
    if row.get("told_rate") is not None:
        settings.pop(f"{row['defense']}.{RATE}", None)
    return told | {
        name: value for name, value in settings.items() if not name.startswith(matrix.ELSEWHERE)
    }


def _suited(settings: Mapping[str, Any], classes: int | None) -> dict[str, Any]:
    """The settings, those of segregation that wait for the number of labels as it fits them."""
    told = {name: settings.get(f"segregate.{name}") for name in ("rule", "pca", "min_share")}
    if classes is None or None in told.values():
        return dict(settings)
    fitting = Segregation(**told).suited(classes)  # type: ignore[arg-type]
    return {
        **settings,
        "segregate.pca": fitting.pca,
        "segregate.min_share": fitting.min_share,
    }


@cache
def _usual(defense: str) -> Mapping[str, Any]:
    """A defense's settings as they are now, none of one that is not there any more."""
    name = "plain" if defense in matrix.TOLD else defense
    return flattened(DEFENSES[name].settings()) if name in DEFENSES else {}


def _apart(told: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> str:
    """NAME=VALUE of all in which one of the others differs."""
    differs = {name for other in others for name in other if told.get(name) != other[name]}
    return " ".join(f"{name}={value}" for name, value in told.items() if name in differs)


def write(source: Path, out: Path) -> list[Path]:
    """Make table.md, table.csv and table.html of a results file in a folder; where they are.

    Raises CorpusError if there is nothing in it.
    """
    rows = matrix.read_rows(source)
    if not rows:
        raise CorpusError(f"{source} holds no rows; csc-gpu matrix writes some")
    found = lines(rows)
    made = {"table.md": markdown(found), "table.csv": table_csv(found), "table.html": page(found)}
    with run.writing(out / "table.md"):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            run.write_text(out / name, text)
    return [out / name for name in made]


def run_plan(
    plan: Path, out: Path, work: Path | None, *, retry: bool, backend: Backend
) -> Iterator[Row]:
    """Run a plan's cells that have no row yet, and yield their rows."""
    work = work or out.with_name(out.name + ".work")
    with Console() as log:
        wanted = matrix.read_plan(plan)
        yield from matrix.cells(wanted, out, work, backend, retry=retry, log=log)


def failed(plan: Path, out: Path, backend: Backend) -> int:
    """How many of a plan's cells stand in `out` as failed, whenever they were run."""
    return matrix.failed(matrix.read_plan(plan), out, backend)


def said(row: Row) -> str:
    """A row as one line of text."""
    line = Line((), (row,)) if row["error"] else Line((row,), ())
    head = f"{' '.join(line.cell)} seed {row['seed']} {row['defense']}"
    if row["error"]:
        return f"{head}: failed: {row['error']}"
    short = ("asr before", "acc", "asr", "ra", "recall", "false alarms", "seconds")
    told = (f"{name} {line.figure(name).text(DIGITS.get(name, 3))}" for name in short)
    return f"{head}: {', '.join(told)}"


def cells(found: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """Lines by data set and attack; in each the controls first, then as csc-gpu defenses lists."""
    by: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        by.setdefault(line.cell, []).append(line)
    known = list(dict.fromkeys((*matrix.CONTROLS, *DEFENSES)))
    rank = {name: number for number, name in enumerate(known)}
    return {
        cell: sorted(ours, key=lambda line: rank.get(line.first["defense"], len(rank)))
        for cell, ours in by.items()
    }


def shown(found: Sequence[Line]) -> list[str]:
    """The columns that some line has a figure for."""
    return [name for name in COLUMNS if any(line.figure(name).values for line in found)]


def markdown(found: Sequence[Line], columns: Sequence[str] = ()) -> str:
    """A table for every data set and attack; the columns that it fills, if none are named."""
    parts = list[str]()
    for (data, attack), ours in cells(found).items():
        names = columns or shown(ours)
        parts.append(f"### {data}, {attack}\n")
        parts.append(f"| defense | n | {' | '.join(names)} | remark |")
        parts.append("|---" * (len(names) + 3) + "|")
        for line in ours:
            cells_ = [line.figure(name).text(DIGITS.get(name, 3)) for name in names]
            head = f"| {line.defense} | {line.n} |"
            told = line.told.replace("|", "\\|")
            parts.append(f"{head} {' | '.join(cells_)} | {told} |")
        parts.append("")
    return "\n".join([*parts, *(f"{note}  " for note in notes(found))]) + "\n"


def notes(found: Sequence[Line]) -> list[str]:
    """What a reader has to know of the figures."""
    rows = [row for line in found for row in line.rows]
    told = [
        "Means over n seeds ± standard deviation; a single run has none. asr and ra leave out "
        "images of the target class; a virtual prediction is an error on clean images.",
        "x plain: seconds of everything a defense does over those of ordinary training: of the "
        "processor, or of the wall clock where a row has no others.",
    ]
    if any(_at(row, COLUMNS[IMAGES]) is not None for row in rows):
        told.append(
            f"{IMAGES}: images that its trainings take forward and back, over those of ordinary "
            "training; looks at images without a way back are not counted."
        )
    if any(row["told_rate"] for row in rows):
        told.append("* was told the true poisoning rate; oracle was told the poison itself.")
    if any(RESERVE in row["needs"] for row in rows):
        told.append("† was given clean images, the reserve.")
    told.append(
        f"{_each(row['settings']['train.model'] for row in rows)}, "
        f"{_each(row['versions'].get('processor', '') for row in rows)} "
        f"{_each(row['machine'] for row in rows)}, "
        f"torch {_each(row['versions'].get('torch', '?') for row in rows)}, "
        f"commit {_each(row['commit'] for row in rows)}."
    )
    return told


def _each(values: Iterable[str]) -> str:
    """All that differ, in the order in which they come."""
    return ", ".join(dict.fromkeys(values))


def table_csv(found: Sequence[Line]) -> str:
    """One line for every defense, data set and attack: n, means and standard deviations."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = [f"{name}{what}" for name in COLUMNS for what in ("", " sd", " n")]
    writer.writerow(("data", "attack", "defense", "changed", "n", *head, "remark"))
    for line in (line for ours in cells(found).values() for line in ours):
        figures = [line.figure(name) for name in COLUMNS]
        values = [_number(v) for f in figures for v in (f.mean, f.spread, len(f.values))]
        writer.writerow((*line.cell, line.defense, line.changed, line.n, *values, line.remark))
    return file.getvalue()


# --- the page -----------------------------------------------------------------------------------

STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;max-width:96rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.2rem .4rem;text-align:right;white-space:nowrap}"
    "th,.words{white-space:normal}.words{text-align:left;overflow-wrap:break-word}"
    "td.words{min-width:8rem;max-width:20rem}small{display:block;color:#555}"
    "svg{background:#fff;margin:.5rem 1rem .5rem 0}.plots{display:flex;flex-wrap:wrap}"
)
TURN = 137.508  # degrees of hue from one defense to the next, the golden angle: none comes twice
WIDTH, HEIGHT, MARGIN = 480, 360, 46  # pixels of a plot
BAR, BARS, TEXT, LETTER = 20, 200, 11, 6  # pixels of a bar, of the longest, of a line, a letter
END = ' text-anchor="end"'


def page(found: Sequence[Line]) -> str:
    """Tables and plots as one HTML page without a script or a file beside it."""
    body = ["<h1>Defenses compared</h1>"]
    for (data, attack), ours in cells(found).items():
        body.append(f"<h2>{html.escape(f'{data}, {attack}')}</h2>")
        body.append(_table(ours))
        named = labelled(ours)
        plots = [
            scatter(named, "asr", "acc", "attack success", "accuracy"),
            scatter(named, "false alarms", "recall", "false alarms", "recall"),
            bars(named, "seconds", "x plain", "cost in seconds, and times plain training"),
        ]
        body.append(f'<div class="plots">{"".join(plots)}</div>')
    body.append("<p>A dot or bar is the mean over n seeds, a thin line ± standard deviation.")
    body += [f"<p>{html.escape(note)}</p>" for note in notes(found)]
    title = "<title>Defenses compared</title>"
    head = f'<meta charset="utf-8">{title}<style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def labelled(ours: Sequence[Line]) -> dict[str, Line]:
    """Lines by what a plot calls them: the defense, with what was changed if it is there twice."""
    names, found = [line.defense for line in ours], dict[str, Line]()
    for line in ours:
        is_twice = names.count(line.defense) > 1
        found[f"{line.defense} {line.changed}".strip() if is_twice else line.defense] = line
    return found


def colour(number: int) -> str:
    """Of the n-th line of a plot; neighbours differ in hue and in lightness."""
    return f"hsl({number * TURN % 360:.0f},65%,{30 + 12 * (number % 2)}%)"


def _table(ours: Sequence[Line]) -> str:
    """The columns that it has something for; the spread is below the mean, which is narrower."""
    columns, has_remarks = shown(ours), any(line.remark for line in ours)
    words = "".join(f"<th>{html.escape(name)}" for name in ("n", *columns))
    head = f"<th class=words>defense{words}{'<th class=words>remark' if has_remarks else ''}"
    rows = []
    for line in ours:
        rows.append(f"<tr><td class=words>{_beside(line.defense, line.changed)}<td>{line.n}")
        for name in columns:
            mean, _, spread = line.figure(name).text(DIGITS.get(name, 3)).partition(" ")
            rows.append(f"<td>{_beside(mean, spread)}")
        if has_remarks:
            rows.append(f"<td class=words>{html.escape(line.remark)}")
    return f"<table><tr>{head}{''.join(rows)}</table>"


def _beside(text: str, more: str) -> str:
    return html.escape(text) + (f"<small>{html.escape(more)}</small>" if more else "")


def scatter(named: Mapping[str, Line], x: str, y: str, x_name: str, y_name: str) -> str:
    """A dot for each line, both axes 0..1, as SVG; nothing where no line has both figures."""
    dots, places = list[str](), list[tuple[float, float, str, str]]()
    across, up = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN  # pixels of 1
    for number, (name, line) in enumerate(named.items()):
        right, high, n = line.figure(x), line.figure(y), line.n
        if right.mean is None or high.mean is None:
            continue
        left, top = MARGIN + right.mean * across, HEIGHT - MARGIN - high.mean * up
        wide, tall = (right.spread or 0) * across, (high.spread or 0) * up
        told = f"{name}: {x_name} {right.text(4)}, {y_name} {high.text(4)}, n {n}"
        dots.append(
            f'<path d="M{left - wide:.1f} {top:.1f}h{2 * wide:.1f}M{left:.1f} {top - tall:.1f}'
            f'v{2 * tall:.1f}" stroke="{colour(number)}"/>'
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{colour(number)}" '
            f'fill-opacity=".8"><title>{html.escape(told)}</title></circle>'
        )
        places.append((left, top, name, colour(number)))
    return _svg(HEIGHT, [*_axes(x_name, y_name), *dots, *_names(places)]) if dots else ""


def _names(places: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """Names beside dots (left, top, name, colour), moved towards the middle until none overlap."""
    parts = list[str]()
    taken = [(left - 6, left + 6, top) for left, top, _, _ in places]  # left, right, top
    for left, top, name, shade in sorted(places, key=lambda p: min(p[1], HEIGHT - p[1])):
        long, step = LETTER * len(name), TEXT if top < HEIGHT / 2 else -TEXT
        start = left + 9 if left + 9 + long < WIDTH else left - 9 - long
        at = top
        while any(
            start < r and begin < start + long and abs(at - t) < TEXT for begin, r, t in taken
        ):
            at += step
        taken.append((start, start + long, at))
        end = start if start > left else start + long
        parts.append(
            f'<path d="M{left:.1f} {top:.1f}L{end:.1f} {at:.1f}" stroke="{shade}" '
            f'stroke-opacity=".5"/><text x="{end:.1f}" y="{at + 4:.1f}" font-size="10" '
            f'fill="{shade}"{"" if start > left else END}>{html.escape(name)}</text>'
        )
    return parts


def _axes(x_name: str, y_name: str) -> list[str]:
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    middle, centred = WIDTH / 2, 'font-size="12" text-anchor="middle"'
    parts = [
        f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="#555"/>',
        f'<text x="{middle}" y="{HEIGHT - 8}" {centred}>{x_name}</text>',
        f'<text x="{MARGIN}" y="{MARGIN - 12}" font-size="12">{y_name}</text>',
    ]
    for tick in (0.0, 0.5, 1.0):
        left = MARGIN + tick * (right - MARGIN)
        top = bottom - tick * (bottom - MARGIN)
        parts += [
            f'<text x="{left}" y="{bottom + 16}" font-size="10" text-anchor="middle">{tick:g}',
            f'</text><text x="{MARGIN - 6}" y="{top + 4}" font-size="10" text-anchor="end">',
            f"{tick:g}</text>",
        ]
    return parts


def bars(named: Mapping[str, Line], column: str, beside: str, title: str) -> str:
    """A bar for each line from 0 on, two figures behind it, as SVG; nothing where there is none."""
    known = [
        (number, name, line.figure(column), _told(line, column, beside))
        for number, (name, line) in enumerate(named.items())
        if line.figure(column).values
    ]
    if not known:
        return ""
    most = max((figure.mean or 0) + (figure.spread or 0) for _, _, figure, _ in known) or 1.0
    left = LETTER * max(len(name) for _, name, _, _ in known) + 12
    right = LETTER * max(len(told) for *_, told in known) + 12
    parts = [f'<text x="4" y="16" font-size="12">{title}</text>']
    for place, (number, name, figure, told) in enumerate(known):
        top, scale = 28 + place * BAR, BARS / most
        long, spread = (figure.mean or 0) * scale, (figure.spread or 0) * scale
        parts.append(
            f'<text x="{left - 6}" y="{top + 12}" font-size="10"{END}>'
            f'{html.escape(name)}</text><rect x="{left}" y="{top}" width="{long:.1f}" '
            f'height="{BAR - 5}" fill="{colour(number)}"/>'
            f'<path d="M{left + long - spread:.1f} {top + 8}h{2 * spread:.1f}" stroke="#000"/>'
            f'<text x="{left + long + spread + 4:.1f}" y="{top + 12}" font-size="10">{told}</text>'
        )
    return _svg(40 + len(known) * BAR, parts, left + BARS + right)


def _told(line: Line, *columns: str) -> str:
    """Figures and what they are, those that the line has."""
    figures = ((name, line.figure(name)) for name in columns)
    return ", ".join(f"{f.text(DIGITS.get(name, 3))} {name}" for name, f in figures if f.values)


def _svg(height: int, parts: Iterable[str], width: int = WIDTH) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


def _at(row: Row, path: Sequence[str]) -> Any:
    """A figure of a row; None where a part of it is missing."""
    found: Any = row
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _number(value: float | int | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
