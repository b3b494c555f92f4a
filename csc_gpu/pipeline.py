"""What commands do, as one library call: load, work, save, and the text to print.

Those that make corpora are in corpora.py, `score` is in scoring.py, and what a finished run is used
for in serving.py.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu import clean as cleaning
from csc_gpu import conceal, csc, data, evaluate, report, run, sources
from csc_gpu import plan as planning
from csc_gpu import segregate as segregation
from csc_gpu.backend import Backend, open_backend, reader
from csc_gpu.backend.doctor import describe
from csc_gpu.board import Board
from csc_gpu.checkpoint import Folder, Following, Record, fact
from csc_gpu.config import flattened, override, to_toml
from csc_gpu.data.packed import digest
from csc_gpu.defenses import DEFENSES, RESERVE, Entry
from csc_gpu.errors import ConfigError, Interrupted, OutputError
from csc_gpu.features import width
from csc_gpu.models import new_model
from csc_gpu.progress import Console
from csc_gpu.report import findings
from csc_gpu.run import read_summary
from csc_gpu.train import budget
from csc_gpu.types import (
    Corpus,
    DefenderView,
    Drawing,
    Mask,
    Outcome,
    Segregation,
    Split,
)

Labels = NDArray[np.int64]
BYTES_PER_LINE = 150
"""Of suspects.csv, about."""
NO_POISON = "no poison found"
NOT_LOOKED = "poison was not looked for"
TOO_MANY = (
    "no verdict: more rows stand out alike than segregate.max_share or max_label_share allows; "
    "look at clusters.csv, and raise the share if they are poison"
)


# --- train --------------------------------------------------------------------------------------


def train(
    source: str,
    out: Path,
    changes: Mapping[str, Any],
    *,
    defense: str,
    seed: int,
    skip_broken: bool,
    max_bad: int | None,
    force: bool,
    resume: bool,
    quiet: bool,
    tensorboard: bool,
    page: bool,
    backend: Backend,
    reserve: str = "",
) -> str:
    """Run a defense on a source and write the run directory; the verdict, in a few lines.

    `reserve` is a source of clean images, for the defenses that need some; score leaves these out.
    With resume an interrupted run there is gone on with, and a finished one of the same source and
    settings left as it is, but not with force: it is done anew. The page is made when the run is
    complete, so that nothing about it can harm the run.
    """
    settings = settings_of(defense, changes)
    require_able(defense, backend, reserve=bool(reserve))
    broken = {"skip_broken": skip_broken, "max_bad": max_bad}
    require_tolerant(defense, backend, skip_broken=skip_broken, max_bad=max_bad)
    if not settings.train.model:
        settings = override(settings, {"train.model": backend.usual_model})
    run.check_apart(source, out)
    if reserve:
        run.check_apart(reserve, out)
    is_done = (out / "summary.json").exists() and not run.partial_of(out).exists()
    if resume and is_done and not force:
        asked = source, settings, defense, seed, reserve
        return finished(out, *asked, quiet=quiet) if backend.ranks.is_first else ""
    how: dict[str, Any] = {"defense": defense, "seed": seed}
    how |= {"settings": settings, "backend": backend}
    if not backend.ranks.is_first:
        return follow(source, out, broken, **how)
    with run.fresh_directory(out, run.RUN, force=force, resume=resume) as folder:
        kept = Folder(folder / run.CHECKPOINTS, minutes=settings.checkpoint.minutes)
        board = Board(folder / run.BOARD, backend.to_numpy) if tensorboard else None
        with (
            Console(folder / "log.jsonl", silent=quiet, board=board) as log,
            kept.heeding_sigterm(),
        ):
            log.say(heading(**how))
            check = MemoryCheck(settings, backend, log)
            split = data.open_source(source, settings.data, log)
            about = identity(source, split, settings, defense, seed, reserve)
            split = opened(split, source, settings, backend, check, broken, log)
            if reserve:
                how["trusted"] = sources.reserve(reserve, split.train, log=log)
            log.say(extent(split, settings))
            run.check_room(folder, needed_bytes(split.train, settings))
            starts = count_start(kept, about | read_rows(split.train), settings, log)
            run.write_text(folder / "settings.toml", to_toml(settings))  # those of then, if refused
            outcome, summary = defended(source, split, log=log, kept=kept, **how)
            summary |= {"starts": starts, "memory": check.measured(), "asked": about}
            if reserve:
                summary |= {"reserve": reserve, "reserve_rows": len(how["trusted"])}
                run.save_reserve(folder / run.RESERVE, how["trusted"])
            save_outcome(folder, outcome, split.sound(), settings, summary, backend)
    suspects = f"suspects: {out / 'suspects.csv'}\n" if outcome.segregation else ""
    told = f"{summary['verdict']}\n{suspects}summary: {out / 'summary.json'}"
    return f"{told}\n{paged(out, quiet=quiet)}" if page else told


def heading(*, defense: str, seed: int, settings: csc.Common, backend: Backend) -> str:
    """What is about to run, in a line."""
    together = f", {backend.ranks.world} ranks" if backend.ranks.world > 1 else ""
    rule = f", rule {settings.segregate.rule}" if isinstance(settings, csc.Settings) else ""
    return (
        f"csc-gpu train: {settings.train.model} on {backend.name}{together}, defense "
        f"{defense}{rule}, seed {seed}, flip {'on' if settings.train.flip else 'off'}"
    )


def extent(split: Split, settings: csc.Common) -> str:
    """How much there is to train on, in a line."""
    plan = budget(len(split.train), settings.train)
    return (
        f"{len(split.train)} rows of {split.train.n_classes} classes, {len(split.test)} held out; "
        f"{plan.epochs} epochs are {plan.steps} optimiser steps"
    )


def paged(folder: Path, *, quiet: bool = False) -> str:
    """The line that says where the page of a run is, or why there is none."""
    try:
        with Console(folder / "log.jsonl", silent=quiet):
            return f"report: {report.write(folder)}"
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted while its page was made; the run is complete in {folder}"
        ) from None
    except Exception as fault:  # whatever it is, the run is worth more than its page
        return f"no report ({' '.join(str(fault).split())}): csc-gpu report {folder} tries again"


def look(folder: Path, projection: str) -> str:
    """Write the page of a finished run; where it is."""
    with Console() as log:
        return f"report: {report.write(folder, projection, log)}"


def defense_named(name: str) -> Entry:
    """The defense of that name; raises ConfigError if there is none."""
    if name not in DEFENSES:
        raise ConfigError(f"unknown defense {name!r}; there are {', '.join(DEFENSES)}")
    return DEFENSES[name]


def settings_of(defense: str, changes: Mapping[str, Any]) -> csc.Common:
    """A defense's settings with some changed. Raises ConfigError for one that is not its own."""
    usual: csc.Common = defense_named(defense).settings()
    for name, option in OF_CSC.items():
        if changes.get(name) and not isinstance(usual, csc.Settings):
            raise ConfigError(f"{option} is for csc, not for {defense}; leave it out")
    return override(usual, dict(changes))


