"""The run directory: what a training leaves behind, written as one piece.

    suspects.csv             one row an image, higher poison_score = more suspect
    clusters.csv             one row a cluster, at every snapshot and scale
    model.safetensors        the concealed model; undefended.safetensors as trained, before that
    recovered.safetensors    a net that has learnt from no suspect (if asked for)
    features.npz             every watched snapshot, and what verification returned (if asked for)
    drawing.npz              some rows of the snapshots that counted, in two dimensions
    settings.toml            every setting, resolved
    summary.json             verdict, evidence, counts, versions, seconds
    log.jsonl                one line an event
    tensorboard/             curves and cluster tables (if asked for)
    reserve.txt              digests of the clean images that the defense was given, if any
    score.json               added by `csc-gpu score`
    report.html, plots/      a page to look at, added by `train` and by `csc-gpu report`
    review.csv               added by `csc-gpu review`

Work goes on in `<out>.partial`, which takes the place of `<out>` when it is complete: an older run
stays whole until then, and an interrupted one can be read where it stopped.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from csc_gpu import answers, harmless, segregate
from csc_gpu.backend import Backend
from csc_gpu.data.arrays import load_arrays
from csc_gpu.errors import CorpusError, CscError, Interrupted, OutputError, Terminated
from csc_gpu.models import Net, new_model
from csc_gpu.types import (
    Array,
    Corpus,
    Drawing,
    Mask,
    Reclassified,
    Segregation,
    Transfer,
    Witness,
)

COLUMNS = (
    "cluster",
    "cluster_size",
    "cluster_purity",
    "cluster_density",
    "first_epoch",
    "n_snapshots",
    "scale_min",
    "scale_max",
    "reason",
)


CLUSTER_COLUMNS = (
    "epoch",
    "scale",
    "eps",
    "cluster",
    "size",
    "label",
    "purity",
    "diversity",
    "density",
    "named",
)


# --- a directory that appears as one piece ------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A sort of result: the command that makes it, and all that its directory may hold."""

    command: str
    names: frozenset[str]


OURS = ".csc-gpu"
"""A file in every directory of ours: the command that made it."""
VERDICT = Kind(
    "segregate",
    frozenset({"suspects.csv", "clusters.csv", "settings.toml", "summary.json", "log.jsonl"})
    | {"drawing.npz"},
)
MODELS = frozenset(f"{name}.safetensors" for name in ("model", "undefended", "recovered"))
CHECKPOINTS = "checkpoint"
"""The folder of an unfinished run in which its checkpoints lie."""
REPLACED = ".replaced"
"""The folder of a result in which the older one lies while it is being replaced."""
BOARD = "tensorboard"
"""The folder of a run that TensorBoard reads."""
PAGE, PLOTS, REVIEW = "report.html", "plots", "review.csv"
RESERVE = "reserve.txt"
"""The file of a run that tells which clean images the defense was given."""
RUN = Kind(
    "train",
    VERDICT.names
    | MODELS
    | {"features.npz", "score.json", PAGE, PLOTS, REVIEW, RESERVE, CHECKPOINTS, BOARD},
)
POISONED = Kind(
    "poison", frozenset({"train", "test", "classes.txt", "key.npz", "truth.csv", "recipe.json"})
)
PACKED = Kind("pack", frozenset({"train", "test", "classes.txt", "manifest.json", "rows.npz"}))


@contextmanager
def fresh_directory(out: Path, kind: Kind, *, force: bool, resume: bool = False) -> Iterator[Path]:
    """A directory to write in, which becomes `out` if the block ends well.

    With force an earlier result of the same kind is replaced; anything else stays. With resume the
    checkpoints of an interrupted run are found there again. Raises OutputError if it cannot be
    written or another run is writing there, Interrupted on Ctrl-C. Ended at any moment, it leaves
    the older result or the new one whole, and a place where the next can begin.
    """
    check_free(out, kind, force=force)
    out, partial = out.resolve(), partial_of(out)
    with writing(out), _alone(partial, kind):
        if (partial / REPLACED).exists() and not out.exists():  # someone was ended in between
            os.replace(partial / REPLACED, out)
            check_free(out, kind, force=force)
        try:
            _begin(partial, kind, force=force, resume=resume)
            yield partial
            if out.exists():
                os.replace(out, partial / REPLACED)
            os.replace(partial, out)
            for name in (REPLACED, CHECKPOINTS):
                shutil.rmtree(out / name, ignore_errors=True)
        except (KeyboardInterrupt, Terminated) as stop:
            kept = _kept(partial)
            _remove_if_empty(partial)
            if isinstance(stop, Terminated):
                raise Terminated(f"terminated; {kept}") from None
            raise Interrupted(f"interrupted; {kept}") from None
        except CscError:
            if not (partial / CHECKPOINTS).exists():
                _remove(partial)  # refused input: nothing there is worth keeping
            raise
        except BaseException:
            _remove_if_empty(partial)
            raise


