"""The corpus without its poison: what a run suspects is left out, as people have reviewed it.

The source is only read. What is written tells beside it how it was come by: recipe.json, and
removed.csv with a line for every row that was left out.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import harmless, pack, run, sources
from csc_gpu.answers import folder_name
from csc_gpu.data.folders import CLASS_LIST, IMAGE_ENDINGS
from csc_gpu.errors import ConfigError, CorpusError, OutputError
from csc_gpu.types import Corpus, Log, Mask, Split

POISON, FINE = "poison", "fine"
"""What a person may say of a row."""
RECIPE, REMOVED, MANIFEST = "recipe.json", "removed.csv", "manifest.csv"
BESIDE = {RECIPE, REMOVED}
KINDS = {
    "manifest": run.Kind("clean", frozenset({MANIFEST} | BESIDE)),
    "folder": run.Kind("clean", frozenset({"train", "test", CLASS_LIST} | BESIDE)),
    "shards": run.Kind("clean", frozenset(run.PACKED.names | BESIDE)),
}
"""How a cleaned corpus may be written, and what is then in its directory."""


# --- what people say ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Review:
    """What people said of rows, by path, and the files in which they did."""

    said: Mapping[str, str]  # path: POISON or FINE
    files: tuple[Mapping[str, str], ...] = ()  # role, path and sha256 of each


def reviewed(
    suspects: run.Suspects, keep: Path | None, drop: Path | None, review: Path | None
) -> Review:
    """The three files in one; raises CorpusError for a row that is not the run's, or in dispute."""
    found: dict[str, str] = {}
    files = []
    for role, path in (("keep", keep), ("drop", drop), ("review", review)):
        if path is None:
            continue
        if role == "review":
            said = load_review(path)
        else:
            said = dict.fromkeys(listed(path, suspects), FINE if role == "keep" else POISON)
        known = set(suspects.paths)
        for row, word in said.items():
            if row not in known:
                raise CorpusError(f"{path}: {row} is no row of this run")
            if found.setdefault(row, word) != word:
                raise CorpusError(f"{path}: {row} is both to be kept and to be dropped; decide")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"role": role, "path": str(path.absolute()), "sha256": digest})
    return Review(found, tuple(files))


def listed(path: Path, suspects: run.Suspects) -> list[str]:
    """The paths that a list names, one a line, by path or by number; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as fault:
        raise CorpusError(f"cannot read {path}: {fault.strerror}") from fault
    of_path, of_number = set(suspects.paths), dict(zip(suspects.ids, suspects.paths, strict=True))
    found = []
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        row = name if name in of_path else of_number.get(name)
        if row is None:
            raise CorpusError(
                f"{path} line {number}: {name!r} is neither a path nor a row of this run"
            )
        found.append(row)
    return found


def load_review(path: Path) -> dict[str, str]:
    """What a review says of each row it speaks of, by path; raises CorpusError if it is none."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = list(csv.DictReader(file))
    except OSError as fault:
        raise CorpusError(f"cannot read {path}: {fault.strerror}") from fault
    except csv.Error as fault:
        raise CorpusError(f"{path} is no CSV: {fault}") from fault
    if any((line.get("verdict") or "") not in (POISON, FINE) for line in lines) or any(
        not line.get("path") for line in lines
    ):
        raise CorpusError(f"{path} is no review: every line has a path and a verdict, poison|fine")
    return {harmless.plain(line["path"]): line["verdict"] for line in lines}


def save_review(path: Path, suspects: run.Suspects, said: Mapping[str, str]) -> None:
    """One line a row that was spoken of, in the order of the run; the old file or the new one."""
    lines = [
        (row, harmless.cell(name), harmless.cell(label), said[name])
        for row, name, label in zip(suspects.ids, suspects.paths, suspects.labels, strict=True)
        if name in said
    ]
    run.write_table(path, ("row", "path", "label", "verdict"), lines)


def guilty(suspects: run.Suspects, review: Review) -> Mask:
    """Who is poison once people have had their say. (N,)"""
    verdict = {FINE: False, POISON: True}
    rows = zip(suspects.paths, suspects.suspect.tolist(), strict=True)
    return np.array([verdict.get(review.said.get(path, ""), flag) for path, flag in rows], bool)


def judged(
    path: Path, suspects: run.Suspects, poison: Mask, review: Review
) -> tuple[list[str], list[list[str]]]:
    """The header and lines of a suspects.csv with the verdict and reason as people have it.

    A row that they spoke of scores 1 or 0.
    """
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        header, lines = list(reader.fieldnames or ()), list(reader)
    for line, name, flag in zip(lines, suspects.paths, poison.tolist(), strict=True):
        if name in review.said:
            line |= {"poison_score": f"{float(flag):.6f}", "reason": "review"}
        line["is_poison_issue"] = str(flag)
    return header, [[line[name] for name in header] for line in lines]


# --- what is written ----------------------------------------------------------------------------


def sound(split: Split, broken: Sequence[str]) -> Split:
    """The split without what the run left out because it does not decode: `path: reason`."""
    if not broken:
        return split

    def rest(corpus: Corpus) -> Corpus:
        named = [any(told.startswith(f"{path}: ") for told in broken) for path in corpus.paths]
        return corpus.take(np.flatnonzero(~np.array(named, bool)))

    return Split(rest(split.train), rest(split.test), tuple(broken))