OF_CSC = {"recover.on": "--recover", "watch.keep": "--save-features"}
"""Settings that have options of their own, and that csc alone has."""


def require_able(defense: str, backend: Backend, *, reserve: bool) -> None:
    """Raises ConfigError if the defense lacks, or has no use for, clean images or these ranks."""
    needs = RESERVE in defense_named(defense).needs
    if needs and not reserve:
        raise ConfigError(f"{defense} needs clean images: give some with --reserve CORPUS")
    if reserve and not needs:
        raise ConfigError(f"{defense} has no use for clean images; leave --reserve out")
    if backend.ranks.world > 1 and defense not in ON_RANKS:
        raise ConfigError(f"{defense} runs in one process; start it without torchrun")


def require_tolerant(
    defense: str, backend: Backend, *, skip_broken: bool, max_bad: int | None
) -> None:
    """Raises ConfigError if broken images cannot be found while the defense trains."""
    if max_bad is not None and (skip_broken or defense != "csc" or backend.ranks.world > 1):
        raise ConfigError(
            "--max-bad is for defense csc in one process, without --skip-broken; leave it out, and "
            "all images are checked before training"
        )


ON_RANKS = ("csc", "plain")
"""The defenses that several processes may share."""


def follow(
    source: str, out: Path, broken: Mapping[str, Any], *, backend: Backend, **how: Any
) -> str:
    """What the ranks after the first do: the same work, of which they keep and say nothing."""
    kept = Following(run.partial_of(out) / run.CHECKPOINTS)
    with Console(silent=True) as log, kept.heeding_sigterm():
        settings = how["settings"]
        check = MemoryCheck(settings, backend, log)
        split = data.open_source(source, settings.data, log)
        split = opened(split, source, settings, backend, check, broken, log)
        defended(source, split, backend=backend, log=log, kept=kept, **how)
    return ""


