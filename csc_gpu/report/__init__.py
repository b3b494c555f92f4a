"""The page that a run is believed by: one HTML file with its pictures, and the plots as files.

Nothing in it is loaded from anywhere: the page forbids it. What a stranger may have named (images,
classes) is escaped by the template, and what does not print is spelled out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from csc_gpu import run, sources
from csc_gpu.config import flattened
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.harmless import printable
from csc_gpu.report import pictures, plots
from csc_gpu.report.findings import Findings, Lines, read
from csc_gpu.segregate import RULES
from csc_gpu.types import Drawing, Log, quiet

__all__ = ["read", "write"]

PROJECTIONS = ("pca", "umap")
LABELS = 3
"""Labels with a gallery, at most."""
CLUSTERS = 40
"""Lines of the cluster table, at most."""


@dataclass(frozen=True)
class Looks:
    """What was made of the images; or why nothing could be."""

    galleries: Sequence[pictures.Gallery] = ()
    thumbnails: pictures.Thumbnails | None = None
    missing: str = ""


def write(folder: Path, projection: str = "pca", log: Log = quiet) -> Path:
    """Write report.html and plots/ into a run, in place of older ones; the page.

    Raises CorpusError if it is no finished run, ConfigError for a projection that cannot be made.
    """
    found = read(folder)
    figures = plots.draw(found)
    page = folder / run.PAGE
    with run.writing(page):
        plots.save(figures, folder / run.PLOTS)
        run.write_text(page, html(found, looks(found, log), figures, projection))
    return page


def looks(found: Findings, log: Log = quiet) -> Looks:
    """Galleries and thumbnails, from the images where they were when the run was made."""
    if found.size is None or found.suspects is None:
        return Looks(missing="There are no images to show: this is a verdict on features alone.")
    try:
        album = sources.album(
            found.summary["source"], found.settings.data, found.suspects.paths, found.size
        )
        galleries = []
        for label in found.suspected(LABELS):
            galleries.append(pictures.gallery(found, album, label))
            log("report", label=label)
        sheet = pictures.thumbnails(found, album) if found.drawing is not None else None
    except CorpusError as fault:
        return Looks(missing=f"The images could not be read again, so none are shown: {fault}")
    return Looks(galleries, sheet)


def html(found: Findings, looks: Looks, figures: Mapping[str, Any], projection: str = "pca") -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("csc_gpu.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "thousands": thousands, "span": span}
    environment.policies["json.dumps_function"] = _json
    about, score = found.summary, found.score
    return environment.get_template("page.html").render(
        title=found.folder.name,
        found=found,
        about=about,
        score=score,
        verdict=sentence(about["verdict"]),
        is_poisoned=bool(about.get("suspects")),
        tiles=tiles(about, score),
        witness=witness(about),
        looks=looks,
        map=points(found, looks.thumbnails, projection),
        projection=projection,
        clusters=cluster_lines(found),
        n_clusters=len(found.clusters),
        rule=RULES[found.settings.segregate.rule].said,
        plots={name: plots.inline(figure) for name, figure in figures.items()},
        settings=flattened(found.settings),
    )


def _shown(value: Any) -> Any:
    """What the template prints: a name with control characters spelled out; None as a dash."""
    if value is None:
        return "-"
    # a subclass of str is markup that is escaped already
    return printable(value) if type(value) is str else value


def _json(value: Any, **how: Any) -> str:
    return json.dumps(run.plain(value), allow_nan=False, separators=(",", ":"), **how)


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def percent(share: float | None) -> str:
    """A share as a percentage with one digit; a dash if there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f}%"


def thousands(number: float) -> str:
    """A whole number with its thousands parted."""
    return f"{number:,.0f}"