def place_of(split: Split, suspects: run.Suspects, source: str) -> NDArray[np.int64]:
    """Where the run's rows are in the training part. (N,)

    Raises CorpusError unless these are all its rows, with the labels of then.
    """
    corpus = split.train
    place = sources.matched(corpus, suspects.paths, source)
    now = (corpus.classes[label] for label in corpus.labels[place])
    rows = zip(suspects.paths, suspects.labels, now, strict=True)
    changed = [path for path, then, label in rows if then != label]
    if changed:
        raise CorpusError(
            f"{source} is not what the run was trained on, or has changed: {len(changed)} rows "
            f"have another label, the first is {changed[0]}"
        )
    known = set(suspects.paths)
    new = [path for path in corpus.paths if path not in known]
    if new:
        raise CorpusError(
            f"{source} holds {len(new)} rows that the run has not seen, the first is {new[0]}; "
            "train on it again"
        )
    return place


def without(split: Split, rows: NDArray[np.int64], source: str) -> Split:
    """The split without these rows of its training part.

    Raises CorpusError if fewer than two classes would be left.
    """
    train = split.train.take(np.setdiff1d(np.arange(len(split.train)), rows))
    if len(np.unique(train.labels)) < 2:
        raise CorpusError(f"{source}: without the suspects fewer than two classes are left")
    return Split(train, split.test, split.broken)


def write(folder: Path, split: Split, kind: str, *, copy: bool, shard_bytes: int, log: Log) -> None:
    """The corpus in an empty directory, as one of KINDS."""
    if kind == "shards":
        pack.write(folder, split, shard_bytes, log)
    elif kind == "folder":
        write_folder(folder, split, copy=copy, log=log)
    else:
        write_manifest(folder / MANIFEST, split)


def write_manifest(path: Path, split: Split) -> None:
    """A CSV of the files where they lie. Raises ConfigError if rows are not files of their own."""
    parts = (("train", split.train), ("test", split.test))
    if any(not corpus.files or corpus.files.pieces is not None for _, corpus in parts):
        raise ConfigError(
            "a manifest names files, and the images of this source are none; take --as folder or "
            "--as shards"
        )
    lines = []
    for part, corpus in parts:
        for row, label in enumerate(corpus.labels):
            file = os.path.abspath(str(corpus.files[row]))
            lines.append((file, harmless.cell(corpus.classes[label]), part))
    try:
        "".join(file for file, *_ in lines).encode()
    except UnicodeEncodeError as fault:
        raise CorpusError(
            "a file's name is not UTF-8, which a manifest must be; take --as folder or --as shards"
        ) from fault
    run.write_table(path, ("path", "label", "split"), lines)


def write_folder(folder: Path, split: Split, *, copy: bool, log: Log) -> None:
    """Image files in class folders: hard links or copies of files, images of arrays as PNG."""
    classes = split.train.classes
    total, done = len(split.train) + len(split.test), 0
    for part, corpus in (("train", split.train), ("test", split.test)):
        taken: set[str] = set()
        for row, label in enumerate(corpus.labels):
            name = folder_name(classes[label])
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            _place(folder / part / name, corpus, row, taken, copy=copy)
            done += 1
            log("write", done=done, total=total)
    lines = "".join(f"{name}\n" for name in classes)
    (folder / CLASS_LIST).write_text(lines, encoding="utf-8")


def _place(folder: Path, corpus: Corpus, row: int, taken: set[str], *, copy: bool) -> None:
    """One image in a class folder, by its own name if that is free."""
    whole = corpus.files[row] if corpus.files and corpus.files.pieces is None else None
    if not isinstance(whole, Path):
        (content,) = pack.encoded(corpus, np.array([row]))
        ending = pack.ending_of(content)
        (folder / f"{corpus.ids[row]:07d}.{ending}").write_bytes(content)
        return
    name = whole.name
    if not name.lower().endswith(IMAGE_ENDINGS) or name.startswith("."):
        (content,) = pack.encoded(corpus, np.array([row]))
        name = f"{name.lstrip('.')}.{pack.ending_of(content)}"
    if f"{folder}/{name}" in taken:
        name = f"{corpus.ids[row]}-{name}"
    taken.add(f"{folder}/{name}")
    original = os.path.realpath(whole)  # not the link, where it is one
    if copy:
        shutil.copyfile(original, folder / name)
        return
    try:
        os.link(original, folder / name)
    except OSError as fault:
        if fault.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        raise OutputError(
            f"{original} cannot be linked to from there ({fault.strerror}); pass --copy"
        ) from fault


def write_removed(
    path: Path, suspects: run.Suspects, poison: Mask, said: Mapping[str, str]
) -> None:
    """Who was left out, and on whose word."""
    lines: Iterable[Sequence[Any]] = (
        (
            suspects.ids[row],
            harmless.cell(suspects.paths[row]),
            harmless.cell(suspects.labels[row]),
            f"{suspects.score[row]:.6f}",
            "review" if suspects.paths[row] in said else "run",
        )
        for row in np.flatnonzero(poison)
    )
    run.write_table(path, ("row", "path", "label", "poison_score", "on_the_word_of"), lines)