def opened(
    split: Split,
    source: str,
    settings: csc.Common,
    backend: Backend,
    check: reader.Before,
    broken: Mapping[str, Any],
    log: Console,
) -> Split:
    """The source with its pixels where the machine wants them, once the plan of memory holds.

    `broken` says what to do about images that do not decode: skip_broken and max_bad of `load`.
    """
    how = {"backend": backend, "before": check, "log": log, **broken}
    return sources.read(split, source, settings.data, **how)


def defended(
    source: str,
    split: Split,
    *,
    defense: str,
    seed: int,
    settings: csc.Common,
    backend: Backend,
    log: Console,
    kept: Folder,
    trusted: Corpus | None = None,
) -> tuple[Outcome, dict[str, Any]]:
    """Run the defense; what it ends with, and the summary."""
    backend.ranks.wait()  # until the first has made sure that this run may begin, or go on
    start = time.process_time(), time.perf_counter()
    outcome = DEFENSES[defense].run(
        DefenderView(split.train, trusted), settings, backend, seed=seed, log=log, kept=kept
    )
    spent = time.process_time() - start[0], time.perf_counter() - start[1]
    summary = summarise(source, split, outcome, settings, backend)
    summary |= {"defense": defense, "seed": seed, "ranks": backend.ranks.world}
    summary |= {"cpu_seconds": round(spent[0], 2), "wall_seconds": round(spent[1], 2)}
    return outcome, summary


UNTOLD = (
    "checkpoint.",
    "features.spill",
    *(f"gpu.{name}" for name in ("memory", "graph", "decode_threads", "prefetch")),
    *(f"gpu.{name}" for name in ("cluster", "scheduler")),
)
"""Settings of the machine, or groups of them, that may change between two starts of a run."""


KEPT = "watch.keep"
"""What a finished run need not agree in: whether features are kept says nothing of its verdict."""


def identity(
    source: str, split: Split, settings: csc.Common, defense: str, seed: int, reserve: str
) -> dict[str, Any]:
    """What must be the same for a run to be gone on with, of a source that is open but not read."""
    chosen = {
        name: value for name, value in flattened(settings).items() if not name.startswith(UNTOLD)
    }
    init = Path(settings.train.init)
    return {
        "source": str(Path(source).absolute()) if Path(source).exists() else source,
        "classes": list(split.train.classes),
        "names and labels": named(split.train),
        **told_apart(source, split),
        "--defense": defense,
        "--seed": seed,
        "--reserve": str(Path(reserve).absolute()) if reserve else "",
        **(told_apart(reserve, data.open_source(reserve, data.Settings())) if reserve else {}),
        **chosen,
        "contents of train.init": digest(init) if init.is_file() else "",
    }


def told_apart(source: str, split: Split) -> dict[str, str]:
    """What tells the images of this source from others, each under a name to be told."""
    found = sources.fingerprints(source, split)
    return {f"{name} of {source}": told[:16] for name, told in found.items()}


