"""The plots: as PNG and SVG files, and as SVG that takes the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from csc_gpu.report.findings import Findings
from csc_gpu.types import Drawing

INK = "#010203"
"""Nearly black, in a file; on the page, where nothing else has it, the colour of the text."""
BENIGN, SUSPECT, ACCENT = "#7f8c9b", "#e0443e", "#2f7fd1"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "csc-gpu",  # the same run, the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
SIZE = (4.6, 2.9)
"""Of a plot, in inches."""
DPI = 160
"""Of the PNG files."""


def draw(found: Findings) -> dict[str, Any]:
    """Every plot that the run has data for, by name: matplotlib's figures."""
    figures = {}
    if found.drawing is not None:
        figures["features"] = features(found, found.drawing)
        figures["k-distance"] = k_distance(found, found.drawing)
    if found.events("train"):
        figures["training"] = training(found)
    if found.score.get("curves"):
        figures["roc"] = roc(found)
        figures["precision-recall"] = precision_recall(found)
    return figures


def save(figures: dict[str, Any], folder: Path) -> None:
    """Each as a PNG and an SVG, on white."""
    import matplotlib

    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        with matplotlib.rc_context(STYLE):
            for ending in ("png", "svg"):
                about = {"Date": None} if ending == "svg" else {}
                partial = folder / f"{name}.partial.{ending}"
                figure.savefig(partial, dpi=DPI, facecolor="white", metadata=about)
                partial.replace(folder / f"{name}.{ending}")


def inline(figure: Any) -> str:
    """An <svg> that takes its ink from the page and names nothing outside it."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'^<svg ([^>]*?)(?:width|height)="[^"]*"', r"<svg \1", svg)
    return svg.replace(INK, "currentColor")


@contextmanager
def _axes(x: str, y: str) -> Iterator[tuple[Any, Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield figure, axes


def features(found: Findings, drawing: Drawing) -> Any:
    """Rows at the snapshot whose suspects lie closest together."""
    assert found.suspects is not None
    at = decisive(drawing, found)
    suspect = found.suspects.suspect[drawing.rows]
    with _axes("first component", "second component") as (figure, axes):
        for is_suspect, colour, name in ((False, BENIGN, "others"), (True, SUSPECT, "suspects")):
            x, y = drawing.plane[at][suspect == is_suspect].astype(np.float32).T
            axes.scatter(x, y, s=7, color=colour, alpha=0.7, linewidths=0, label=name)
        axes.legend(title=f"epoch {drawing.epoch[at]:g}", markerscale=2)
    return figure


def decisive(drawing: Drawing, found: Findings) -> int:
    """The snapshot at which most rows lie in clusters that the rule names; the last, of several."""
    named = [0.0] * len(drawing.epoch)
    for line in found.clusters:
        for at, (epoch, scale) in enumerate(zip(drawing.epoch, drawing.scale, strict=True)):
            near = np.isclose([line["epoch"], line["scale"]], [epoch, scale], rtol=1e-4).all()
            named[at] += line["size"] if line["named"] and near else 0
    return max(range(len(named)), key=lambda at: (named[at], at))


def k_distance(found: Findings, drawing: Drawing) -> Any:
    """How far rows reach their k-th neighbour, and the radii that were taken from it."""
    at = decisive(drawing, found)
    share = np.linspace(0, 1, drawing.reach.shape[1])
    chosen = found.settings.segregate
    scales = np.array(sorted(scale for scale in chosen.scales if scale <= chosen.coarsest))
    with _axes("share of the rows", "distance to the k-th neighbour") as (figure, axes):
        for number, line in enumerate(drawing.reach):
            ours = number == at
            name = f"epoch {drawing.epoch[number]:g}"
            colour, width = (ACCENT, 2.0) if ours else (BENIGN, 0.8)
            axes.plot(share, line, color=colour, lw=width, label=name if ours else None)
        radii = np.interp(scales, share, drawing.reach[at])
        axes.plot(scales, radii, "o", ms=4, color=SUSPECT, label="scales that give evidence")
        axes.legend()
    return figure


def training(found: Findings) -> Any:
    """Loss by epoch, and the share of training rows whose label the net gives."""
    with _axes("epoch", "loss") as (figure, axes):
        lines = found.events("train")
        epochs, losses = zip(*((line["epoch"], line["loss"]) for line in lines), strict=True)
        (drawn,) = axes.plot(epochs, losses, color=ACCENT, marker=".", label="loss")
        told = [line for line in found.events("snapshot") if line.get("accuracy") is not None]
        handles = [drawn]
        if told:
            beside = axes.twinx()
            beside.spines["right"].set_visible(True)
            beside.set_ylabel("accuracy on the labels as given")
            beside.set_ylim(0, 1.02)
            at, share = zip(*((line["epoch"], line["accuracy"]) for line in told), strict=True)
            handles += beside.plot(at, share, color=SUSPECT, marker=".", label="accuracy")
        axes.legend(handles=handles, loc="center right")
    return figure


def roc(found: Findings) -> Any:
    """True against false alarms over every limit of the score."""
    curves, told = found.score["curves"], found.score["detection"]
    with _axes("false alarms among clean rows", "poison found") as (figure, axes):
        axes.plot([0, 1], [0, 1], color=BENIGN, lw=0.8, ls=":")
        axes.plot(curves["fpr"], curves["tpr"], color=ACCENT, label=f"AUROC {told['auroc']:.3f}")
        axes.plot(told["fpr"], told["tpr"], "o", color=SUSPECT, label="the verdict", clip_on=False)
        axes.legend(loc="lower right")
    return figure


def precision_recall(found: Findings) -> Any:
    """Precision against recall over every limit of the score."""
    curves, told = found.score["curves"], found.score["detection"]
    with _axes("poison found (recall)", "poison among the flagged (precision)") as (figure, axes):
        name = f"average precision {told['ap']:.3f}"
        axes.plot(curves["recall"], curves["precision"], color=ACCENT, label=name)
        if told["precision"] is not None:
            point = told["tpr"], told["precision"]
            axes.plot(*point, "o", color=SUSPECT, label="the verdict", clip_on=False)
        axes.set_ylim(0, 1.04)
        axes.legend(loc="lower left")
    return figure
