"""What a finished run is used for: the commands predict and export-model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from csc_gpu.data.folders import images_below
from csc_gpu.errors import CorpusError, OutputError
from csc_gpu.export import TRIED, export
from csc_gpu.guarded import REJECTED, Answer, GuardedClassifier
from csc_gpu.harmless import printable


def predict(
    folder: Path, images: Iterable[str], *, recovered: bool, jsonl: bool, cpu: bool
) -> Iterator[str]:
    """A line for every image, in order, folders looked through: what the run's model says.

    Raises CorpusError after the last if any could not be read.
    """
    model = GuardedClassifier.load(folder, cpu=cpu, recovered=recovered)
    told = as_json if jsonl else as_line
    count, faults = 0, 0
    for answer in model.answers(named_images(images)):
        yield told(answer, model)
        count += 1
        faults += bool(answer.fault)
    if faults:
        raise CorpusError(
            f"{faults} of {count} images could not be read; their lines say why, the others hold"
        )


def named_images(names: Iterable[str]) -> Iterator[Path]:
    """Files as they are named, and of folders all images; an empty one stands for itself."""
    for path in map(Path, names):
        yield from (path.is_dir() and list(images_below(path))) or [path]


def as_line(answer: Answer, model: GuardedClassifier) -> str:
    """path, label or REJECTED, probability, with tabs between; nothing in it moves a terminal.

    Where the recovered net names what the tripwire rejects, REJECTED comes last.
    """
    if answer.probabilities is None:
        return f"{on_a_line(answer.path)}\terror: {on_a_line(answer.fault)}"
    best = int(answer.probabilities.argmax())
    label, share = str(model.classes_[best]), answer.probabilities[best]
    alarm = f"\t{REJECTED}" if answer.rejected and best != model.n_classes else ""
    return f"{on_a_line(answer.path)}\t{on_a_line(label)}\t{share:.4f}{alarm}"


def as_json(answer: Answer, model: GuardedClassifier) -> str:
    """path, label (null: the virtual class), rejected ("trigger" or null), probabilities."""
    if answer.probabilities is None:
        return json.dumps({"path": answer.path, "error": answer.fault})
    best = int(answer.probabilities.argmax())
    classes = model.classes_.tolist()
    shares = [round(share, 6) for share in answer.probabilities.tolist()]
    return json.dumps(
        {
            "path": answer.path,
            "label": None if best == model.n_classes else classes[best],
            "rejected": "trigger" if answer.rejected else None,
            "probability": shares[best],
            "probabilities": dict(zip(classes, shares, strict=True)),
        }
    )


def on_a_line(text: str) -> str:
    """The text, harmless, and without line ends."""
    return printable(text).replace("\n", "\\n")


def export_model(folder: Path, out: Path, layout: str, *, recovered: bool, force: bool) -> str:
    """Write a run's model for other tools, checked; where it is, in two lines."""
    if out.exists() and not (force and out.is_file()):
        remedy = ", or pass --force" if out.is_file() else ""
        raise OutputError(f"{out} exists already; choose another place{remedy}")
    export(folder, out, layout, recovered=recovered)
    return f"{layout}: {out}\nits probabilities are those of {folder} on {max(TRIED)} trial images"