def read_rows(corpus: Corpus) -> dict[str, Any]:
    """What must be the same, too, once it is known which images decode."""
    return {
        "rows": len(corpus),
        "rows and labels": named(corpus),
        "image size": list(corpus.image_size),
    }


def named(corpus: Corpus) -> str:
    """A digest of the names and labels of all rows."""
    rows = hashlib.sha256("\n".join(corpus.paths).encode(errors="surrogateescape"))
    rows.update(corpus.labels.astype("<i8").tobytes())
    return rows.hexdigest()


def require_same(
    was: Mapping[str, Any], about: Mapping[str, Any], what: str, remedy: str, settings: csc.Common
) -> None:
    """Raises ConfigError if what was begun then had another corpus or other settings."""
    for name, value in about.items():
        is_date = name.startswith(f"{sources.DATES} of ")
        if was.get(name) == value or (is_date and not settings.checkpoint.dates):
            continue
        if is_date:
            raise ConfigError(
                f"{what} had other {name}; if its files are a copy of those of then, add --set "
                f"checkpoint.dates=false, else {remedy}"
            )
        raise ConfigError(f"{what} had {name} {was.get(name)!r}, not {value!r}; {remedy}")


def finished(
    out: Path,
    source: str,
    settings: csc.Common,
    defense: str,
    seed: int,
    reserve: str,
    *,
    quiet: bool,
) -> str:
    """What a finished run has found. Raises ConfigError if it was of another corpus, or other."""
    with Console(silent=quiet) as log:
        split = data.open_source(source, settings.data, log)
        about = identity(source, split, settings, defense, seed, reserve)
    done = read_summary(out)
    remedy = "choose another place, or train anew with --force"
    was = done.get("asked")
    if not isinstance(was, dict):
        raise ConfigError(f"{out} is finished, but does not tell of which corpus; {remedy}")
    asked = {name: value for name, value in about.items() if name != KEPT}
    require_same(was, asked, f"the finished run in {out}", remedy, settings)
    return f"{out} is finished: {done['verdict']}\nsummary: {out / 'summary.json'}"


def count_start(kept: Folder, about: Mapping[str, Any], settings: csc.Common, log: Console) -> int:
    """How often the run has been started, this time included.

    Raises ConfigError if an earlier start was of another corpus or had other settings.
    """
    before = kept.load("run")
    starts = fact(before, "starts", int) + 1 if before else 1
    if before is not None:
        was, commit = fact(before, "about", dict), before.facts["commit"]
        remedy = "resume it as it was begun, or begin anew with --force and without --resume"
        require_same(was, about, "the interrupted run", remedy, settings)
        log.say(f"resumed, start {starts}")
        log("resumed", start=starts, begun_with_code=commit)
        if commit != run.commit():
            log.say(f"note: it was begun with the code of {commit}, this is {run.commit()}")
    facts = {"about": about, "starts": starts, "commit": run.commit()}
    kept.save("run", lambda: Record({}, facts))
    return starts


class MemoryCheck:
    """Plans a run before pixels are read, and refuses one that a GPU is too small for.

    A CPU's run is told what it will take, and not refused: it may swap. The plan is CSC's; what a
    rival takes is not known beforehand.
    """

    def __init__(self, settings: csc.Common, backend: Backend, log: Console) -> None:
        self._settings, self._backend, self._log = settings, backend, log
        self._room, self._found = backend.free_bytes(), dict[str, Any]()

    def __call__(self, split: Split, size: tuple[int, int], streamed: bool) -> None:
        if self._room is None or not isinstance(self._settings, csc.Settings):
            return
        shape = planning.Shape(len(split.train), *size, split.train.n_classes, len(split.test))
        found = planned(shape, self._settings, self._room, self._backend, streamed)
        lines = planning.told(found, self._settings)
        self._log("plan", lines=lines)
        self._log.say(f"memory: {lines[-1]}")
        self._found = {
            "planned_bytes": found.peak(found.largest),
            "largest_stage": found.largest,
        }
        if self._backend.name == "gpu":
            planning.refuse_too_small(found)

    def measured(self) -> dict[str, Any]:
        """The plan's largest stage, and the most that was held so far, for the summary."""
        return self._found | {"peak_bytes": self._backend.peak_bytes()}