def partial_of(out: Path) -> Path:
    """Where `out` is written until it is complete."""
    out = out.resolve()
    return out.with_name(out.name + ".partial")


@contextmanager
def _alone(partial: Path, kind: Kind) -> Iterator[None]:
    """No second process writes there; the kernel forgets the lock of one that was killed."""
    partial.mkdir(parents=True, exist_ok=True)
    if not _contents(partial):  # new, or someone was ended before the mark was there
        _mark(partial, kind)
    with locked(partial):
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises OutputError if another process holds this folder; made if it is not there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise OutputError(
                f"another csc-gpu is writing {folder}; wait for it, or choose another place"
            ) from fault
        except OSError as fault:
            raise OutputError(
                f"cannot lock {folder} against a second csc-gpu: {fault.strerror or fault}; choose "
                "a place on a file system that has locks (flock)"
            ) from fault
        yield
    finally:
        os.close(place)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises OutputError for a fault in writing there; other faults pass."""
    try:
        yield
    except OSError as fault:
        if not _is_about(fault, out.resolve().parent):
            raise
        raise OutputError(
            f"cannot write {out}: {fault.strerror or fault}; choose another place or make room"
        ) from fault


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


def _is_about(fault: OSError, place: Path) -> bool:
    """Whether the fault lies in writing here, not in something that was read."""
    if fault.errno in NO_ROOM:
        return True
    named = fault.filename
    return isinstance(named, str | Path) and Path(named).resolve().is_relative_to(place)


def check_free(out: Path, kind: Kind, *, force: bool) -> None:
    """Raises OutputError if `out` holds something that must not be overwritten."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists and is no directory; choose another place")
    held = {path.name for path in out.iterdir()}
    if not held:
        return
    strange = sorted(held - kind.names - {OURS, REPLACED})
    if strange or not _is_ours(out, kind):
        some = ", ".join(strange[:3]) or f"another result than csc-gpu {kind.command}'s"
        raise OutputError(f"{out} holds other files ({some}); choose another place")
    if not force:
        raise OutputError(f"{out} exists already; choose another place, or pass --force")


def check_apart(source: str, out: Path) -> None:
    """Raises OutputError if writing `out` would replace what is read."""
    place = Path(source).resolve()
    if Path(source).exists() and place.is_relative_to(out.resolve()):
        raise OutputError(f"{out} holds the source {source}; choose another place")


def check_room(place: Path, n_bytes: int) -> None:
    """Raises OutputError if so much will not fit on the disk of this directory."""
    free = shutil.disk_usage(place).free
    if n_bytes > free:
        raise OutputError(
            f"cannot write {place}: about {n_bytes} bytes are needed, {free} are free; "
            "choose another place or make room"
        )


def _is_ours(folder: Path, kind: Kind) -> bool:
    mark = folder / OURS
    return mark.is_file() and mark.read_text(encoding="utf-8").strip() == kind.command


def _begin(partial: Path, kind: Kind, *, force: bool, resume: bool) -> None:
    """Empty the partial directory, unless what an interrupted run of ours left is gone on with."""
    if not (partial / OURS).exists():
        raise OutputError(f"{partial} is in the way and is not ours; move it")
    if resume and _is_ours(partial, kind):
        return
    if (partial / CHECKPOINTS).exists() and not force:
        raise OutputError(
            f"{partial} holds an interrupted run; go on with --resume, or begin anew with --force"
        )
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != OURS:
            path.unlink()
    _mark(partial, kind)  # another command's may have been there


def _mark(folder: Path, kind: Kind) -> None:
    (folder / OURS).write_text(kind.command + "\n", encoding="utf-8")


def _kept(partial: Path) -> str:
    kept = _contents(partial)
    if not kept:
        return "nothing had been written"
    more = "; go on with --resume" if CHECKPOINTS in kept else ""
    return f"kept in {partial}: {', '.join(kept)}{more}"