def tiles(about: Mapping[str, Any], score: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the head of the page: name, value, what it means."""
    shown = [("images", thousands(about["rows"]), "that were trained on")]
    if about.get("suspects") is not None:
        share = percent(about["suspects"] / about["rows"])
        shown.append(("suspects", thousands(about["suspects"]), f"{share} of them"))
    if score:
        before, after = score["before"], score["after"]
        for name, title, meaning in (
            ("acc", "accuracy", "on clean test images, before and after"),
            ("asr", "attack success", "of triggered test images, before and after"),
        ):
            value = f"{percent(before[name])} \u2192 {percent(after[name])}"
            shown.append((title, value, meaning))
        told = score["detection"]
        if told:
            shown.append(("poison found", percent(told["tpr"]), "of what the key names"))
            shown.append(("false alarms", percent(told["fpr"]), "of the clean images"))
        if score.get("recovered"):
            named = percent(score["recovered"]["ra"])
            shown.append(("true class", named, "of triggered images, by the recovered net"))
        return shown
    rates = about.get("evidence") or {}
    held_out = rates.get("virtual_rate_on_held_out")
    if about.get("suspects") and held_out is not None:
        rate = rates.get("virtual_rate_on_suspects")
        shown.append(("suspects rejected", percent(rate), "by the new model"))
        shown.append(("held-out images rejected", percent(held_out), "by the new model"))
    return shown


def witness(about: Mapping[str, Any]) -> list[str]:
    """What verification found out about each suspected label, a sentence each."""
    told, classes = about.get("segregation") or {}, about.get("classes") or []
    lines = []
    for case in told.get("labels") or []:
        name = classes[case["label"]]
        best = max((share for _, share in case.get("commands", [])), default=0.0)
        is_one = "a trigger" if case.get("trigger") else "no trigger"
        text = (
            f"The pattern in which a group of {name!r} differs from the rest of it, added to "
            f"images of other labels, turns {percent(best)} of them into {name!r}: {is_one} (the "
            f"limit is {percent(case.get('limit'))})."
        )
        if "source" in case:
            text += (
                f" It turns {percent(case['most'])} of {classes[case['source']]!r} into {name!r}: "
                "a trigger for these alone."
            )
        lines.append(f"{text} {case.get('flagged', 0)} rows are flagged.")
    lines += [
        f"{classes[label]!r} was suspected and cleared." for label in told.get("cleared_labels", [])
    ]
    if told.get("verified") is False:
        lines.append("Verification was not run: there were no images to ask.")
    return lines


def points(
    found: Findings, thumbnails: pictures.Thumbnails | None, projection: str
) -> dict[str, Any] | None:
    """What the map draws, as JSON; None where nothing was kept to draw."""
    drawing, suspects = found.drawing, found.suspects
    if drawing is None or suspects is None:
        return None
    names = sorted({suspects.labels[row] for row in drawing.rows})
    place = {name: at for at, name in enumerate(names)}
    plane = drawing.plane.astype(np.float32)
    if projection == "umap":
        plane = umap(found, drawing)
    return {
        "labels": [printable(name) for name in names],
        "label": [place[suspects.labels[row]] for row in drawing.rows],
        "suspect": suspects.suspect[drawing.rows].astype(int),
        "score": suspects.score[drawing.rows].round(3),
        "name": [printable(suspects.paths[row]) for row in drawing.rows],
        "chosen": plots.decisive(drawing, found),
        "snapshots": [
            {"epoch": epoch, "scale": scale, "cluster": cluster, "xy": _unit_square(xy)}
            for epoch, scale, cluster, xy in zip(
                drawing.epoch, drawing.scale, drawing.cluster, plane, strict=True
            )
        ],
        "thumb": None
        if thumbnails is None
        else [thumbnails.width, thumbnails.height, thumbnails.columns],
    }


def _unit_square(xy: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same places (V, 2), stretched to 0..1 each way, three digits."""
    low, high = xy.min(axis=0), xy.max(axis=0)
    square: NDArray[np.float32] = ((xy - low) / np.maximum(high - low, 1e-6)).round(3)
    return square


def umap(found: Findings, drawing: Drawing) -> NDArray[np.float32]:
    """The drawn rows in two dimensions by UMAP, snapshot by snapshot. (S, V, 2)

    Raises ConfigError without umap-learn, CorpusError without features.npz.
    """
    try:
        from umap import UMAP
    except ImportError as fault:
        raise ConfigError(
            "umap-learn is not installed: pip install umap-learn, or take --projection pca"
        ) from fault
    path = found.folder / "features.npz"
    if not path.exists():
        raise CorpusError(f"{path} is missing: UMAP needs a run made with train --save-features")
    kept = run.load_snapshots(path)
    which = [int(np.abs(kept.epoch - epoch).argmin()) for epoch in drawing.epoch]
    parted = UMAP(random_state=0, n_jobs=1, metric="cosine")
    return np.stack([parted.fit_transform(kept.features[at][drawing.rows]) for at in which])


@dataclass(frozen=True)
class Kin:
    """The clusters of one label that are, or are not, named for one reason."""

    label: str
    named: bool
    why: str
    count: int
    spans: Mapping[str, tuple[float, float]]  # of each column: the least and the most


def cluster_lines(found: Findings) -> list[Kin]:
    """Every label's clusters over scales and snapshots, by why they are named or not.

    Those that are named first, then those that hold most rows.
    """
    chosen = found.settings.segregate
    rule = RULES[chosen.rule]

    def why(line: Mapping[str, Any]) -> str:
        if line["named"]:
            return rule.said
        if line["scale"] > chosen.coarsest:
            return "too coarse a scale to count"
        if line["purity"] < chosen.purity:
            return "holds several labels"
        return "where its label is at home"

    kin: dict[tuple[str, bool, str], list[Mapping[str, Any]]] = {}
    for line in found.clusters:
        kin.setdefault((line["label"], line["named"], why(line)), []).append(line)
    lines = [
        Kin(*key, len(some), {name: _span(some, name) for name in SPANS})
        for key, some in kin.items()
    ]
    order = sorted(lines, key=lambda line: (not line.named, -line.count * line.spans["size"][1]))
    return order[:CLUSTERS]


SPANS = ("size", "purity", "diversity", "density", "scale", "epoch")


def _span(lines: Lines, name: str) -> tuple[float, float]:
    values = [abs(float(line[name])) for line in lines]
    return min(values), max(values)


def span(ends: tuple[float, float], digits: str = "g") -> str:
    """Two numbers as from-to, or the one that they both are."""
    low, high = (format(end, digits) for end in ends)
    return low if low == high else f"{low}\u2013{high}"