def planned(
    shape: planning.Shape,
    settings: csc.Settings,
    room: int,
    backend: Backend,
    streamed: bool | None,
) -> planning.Plan:
    """The plan for this machine, `room` bytes of which may still be taken."""
    if backend.name == "gpu":
        return planning.plan(shape, settings, room, streamed=streamed)
    has = backend.peak_bytes() or 0
    libraries = has + planning.AT_WORK
    return planning.plan(
        shape, settings, room + has, streamed=streamed, machine="cpu", libraries=libraries
    )


def needed_bytes(corpus: Corpus, settings: csc.Common) -> int:
    """About what a run will write: up to three models, a line a row, features if they are kept.

    And checkpoints: weights and momentum of up to four trainings, every snapshot's clusters.
    """
    model = new_model(settings.train.model, corpus.n_classes, corpus.image_size[0], seed=0)
    weights: int = sum(weight.numel() for weight in model.state_dict().values())
    if not isinstance(settings, csc.Settings):
        return 4 * 11 * weights + BYTES_PER_LINE * len(corpus)
    watched = len(settings.watch.steps(budget(len(corpus), settings.train)))
    d = width(model, settings.features.layer, corpus.image_size)
    kept = (2 * watched + 1) * d if settings.watch.keep else 0  # numbers a row
    evidence = watched * len(settings.segregate.scales)
    return 4 * (11 * weights + (kept + evidence) * len(corpus)) + BYTES_PER_LINE * len(corpus)


def save_outcome(
    folder: Path,
    outcome: Outcome,
    split: Split,
    settings: csc.Common,
    summary: Mapping[str, Any],
    backend: Backend,
) -> None:
    """Models, suspects, features and, last, the summary."""
    corpus, name = split.train, outcome.model.name
    if outcome.undefended is not None:
        run.save_model(folder / "undefended.safetensors", outcome.undefended, name, corpus)
    run.save_model(folder / "model.safetensors", outcome.model, name, corpus)
    if outcome.recovered is not None:
        run.save_model(folder / "recovered.safetensors", outcome.recovered.model, name, corpus)
    if outcome.segregation is not None:
        run.save_suspects(folder / "suspects.csv", run.names(corpus), outcome.segregation)
        run.save_clusters(folder / "clusters.csv", outcome.segregation, corpus.classes)
        if outcome.drawing is not None:
            run.save_drawing(folder / "drawing.npz", outcome.drawing)
        if outcome.snapshots and isinstance(settings, csc.Settings):
            run.save_snapshots(
                folder / "features.npz",
                outcome.snapshots,
                corpus,
                outcome.segregation,
                asdict(settings.segregate),
                layer=settings.features.layer or run.HEAD_INPUT,
            )
    run.write_json(folder / "summary.json", summary)