def _contents(partial: Path) -> list[str]:
    if not partial.is_dir():
        return []
    return sorted(path.name for path in partial.iterdir() if path.name != OURS)


def _remove_if_empty(partial: Path) -> None:
    if not _contents(partial):
        _remove(partial)


def _remove(partial: Path) -> None:
    if (partial / OURS).exists():
        shutil.rmtree(partial)


def write_text(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_document(folder: Path, name: str) -> dict[str, Any]:
    """A JSON document of a finished run; raises CorpusError if there is none."""
    try:
        return dict(json.loads((folder / name).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as fault:
        raise CorpusError(f"{folder} is no finished run: cannot read {name}") from fault


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As JSON, indented; numbers that are not finite become null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The same value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_table(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """A CSV that is either the old one or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    os.replace(partial, path)


# --- summary ------------------------------------------------------------------------------------


NEEDED = ("model", "n_classes", "n_outputs", "classes", "image_size", "backend")
"""What a summary must hold for the model to be asked."""


def read_summary(folder: Path, needed: Collection[str] = NEEDED) -> dict[str, Any]:
    """A finished run's summary.json; raises CorpusError if there is none, or it lacks what we need.

    Of a verdict of `segregate`, which holds no model, less is needed.
    """
    summary = read_document(folder, "summary.json")
    missing = [name for name in needed if name not in summary]
    if missing:
        raise CorpusError(
            f"{folder} is no run of csc-gpu train: summary.json lacks {', '.join(missing)}"
        )
    return summary


# --- suspects -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """How rows are called outside."""

    ids: NDArray[np.int64]  # (N,)
    paths: tuple[str, ...]  # N
    labels: tuple[str, ...]  # N class names


def names(corpus: Corpus) -> Names:
    """The corpus's own names for its rows."""
    classes = corpus.classes
    return Names(corpus.ids, corpus.paths, tuple(classes[label] for label in corpus.labels))


def save_suspects(path: Path, rows: Names, verdict: Segregation) -> None:
    """One line an image: row, path, label, is_poison_issue, poison_score, and why.

    A path or label that a spreadsheet would take for a formula begins with an apostrophe. A column
    that the verdict's table does not have is empty.
    """
    unknown, table = [""] * len(rows.ids), verdict.table
    columns = [list(map(_cell, table[c])) if c in table else unknown for c in COLUMNS]
    lines = zip(
        rows.ids.tolist(),
        map(harmless.cell, rows.paths),
        map(harmless.cell, rows.labels),
        verdict.suspect.tolist(),
        (f"{score:.6f}" for score in verdict.score),
        *columns,
        strict=True,
    )
    header = ("row", "path", "label", "is_poison_issue", "poison_score", *COLUMNS)
    write_table(path, header, lines)


def _cell(item: Any) -> str:
    if isinstance(item, float | np.floating):
        return "" if np.isnan(item) else f"{item:.6g}"
    return str(item)


def save_clusters(path: Path, verdict: Segregation, classes: tuple[str, ...]) -> None:
    """One line a cluster at a snapshot and a scale; diversity in bits, eps of unit features."""
    told = ({**line, "label": harmless.cell(classes[line["label"]])} for line in verdict.clusters)
    lines = ([_cell(line[column]) for column in CLUSTER_COLUMNS] for line in told)
    write_table(path, CLUSTER_COLUMNS, lines)


def save_drawing(path: Path, drawing: Drawing) -> None:
    """The arrays of a drawing."""
    partial = path.with_name("partial." + path.name)
    np.savez_compressed(partial, **{f.name: getattr(drawing, f.name) for f in fields(drawing)})
    os.replace(partial, path)


def load_drawing(path: Path) -> Drawing:
    """Raises CorpusError if the file is none of ours."""
    names = [field.name for field in fields(Drawing)]
    found = load_arrays(path, names)
    drawing = Drawing(**found)
    rows, epochs = len(drawing.rows), len(drawing.epoch)
    shapes = {"plane": (epochs, rows, 2), "cluster": (epochs, rows), "scale": (epochs,)}
    if any(found[name].shape != shape for name, shape in shapes.items()):
        raise CorpusError(f"{path} is no drawing of ours: its arrays do not fit together")
    return drawing


@dataclass(frozen=True)
class Suspects:
    """A suspects.csv, read back."""

    paths: tuple[str, ...]  # N
    suspect: Mask  # (N,)
    score: NDArray[np.float64]  # (N,) 0..1
    labels: tuple[str, ...] = ()  # N class names
    ids: tuple[str, ...] = ()  # N, as printed: the row's number in the source
    group: tuple[str, ...] = ()  # N: what tells its cluster from others of its label


def load_suspects(path: Path) -> Suspects:
    """Raises CorpusError if the file is missing or lacks a column."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            missing = {"path", "is_poison_issue", "poison_score"} - set(reader.fieldnames or ())
            lines = list(reader)
    except OSError as fault:
        raise CorpusError(f"cannot read {path}: {fault.strerror}; is it a run?") from fault
    except csv.Error as fault:
        raise CorpusError(f"{path} is no CSV: {fault}") from fault
    if missing:
        lacks = ", ".join(sorted(missing))
        raise CorpusError(f"{path} is no list of suspects of ours: it lacks {lacks}")
    try:
        return Suspects(
            tuple(harmless.plain(line["path"]) for line in lines),
            np.array([VERDICTS[line["is_poison_issue"]] for line in lines], bool),
            np.array([float(line["poison_score"]) for line in lines]),
            tuple(harmless.plain(line.get("label") or "") for line in lines),
            tuple(line.get("row") or "" for line in lines),
            tuple(" ".join(line.get(name) or "" for name in GROUP) for line in lines),
        )
    except (KeyError, ValueError, TypeError) as fault:
        raise CorpusError(f"{path} is no list of suspects of ours: a line holds {fault}") from fault


GROUP = ("cluster", "cluster_size", "cluster_density")
"""Columns that together name a cluster: its number alone is told anew at every scale."""
VERDICTS = {"True": True, "False": False}


# --- models -------------------------------------------------------------------------------------


def save_model(path: Path, model: Net, name: str, corpus: Corpus) -> None:
    """Weights as safetensors, with what it takes to build the net again."""
    height, width = corpus.image_size
    about = {
        "model": name,
        "n_outputs": str(model.n_outputs),
        "height": str(height),
        "width": str(width),
        "classes": json.dumps(corpus.classes),
    }
    partial = path.with_name(path.name + ".partial")
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    partial.write_bytes(save(weights, metadata=about))  # so that a full disk is an OSError
    os.replace(partial, path)


def load_model(path: Path, summary: Mapping[str, Any], n_outputs: int) -> Net:
    """The net saved there, on the CPU; raises CorpusError if the file is not one of ours."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise CorpusError(f"cannot read the model {path}: {fault}") from fault
    model = new_model(summary["model"], n_outputs, summary["image_size"][0], seed=0)
    try:
        model.load_state_dict(weights)
    except RuntimeError as fault:
        raise CorpusError(f"{path} does not fit {summary['model']}: {fault}") from fault
    return model


def load_net(folder: Path, summary: Mapping[str, Any], *, recovered: bool = False) -> Net:
    """The concealed net of a run, or its recovered one, on the CPU.

    Raises CorpusError if it is not there.
    """
    if not recovered:
        return load_model(folder / "model.safetensors", summary, summary["n_outputs"])
    path = folder / "recovered.safetensors"
    if not path.exists():
        raise CorpusError(
            f"{folder} has no recovered net: it suspects nobody, or was trained without --recover"
        )
    return load_model(path, summary, summary["n_classes"])


# --- clean images -------------------------------------------------------------------------------


def save_reserve(path: Path, trusted: Corpus) -> None:
    """Digests of the clean images, one a line."""
    write_text(path, "".join(f"{answers.digest(image)}\n" for image in trusted.images))


def load_reserve(path: Path) -> frozenset[str]:
    """The digests; raises CorpusError if the file cannot be read."""
    try:
        return frozenset(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as fault:
        raise CorpusError(f"cannot read {path}: {fault}; train again") from fault


# --- features -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshots:
    """Features of a corpus at one or more moments of training, or any feature matrix."""

    features: NDArray[np.float32]  # (S, N, D)
    epoch: NDArray[np.float64]  # (S,)
    labels: NDArray[np.int64]  # (N,) 0..C-1
    classes: tuple[str, ...]  # C names
    names: Names
    checks: tuple[Reclassified, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    final: NDArray[np.float32] | None = None  # (N, D) under the trained model, if it was asked
    settings: Mapping[str, Any] | None = None  # of the run's segregation, if it was a run


HEAD_INPUT = "head.input"
"""What features are of, unless features.layer names a layer."""


def save_snapshots(
    path: Path,
    snapshots: Mapping[str, Array],
    corpus: Corpus,
    told: Segregation,
    settings: Mapping[str, Any],
    *,
    layer: str = HEAD_INPUT,
) -> None:
    """features (S, N, D) float32 and all that `segregate` needs to give the same verdict.

    `snapshots` are an Outcome's: features, epoch (S,) and, if a witness was heard, final (N, D).
    """
    partial = path.with_name("partial." + path.name)
    checks, transfers = told.checks, told.transfers
    n = len(corpus)
    final = {"final": snapshots["final"]} if "final" in snapshots else {}
    np.savez(
        partial,
        features=snapshots["features"],
        epoch=np.asarray(snapshots["epoch"], np.float64),
        **final,
        labels=corpus.labels,
        rows=corpus.ids,
        paths=np.array(corpus.paths),
        layer=np.array(layer),
        n_classes=np.array(corpus.n_classes),
        classes=np.array(corpus.classes),
        check_candidates=np.array([check.candidates for check in checks], bool).reshape(-1, n),
        check_controls=np.array([check.controls for check in checks], bool).reshape(-1, n),
        check_predicted=np.array([check.predicted for check in checks], np.int64).reshape(-1, n),
        transfer_label=np.array([answer.label for answer in transfers], np.int64),
        transfer_groups=np.array([answer.groups for answer in transfers], np.str_),
        transfer_share=np.array([answer.share for answer in transfers], np.float64),
        transfer_source=np.array([answer.source for answer in transfers], np.int64),
        transfer_most=np.array([answer.most for answer in transfers], np.float64),
        settings=np.array(json.dumps(plain(settings))),
    )
    os.replace(partial, path)


def load_snapshots(path: Path) -> Snapshots:
    """Any .npz with `features` (N, D) or (S, N, D) and `labels` (N,).

    Raises CorpusError if arrays are missing, of the wrong length, or hold NaN.
    """
    arrays = load_arrays(path, ("features", "labels"), OPTIONAL)
    points = arrays["features"]
    if points.ndim == 2:
        points = points[None]
    real = np.issubdtype(points.dtype, np.floating) or np.issubdtype(points.dtype, np.integer)
    if points.ndim != 3 or not real or 0 in points.shape:
        raise CorpusError(
            f"{path}: features must be numbers of shape (N, D) or (S, N, D), "
            f"got {points.dtype} {arrays['features'].shape}"
        )
    n = points.shape[1]
    if arrays["labels"].shape != (n,):
        raise CorpusError(
            f"{path}: {n} rows of features, but labels of shape {arrays['labels'].shape}"
        )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused below
        points = points.astype(np.float32)
    finite = np.isfinite(points).all(axis=(0, 2))
    if not finite.all():
        raise CorpusError(
            f"{path}: features hold NaN or infinity in {int((~finite).sum())} rows, "
            f"the first is row {int(finite.argmin())}"
        )
    if abs(points).max() > LARGEST:
        raise CorpusError(f"{path}: features above {LARGEST:.0e} have no squares; scale them down")
    labels, classes = _classes(path, arrays)
    epoch = np.atleast_1d(arrays.get("epoch", np.arange(len(points))))
    paths = arrays.get("paths", np.array([f"{path.name}#{row}" for row in range(n)]))
    rows = arrays.get("rows", np.arange(n))
    for name, array, length in (
        ("epoch", epoch, len(points)),
        ("paths", paths, n),
        ("rows", rows, n),
    ):
        if array.shape != (length,):
            raise CorpusError(f"{path}: {name} has shape {array.shape}, expected ({length},)")
        kind = {"rows": np.integer, "epoch": np.number}.get(name, np.generic)
        if not np.issubdtype(array.dtype, kind):
            raise CorpusError(
                f"{path}: {name} must be numbers (rows whole ones), got {array.dtype}"
            )
    names_of_rows = Names(
        rows.astype(np.int64), tuple(map(str, paths)), tuple(classes[label] for label in labels)
    )
    return Snapshots(
        points,
        epoch.astype(np.float64),
        labels,
        classes,
        names_of_rows,
        _checks(arrays, n),
        _transfers(arrays),
        _final(arrays, n),
        _settings(path, arrays),
    )


LARGEST = 1e15
"""Distances between features are squared and added up in single precision."""
OPTIONAL = (
    "epoch",
    "paths",
    "rows",
    "classes",
    "settings",
    "check_candidates",
    "check_controls",
    "check_predicted",
    "final",
    "transfer_label",
    "transfer_groups",
    "transfer_share",
    "transfer_source",
    "transfer_most",
)


def _classes(
    path: Path, arrays: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as 0..C-1, and the C names: those stored, or the sorted values of the labels."""
    given = arrays["labels"]
    if np.issubdtype(given.dtype, np.inexact) and not np.isfinite(given).all():
        raise CorpusError(f"{path}: labels hold NaN or infinity")
    values, labels = np.unique(given, return_inverse=True)
    if len(values) < 2:
        raise CorpusError(f"{path}: only one class among the labels; segregation needs two")
    if "classes" not in arrays:
        return labels.astype(np.int64), tuple(map(str, values))
    classes = np.atleast_1d(arrays["classes"])
    if not np.issubdtype(given.dtype, np.integer) or values[0] < 0 or values[-1] >= len(classes):
        raise CorpusError(f"{path}: labels must be whole numbers 0..{len(classes) - 1}, as classes")
    return given.astype(np.int64), tuple(map(str, classes))


def _settings(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Any] | None:
    if "settings" not in arrays:
        return None
    try:
        settings: dict[str, Any] = dict(json.loads(str(arrays["settings"])))
    except (ValueError, TypeError) as fault:
        raise CorpusError(f"{path}: its array 'settings' is none of ours: {fault}") from fault
    return settings


def _checks(arrays: Mapping[str, NDArray[Any]], n: int) -> tuple[Reclassified, ...]:
    keys = ("check_candidates", "check_controls", "check_predicted")
    if any(key not in arrays or arrays[key].shape[1:] != (n,) for key in keys):
        return ()
    return tuple(Reclassified(*row) for row in zip(*(arrays[key] for key in keys), strict=True))


def _transfers(arrays: Mapping[str, NDArray[Any]]) -> tuple[Transfer, ...]:
    if any(f"transfer_{name}" not in arrays for name in ("label", "groups", "share")):
        return ()
    label, groups, share = (arrays[f"transfer_{name}"] for name in ("label", "groups", "share"))
    source = arrays.get("transfer_source", np.full(label.shape, -1))  # older runs have neither
    most = arrays.get("transfer_most", np.zeros(label.shape))
    numbers = (label, share, source, most)
    if label.ndim != 1 or any(array.shape != label.shape for array in (groups, *numbers)):
        return ()
    if not all(array.dtype.kind in "iuf" for array in numbers):
        return ()
    return tuple(
        Transfer(int(y), str(g), float(s), int(o), float(m))
        for y, g, s, o, m in zip(label, groups, share, source, most, strict=True)
    )


def _final(arrays: Mapping[str, NDArray[Any]], n: int) -> NDArray[np.float32] | None:
    found = arrays.get("final")
    if found is None or found.ndim != 2 or len(found) != n or found.dtype.kind not in "iuf":
        return None
    if not np.isfinite(found).all():
        return None
    return np.asarray(found, np.float32)


def replay(found: Snapshots, backend: Backend) -> Witness | None:
    """What the run's witness said at the time, for the same questions; None without a record."""
    if found.final is None:
        return None
    return Recorded(backend.xp.asarray(found.final), found.transfers, found.checks)


class Recorded:
    """A witness (types.Witness) with the answers of a run; CorpusError for other questions."""

    def __init__(
        self, points: Array, transfers: tuple[Transfer, ...], checks: tuple[Reclassified, ...]
    ) -> None:
        self._points, self._checks = points, checks
        self._answers = {(answer.label, answer.groups): answer for answer in transfers}

    def points(self) -> Array:
        """Features of all rows under the model that was trained. (N, D) on the device"""
        return self._points

    def transfers(self, group: Mask, rest: Mask, label: int) -> Transfer:
        """What was found for these groups."""
        answer = self._answers.get((label, Transfer.fingerprint(group, rest)))
        if answer is None:
            raise CorpusError(OTHER_QUESTION)
        return answer

    def reclassify(self, candidates: Mask) -> Reclassified:
        """What the model said that was trained without these rows."""
        for check in self._checks:
            if (check.candidates == candidates).all():
                return check
        raise CorpusError(OTHER_QUESTION)


OTHER_QUESTION = (
    "with these settings, or on this machine, other rows would be looked at than in the run, so "
    "its record of verification does not serve; use --set segregate.rule=persistence, or train "
    "again"
)


def commit() -> str:
    """The git commit of the code, if it runs from a checkout."""
    here = Path(segregate.__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