def summarise(
    source: str, split: Split, outcome: Outcome, settings: csc.Common, backend: Backend
) -> dict[str, Any]:
    """The verdict, the evidence that needs no key, and how it was come by."""
    steps = budget(len(split.train), settings.train)  # those that proved broken were counted in
    split = split.sound()
    corpus, told = split.train, outcome.segregation
    suspect = np.zeros(len(corpus), bool) if told is None else told.suspect
    virtual = {
        "virtual_rate_on_suspects": corpus.take(np.flatnonzero(suspect)),
        "virtual_rate_on_held_out": split.test,
    }
    rates = {
        name: evaluate.virtual_rate(outcome.model, rows, outcome.n_classes, backend)
        for name, rows in virtual.items()
    }
    return {
        "verdict": verdict(told, corpus.labels, corpus.classes) if told else NOT_LOOKED,
        "rows": len(corpus),
        "suspects": int(suspect.sum()) if told else None,
        "suspects_by_class": per_class(suspect, corpus.labels, corpus.classes),
        "evidence": {name: rate.value for name, rate in rates.items()},
        "evidence_counts": {name: [rate.hits, rate.of] for name, rate in rates.items()},
        "segregation": dict(told.notes) if told else {},
        "poison_score": "0..1, higher is more suspect; suspects score .5 and above",
        "model": outcome.model.name,
        "n_classes": outcome.n_classes,
        "n_outputs": outcome.model.n_outputs,
        "recovered_without": int(outcome.recovered.without.sum()) if outcome.recovered else None,
        "classes": corpus.classes,
        "image_size": corpus.image_size,
        "source": str(Path(source).absolute()) if Path(source).exists() else source,
        "broken": split.broken,
        "epochs": steps.epochs,
        "optimiser_steps": steps.steps,
        "flip": settings.train.flip,
        "shift": settings.train.shift,
        "backend": backend.name,
        "stage_seconds": {stage: round(s, 3) for stage, s in outcome.seconds.items()},
        "commit": run.commit(),
        "versions": describe(),
    }


def verdict(told: Segregation, labels: Labels, classes: tuple[str, ...]) -> str:
    """One sentence."""
    suspect = told.suspect
    if not suspect.any():
        return TOO_MANY if told.notes.get("capped") else NO_POISON
    flagged = sorted(per_class(suspect, labels, classes).items(), key=lambda item: -item[1])
    where = ", ".join(f"{count} labelled {name!r}" for name, count in flagged[:3])
    more = f" and {len(flagged) - 3} more classes" if len(flagged) > 3 else ""
    return f"poison suspected in {int(suspect.sum())} of {len(suspect)} rows: {where}{more}"


def per_class(suspect: Mask, labels: Labels, classes: tuple[str, ...]) -> dict[str, int]:
    """Suspects by class name, classes without any left out."""
    counts = np.bincount(labels[suspect], minlength=len(classes))
    return {classes[label]: int(count) for label, count in enumerate(counts) if count}


# --- clean --------------------------------------------------------------------------------------


def clean(
    folder: Path,
    source: str,
    out: Path,
    kind: str,
    *,
    keep: Path | None,
    drop: Path | None,
    review: Path | None,
    copy: bool,
    shard_bytes: int,
    force: bool,
) -> str:
    """Write a run's corpus without what is poison; how much that was, in a few lines."""
    if copy and kind != "folder":
        raise ConfigError(f"--copy is for --as folder; a {kind} copies nothing, or all")
    summary = read_summary(folder)
    suspects = run.load_suspects(folder / "suspects.csv")
    said = cleaning.reviewed(suspects, keep, drop, review)
    poison = cleaning.guilty(suspects, said)
    run.check_free(out, cleaning.KINDS[kind], force=force)
    run.check_apart(source, out)
    run.check_apart(str(folder), out)
    if Path(source).exists() and out.resolve().is_relative_to(Path(source).resolve()):
        raise OutputError(f"{out} lies in the source {source}, which is not changed; go elsewhere")
    with Console() as log:
        split = data.open_source(source, findings.settings_of(folder).data)
        split = cleaning.sound(split, summary.get("broken") or ())
        place = cleaning.place_of(split, suspects, source)
        split = cleaning.without(split, place[poison], source)
        recipe = {
            "source": str(Path(source).absolute()) if Path(source).exists() else source,
            "run": str(folder.absolute()),
            "verdict": summary["verdict"],
            "as": kind,
            "rows": len(suspects.paths),
            "left_out": int(poison.sum()),
            "broken": split.broken,
            "kept_by_review": int((suspects.suspect & ~poison).sum()),
            "dropped_by_review": int((~suspects.suspect & poison).sum()),
            "reviews": said.files,
            "said": said.said,
            "commit": run.commit(),
        }
        with run.fresh_directory(out, cleaning.KINDS[kind], force=force) as place_:
            cleaning.write(place_, split, kind, copy=copy, shard_bytes=shard_bytes, log=log)
            cleaning.write_removed(place_ / cleaning.REMOVED, suspects, poison, said.said)
            run.write_json(place_ / cleaning.RECIPE, recipe)
    corpus = out / cleaning.MANIFEST if kind == "manifest" else out
    people = f" ({recipe['kept_by_review']} suspects kept, {recipe['dropped_by_review']} others "
    people += "dropped on people's word)"
    return (
        f"{recipe['left_out']} of {recipe['rows']} rows left out{people if said.said else ''}\n"
        f"corpus: {corpus}\nleft out: {out / cleaning.REMOVED}"
    )


# --- conceal ------------------------------------------------------------------------------------

COPIED = (
    "settings.toml",
    "clusters.csv",
    "drawing.npz",
    "features.npz",
    "log.jsonl",
    "undefended.safetensors",
)
"""What a run has in common with the one whose verdict people have reviewed."""


def conceal_again(
    folder: Path,
    out: Path,
    *,
    keep: Path | None,
    drop: Path | None,
    review: Path | None,
    force: bool,
    backend: Backend,
) -> str:
    """Fine-tune the head anew with the suspects as people have reviewed them; the new run.

    recovered.safetensors is not among it: that net has not learnt from the suspects of before.
    """
    summary, settings = read_summary(folder), findings.settings_of(folder)
    suspects = run.load_suspects(folder / "suspects.csv")
    said = cleaning.reviewed(suspects, keep, drop, review)
    poison = cleaning.guilty(suspects, said)
    run.check_free(out, run.RUN, force=force)
    run.check_apart(str(folder), out)
    source = summary["source"]
    with run.fresh_directory(out, run.RUN, force=force) as place:
        for name in COPIED:
            if (folder / name).exists():
                shutil.copyfile(folder / name, place / name)
        with Console(place / "log.jsonl") as log:
            skip_broken = bool(summary.get("broken"))
            split = sources.load(
                source, settings.data, backend=backend, skip_broken=skip_broken, log=log
            )
            split = replace(
                split, train=split.train.take(cleaning.place_of(split, suspects, source))
            )
            model = run.load_model(folder / "undefended.safetensors", summary, summary["n_classes"])
            model.to(backend.device)
            clock = csc.Stopwatch(backend)
            with clock("conceal"):
                concealed = conceal.conceal(
                    model,
                    split.train,
                    poison,
                    settings.conceal,
                    backend,
                    seed=summary["seed"],
                    log=log,
                )
            notes = {**summary["segregation"], "reviewed": said.files}
            told = Segregation(poison, suspects.score.astype(np.float32), {}, notes)
            outcome = Outcome(concealed, model, split.train.n_classes, told, {}, clock.seconds)
            trained = {name: summary[name] for name in ("epochs", "optimiser_steps")}
            new = summary | summarise(source, split, outcome, settings, backend) | trained
            path = place / "model.safetensors"
            run.save_model(path, concealed, settings.train.model, split.train)
            lines = cleaning.judged(folder / "suspects.csv", suspects, poison, said)
            run.write_table(place / "suspects.csv", *lines)
            run.write_json(place / "summary.json", new | {"reviewed_run": str(folder.absolute())})
    return f"{new['verdict']}\nsuspects: {out / 'suspects.csv'}\n{paged(out)}"


# --- plan ---------------------------------------------------------------------------------------


def plan(
    source: str | None,
    shape: tuple[int, int, int],
    changes: Mapping[str, Any],
    memory: int | None,
) -> str:
    """The memory plan for a source, or for (rows, side, classes) if there is none yet.

    memory is a GPU's; None plans a run on this processor. Raises ConfigError if it cannot tell how
    much memory it has.
    """
    settings = override(csc.Settings(), dict(changes))
    here = open_backend("cpu")
    if not settings.train.model:
        name = "resnet18" if memory is not None else here.usual_model
        settings = override(settings, {"train.model": name})
    rows, side, classes = shape
    wanted, streamed = planning.Shape(rows, side, side, classes), None
    if source is not None:
        split = data.open_source(source, settings.data)
        train, test = split.train, split.test
        size = sources.training_size(source, train, settings.data)
        wanted = planning.Shape(len(train), *size, train.n_classes, len(test))
        streamed = None if train.files else False
    if memory is not None:
        found = planning.plan(wanted, settings, memory, streamed=streamed)
    else:
        room = here.free_bytes()
        if room is None:
            raise ConfigError("this system does not tell its free memory; give --gpu-memory SIZE")
        found = planned(wanted, settings, room, here, streamed)
    return "\n".join(planning.told(found, settings))


# --- segregate ----------------------------------------------------------------------------------


def segregate(
    features: Path,
    out: Path,
    *,
    changes: Mapping[str, Any],
    force: bool,
    backend: Backend,
    defense: str = "csc",
) -> str:
    """Segregate a feature file and write the verdict; the verdict in a few lines.

    Another defense than csc judges the last snapshot. Raises ConfigError if it needs the images.
    """
    judge = defense_named(defense).judge
    if judge is None and defense != "csc":
        able = ", ".join(name for name, entry in DEFENSES.items() if entry.judge)
        raise ConfigError(f"{defense} does not judge features alone; csc, {able} do")
    found = run.load_snapshots(features)
    of_run = {name: v for name, v in (found.settings or {}).items() if name in known_settings()}
    before = {f"segregate.{n}": v for n, v in of_run.items()} if judge is None else {}
    settings = settings_of(defense, before | dict(changes))
    run.check_apart(str(features), out)
    with run.fresh_directory(out, run.VERDICT, force=force) as folder:
        run.write_text(folder / "settings.toml", to_toml(settings))
        with Console(folder / "log.jsonl") as log:
            drawing = None
            if judge is not None:
                last = backend.xp.asarray(found.features[-1])
                told = judge(last, found.labels, settings, backend, seed=0)
            else:
                assert isinstance(settings, csc.Settings)
                told, drawing = watch(found, settings.segregate, backend, log)
        labels, classes = found.labels, found.classes
        run.save_suspects(folder / "suspects.csv", found.names, told)
        run.save_clusters(folder / "clusters.csv", told, classes)
        if drawing is not None:
            run.save_drawing(folder / "drawing.npz", drawing)
        summary = {
            "verdict": verdict(told, labels, classes),
            "rows": len(told.suspect),
            "suspects": int(told.suspect.sum()),
            "suspects_by_class": per_class(told.suspect, labels, classes),
            "segregation": dict(told.notes),
            "poison_score": "0..1, higher is more suspect; suspects score .5 and above",
            "source": str(features.absolute()),
            "backend": backend.name,
            "commit": run.commit(),
            "versions": describe(),
        }
        run.write_json(folder / "summary.json", summary)
    unverified = told.notes.get("verified") is False
    stage = "\nonly stage 1 ran: there are no images to verify it with" if unverified else ""
    return f"{summary['verdict']}{stage}\nsuspects: {out / 'suspects.csv'}"


def known_settings() -> set[str]:
    """The settings of segregation; a run of an older version may have recorded others, too."""
    return {field.name for field in fields(segregation.Settings)}


def watch(
    found: run.Snapshots, settings: segregation.Settings, backend: Backend, log: Console
) -> tuple[Segregation, Drawing | None]:
    """The verdict on saved snapshots, with what verification returned then; what to draw."""
    sightings = []
    scales = segregation.looked_at(range(len(found.features)), settings)
    for number, (points, epoch) in enumerate(zip(found.features, found.epoch, strict=True)):
        placed = backend.xp.asarray(points)
        sightings.append(
            segregation.observe(
                placed, found.labels, float(epoch), settings, backend, scales=scales[number]
            )
        )
        log("snapshot", sighting=sightings[-1])
    witness = run.replay(found, backend)
    told = segregation.segregate(sightings, found.labels, settings, backend, witness)
    return told, segregation.drawing(sightings, told.suspect, settings, backend)
