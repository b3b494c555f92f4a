"""Attacks x defenses x data sets x rates x seeds: one JSON line for each, as it ends.

A group is one poisoned corpus; its defenses share it, the clean images that some of them need, and
the net of ordinary training, from which most of them start. The clean images are held out of the
test part before the key is made, so that nobody is scored on them. Two rows of a table are no
defenses: `oracle`, the only one that is handed the key, removes exactly the poison, `random`, told
how many that are, as many rows at random; both then train anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from csc_gpu import attacks, csc, data, evaluate, pipeline, run, sources, train
from csc_gpu.backend import Backend
from csc_gpu.backend.doctor import describe
from csc_gpu.checkpoint import NOWHERE, Checkpoints, Folder, Record, fact
from csc_gpu.config import flattened, override, read_toml, require
from csc_gpu.data.holdout import held_out
from csc_gpu.defenses import DEFENSES, RATE, RESERVE
from csc_gpu.defenses.course import PLAIN, Course, verdict
from csc_gpu.errors import ConfigError, CscError, Interrupted, OutputError
from csc_gpu.types import AnswerKey, Corpus, DefenderView, Log, Mask, Outcome, Split, quiet

ORACLE, RANDOM = "oracle", "random"
TOLD = {ORACLE: "the key", RANDOM: "how many are poison"}
"""Rows that are no defenses, and what they are told."""
WATCHES = "csc"
"""The defense that looks at its training, and so cannot start from a trained net."""
CONTROLS = ("plain", *TOLD)
"""Rows of every table."""
SECONDS, CPU_SECONDS = "seconds", "cpu seconds"
"""The record that tells how long ordinary training took, and what else it tells."""
CORPUS = "corpus"
"""The record that tells which images and labels the others are of."""
ELSEWHERE = ("gpu.", "checkpoint.", "features.spill")
"""Settings of the machine: they do not tell cells apart."""


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be compared: every combination."""

    data: tuple[str, ...] = ("digits",)
    """Sources, as for csc-gpu poison; NAME=SOURCE gives a source a name in the rows."""
    attacks: tuple[str, ...] = ("none", "badnets", "blend")
    """By name: csc-gpu attacks lists them."""
    defenses: tuple[str, ...] = ("plain", "oracle", "random", "csc", "ac", "spectral")
    """By name: csc-gpu defenses lists them. plain, oracle and random are rows of every table, named
    here or not."""
    rates: tuple[float, ...] = (0.05,)
    """Shares of all rows that are poisoned, for attacks that change labels."""
    rates_of_target: tuple[float, ...] = (0.5,)
    """Shares of the target's rows that are poisoned, for attacks that keep labels."""
    targets: tuple[str, ...] = ("0",)
    """The target of each seed, in turn."""
    seeds: tuple[int, ...] = (0,)
    """Of poisoning and training."""
    reserve: float = 0.2
    """Share of every class's held-out images that are kept as clean images for the defenses that
    need some; nobody is scored on them."""
    label_noise: float = 0.0
    """Share of clean rows that get a false label."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """[settings]: of every defense, such as train.epochs = 10."""
    defense: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """[defense.NAME]: of one defense."""
    attack: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """[attack.NAME]: options of one attack."""

    def __post_init__(self) -> None:
        lists = ("data", "attacks", "defenses", "rates", "rates_of_target", "targets", "seeds")
        require(self, "plan", "a list that is not empty", lambda items: len(items) > 0, *lists)
        require(self, "plan", "in (0, 1)", lambda share: 0 < share < 1, "reserve")
        shares = "shares in (0, 1)"
        rates = ("rates", "rates_of_target")
        require(self, "plan", shares, lambda told: all(0 < x < 1 for x in told), *rates)
        seeds = "numbers from 0"
        require(self, "plan", seeds, lambda numbers: min(numbers) >= 0, "seeds")
        for name in (*self.defenses, *self.defense):
            if name not in (*DEFENSES, ORACLE, RANDOM):
                known = ", ".join((*DEFENSES, ORACLE, RANDOM))
                raise ConfigError(f"plan.defenses: unknown defense {name!r}; there are {known}")
        for name in (*self.attacks, *self.attack):
            if name not in attacks.ATTACKS:
                known = ", ".join(attacks.ATTACKS)
                raise ConfigError(f"plan.attacks: unknown attack {name!r}; there are {known}")

    @property
    def compared(self) -> tuple[str, ...]:
        """Its defenses, and the rows of every table behind those that it does not name."""
        return tuple(dict.fromkeys((*self.defenses, *CONTROLS)))


TABLES = ("settings", "defense", "attack")


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file. Raises ConfigError for anything that it does not know."""
    flat = read_toml(path)
    tables: dict[str, Any] = {"settings": {}, "defense": {}, "attack": {}}
    plain: dict[str, Any] = {}
    for name, value in flat.items():
        table, _, rest = name.partition(".")
        if table == "settings":
            tables[table][rest] = value
        elif table in TABLES:
            whose, _, setting = rest.partition(".")
            tables[table].setdefault(whose, {})[setting] = value
        else:
            plain[name] = value
    return replace(override(Plan(), plain), **tables)


@dataclass(frozen=True)
class Group:
    """One poisoned corpus."""

    data: str  # its name in the rows
    source: str
    plan: attacks.Plan
    options: tuple[tuple[str, Any], ...]
    reserve: float

    def settings(self) -> Any:
        """The attack's. Raises ConfigError for an option that it does not have."""
        options = tuple(f"{name}={json.dumps(value)}" for name, value in self.options)
        return attacks.settings_of(self.plan.attack, options)

    @property
    def about(self) -> dict[str, Any]:
        """What a row says of it."""
        plan = self.plan
        rate_of = "corpus" if plan.rate is not None else "target"
        return {
            "data": self.data,
            "source": self.source,
            "attack": plan.attack,
            "rate": plan.rate if plan.rate is not None else plan.rate_of_target,
            "rate_of": rate_of,
            "target": plan.target,
            "label_noise": plan.label_noise,
            "seed": plan.seed,
            "attack_options": dict(self.options),
            "reserve": self.reserve,
        }


def groups(plan: Plan) -> Iterator[Group]:
    """Every corpus to poison; an attack-free one once for all rates."""
    for text in plan.data:
        name, equals, source = text.partition("=")
        for attack in plan.attacks:
            keeps = attacks.ATTACKS[attack].labels == "clean"
            rates = plan.rates_of_target if keeps else plan.rates
            options = tuple(sorted(plan.attack.get(attack, {}).items()))
            for rate in rates[:1] if attack == "none" else rates:
                for number, seed in enumerate(plan.seeds):
                    wanted = attacks.Plan(
                        attack=attack,
                        target=plan.targets[number % len(plan.targets)],
                        rate=None if keeps else rate,
                        rate_of_target=rate if keeps else None,
                        label_noise=plan.label_noise,
                        seed=seed,
                    )
                    yield Group(name, source if equals else name, wanted, options, plan.reserve)


def changes_of(plan: Plan, defense: str, true_rate: float) -> dict[str, Any]:
    """The settings of a defense that the plan gives, and the true rate, if it needs that."""
    given = {**plan.settings, **plan.defense.get(defense, {})}
    if _is_told(plan, defense, true_rate):
        given = {f"{defense}.{RATE}": true_rate, **given}
    return given


def _is_told(plan: Plan, defense: str, true_rate: float) -> bool:
    """Whether it is told the true rate: it needs one, there is one, and the plan gives no other."""
    if defense not in DEFENSES or RATE not in DEFENSES[defense].needs:
        return False
    given = {**plan.settings, **plan.defense.get(defense, {})}
    return true_rate > 0 and f"{defense}.{RATE}" not in given


# --- the cells ----------------------------------------------------------------------------------


def cells(
    plan: Plan, out: Path, work: Path, backend: Backend, *, retry: bool = False, log: Log = quiet
) -> Iterator[dict[str, Any]]:
    """Run every cell that `out` has no line of, append its line, and yield it.

    With `retry` those that failed are run again. Raises, before anything is run, ConfigError if a
    defense or an attack refuses its settings, CorpusError for a source that cannot be opened;
    OutputError if another process works in `work`, or what is there was made of other images.
    """
    with run.locked(work):
        yield from _cells(plan, out, work, backend, retry=retry, log=log)


def _cells(
    plan: Plan, out: Path, work: Path, backend: Backend, *, retry: bool, log: Log
) -> Iterator[dict[str, Any]]:
    wanted = list(dict.fromkeys(groups(plan)))
    for group in wanted:
        group.settings()
    for defense in plan.compared:
        _settings(plan, defense, 0.0, backend)
    end_line(out)
    done = {line["key"] for line in read_rows(out) if not (retry and line["error"])}
    left = {
        group: [name for name in plan.compared if _key(plan, group, name, backend) not in done]
        for group in wanted
    }
    for source in dict.fromkeys(group.source for group, todo in left.items() if todo):
        data.open_source(source, _settings(plan, "plain", 0.0, backend).data, log)
    for group, todo in left.items():
        if not todo:
            continue
        place = work / _digest(group.about | {"settings": _shared_settings(plan, backend)})
        table: Table | str
        try:
            table = Table.laid(plan, group, place, backend, log)
            table.require_known()
            table.warm()
        except (Interrupted, OutputError):
            raise
        except Exception as fault:  # a line says so; the next group may do better
            table = _told(fault)
        for defense in sorted(todo, key=lambda name: name != WATCHES):  # its training serves all
            line = _line(plan, group, defense, backend)
            log("cell", **{name: line[name] for name in ("data", "attack", "seed", "defense")})
            line |= {"error": table} if isinstance(table, str) else table.row(defense, log)
            append(out, line)
            yield line


def failed(plan: Plan, out: Path, backend: Backend) -> int:
    """How many cells of the plan have an error in their last line of `out`."""
    ended = {line["key"]: bool(line["error"]) for line in read_rows(out)}
    return sum(
        ended.get(_key(plan, group, name, backend), False)
        for group in dict.fromkeys(groups(plan))
        for name in plan.compared
    )


@dataclass(frozen=True)
class Cost:
    """What a defense took, stage by stage."""

    seconds: Mapping[str, float]  # of the wall clock
    cpu_seconds: Mapping[str, float]  # of the processor, all threads; of no stage where unknown

    def rounded(self) -> dict[str, Any]:
        """As a row has it."""
        return {
            "seconds": {stage: round(took, 3) for stage, took in self.seconds.items()},
            "cpu_seconds": {stage: round(took, 3) for stage, took in self.cpu_seconds.items()},
            "seconds_in_all": round(sum(self.seconds.values()), 3),
        }


@dataclass(frozen=True)
class Undefended:
    """What ordinary training gives, and takes."""

    score: evaluate.Score
    seconds: float
    cpu_seconds: float | None  # None on a GPU, and in a folder of work from before they were told
    images: int  # that went forward and back

    def instead(self, cost: Cost) -> Cost:
        """The cost of a defense that found the net trained: of its training, what that took."""
        cpu = {stage: took for stage, took in cost.cpu_seconds.items() if stage != PLAIN}
        ours = {} if self.cpu_seconds is None else {PLAIN: self.cpu_seconds}
        return Cost({**cost.seconds, PLAIN: self.seconds}, ours | cpu)

    def times(self, cost: Cost) -> float | None:
        """How often this training's time a defense takes: the processor's, which another process
        beside it does not stretch, if that is known of all; else the wall clock's."""
        if self.cpu_seconds and cost.cpu_seconds.keys() == cost.seconds.keys():
            return sum(cost.cpu_seconds.values()) / self.cpu_seconds
        return sum(cost.seconds.values()) / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Table:
    """A poisoned corpus, its key, and what its defenses share."""

    plan: Plan
    group: Group
    split: Split
    key: AnswerKey
    trusted: Corpus
    folder: Folder
    backend: Backend
    images: str  # what tells them, and their labels, from all others

    @staticmethod
    def laid(plan: Plan, group: Group, place: Path, backend: Backend, log: Log) -> Table:
        """Load, hold the clean images out, and poison."""
        common = _settings(plan, "plain", 0.0, backend)
        split = sources.load(group.source, common.data, log=log)
        is_kept = held_out(split.test.labels, group.reserve, common.data.holdout_seed)
        trusted = split.test.take(np.flatnonzero(is_kept))
        split = data.checked(
            replace(split, test=split.test.take(np.flatnonzero(~is_kept))), group.data
        )
        how = group.settings()
        trigger = attacks.ready(split, group.plan, how, backend, log)
        poisoned, key = attacks.poison(split, trigger)
        # a trigger that is learnt again may differ in a rounding
        images = _contents(split if trigger.attack.learns(how) else poisoned)
        folder = Folder(place, minutes=common.checkpoint.minutes)
        return Table(plan, group, poisoned, key, trusted, folder, backend, images)

    def require_known(self) -> None:
        """Put down what the images and labels are, or raise OutputError if they were others."""
        now, was = self.images, self.folder.load(CORPUS)
        if was is None:  # new, or from before this was put down
            self.folder.save(CORPUS, lambda: Record({}, {CORPUS: now}))
        elif fact(was, CORPUS, str) != now:
            raise OutputError(
                f"{self.group.source} has other images or labels than when the nets and scores in "
                f"{self.folder.place} were made; give another --work, or the images of then"
            )

    def warm(self) -> None:
        """Take a throw-away step: what torch does once in a process is no defense's cost."""
        settings, corpus = _settings(self.plan, "plain", 0.0, self.backend), self.split.train
        few = corpus.take(np.arange(min(settings.train.batch, len(corpus))))
        short = replace(settings.train, epochs=1, min_steps=0)
        net = csc.fresh_model(few, settings, self.backend, seed=0)
        for _ in train.train(net, few, short, self.backend, seed=0):
            pass

    def row(self, defense: str, log: Log) -> dict[str, Any]:
        """What a defense does to this corpus; its error, if it fails."""
        try:
            return self._judged(defense, log)
        except Interrupted:
            raise
        except Exception as fault:  # a line says so; the other cells go on
            return {"error": _told(fault), "trace": _trace(fault)}

    def _judged(self, defense: str, log: Log) -> dict[str, Any]:
        key, seed, backend = self.key, self.group.plan.seed, self.backend
        true_rate = float(key.is_poison.mean())
        settings = _settings(self.plan, defense, true_rate, backend)
        needs = DEFENSES[defense].needs if defense in DEFENSES else (TOLD[defense],)
        view = DefenderView(self.split.train, self.trusted if RESERVE in needs else None)
        shares = flattened(settings.train) == _shared_settings(self.plan, backend)
        kept = Ordinary(self.folder, leads=defense == WATCHES) if shares else NOWHERE
        tally = Tally(log)
        how: dict[str, Any] = {"seed": seed, "log": tally, "kept": kept}
        if defense in DEFENSES:
            outcome = DEFENSES[defense].run(view, settings, backend, **how)
        else:
            removed = key.is_poison
            if defense == RANDOM:
                removed = drawn(len(removed), int(removed.sum()), seed)
            outcome = without(defense, view, settings, backend, removed, **how)
        if isinstance(kept, Ordinary) and kept.made and PLAIN in outcome.seconds:
            self._tell_seconds(outcome)
        plain, cost = self._undefended(log), Cost(outcome.seconds, outcome.cpu_seconds)
        if isinstance(kept, Ordinary) and kept.found:
            cost = plain.instead(cost)
        times = plain.times(cost)
        found, n_classes = outcome.segregation, outcome.n_classes

        def scored(net: Any) -> evaluate.Score:
            return evaluate.accuracy_and_attack(net, key, n_classes, backend)

        return {
            "needs": list(needs),
            "told_rate": true_rate if _is_told(self.plan, defense, true_rate) else None,
            "before": plain.score,
            "after": scored(outcome.model),
            "recovered": scored(outcome.recovered.model) if outcome.recovered else None,
            "detection": evaluate.detection(found.suspect, found.score, key) if found else None,
            "notes": run.plain(found.notes) if found else None,
            **cost.rounded(),
            "plain_seconds": round(plain.seconds, 3),
            "plain_cpu_seconds": plain.cpu_seconds and round(plain.cpu_seconds, 3),
            "times_plain": times and round(times, 4),
            "budget": tally.budget,
            "plain_images": plain.images,
            "images_times_plain": round(tally.images / plain.images, 4),
            "counts": dict(key.recipe["counts"]),
            "rows": len(self.split.train),
            "test_rows": len(key.test),
            "reserve_rows": len(self.trusted),
            "classes": n_classes,
            "n_outputs": outcome.model.n_outputs,
            "image_size": list(self.split.train.image_size),
            "settings": _telling(settings),
        }

    def _undefended(self, log: Log) -> Undefended:
        """Ordinary training, done now if nobody did yet."""
        settings = _settings(self.plan, "plain", 0.0, self.backend)
        kept = Ordinary(self.folder)
        view, tally = DefenderView(self.split.train), Tally(log)
        how: dict[str, Any] = {"seed": self.group.plan.seed, "log": tally, "kept": kept}
        outcome = DEFENSES["plain"].run(view, settings, self.backend, **how)
        if not kept.found:
            self._tell_seconds(outcome)
        known = self.folder.load("score")
        if known is None or not kept.found:
            score = evaluate.accuracy_and_attack(
                outcome.model, self.key, outcome.n_classes, self.backend
            )
            known = Record({}, {"score": run.plain(score)})
            self.folder.save("score", lambda: known)
        took = self.folder.load(SECONDS)
        seconds = fact(took, SECONDS, float) if took else 0.0
        cpu = fact(took, CPU_SECONDS, float) if took and CPU_SECONDS in took.facts else None
        return Undefended(fact(known, "score", dict), seconds, cpu, tally.images)

    def _tell_seconds(self, outcome: Outcome) -> None:
        told = {SECONDS: outcome.seconds[PLAIN]}
        if PLAIN in outcome.cpu_seconds:
            told[CPU_SECONDS] = outcome.cpu_seconds[PLAIN]
        self.folder.save(SECONDS, lambda: Record({}, told))


class Tally:
    """A log that counts what trainings cost, by stage, on any machine and under any load.

    Optimiser steps, and images that went forward and back: all views and mixtures of a batch, in
    full though a head alone learns. What was found trained counts as if trained now. Not counted:
    looks without a way back (features, overlays, guesses, a teacher's attention), and fine-tuning
    a head on features (conceal).
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._last: dict[str, tuple[int, int]] = {}  # of the training that a stage is in
        self.budget: dict[str, dict[str, int]] = {}

    def __call__(self, event: str, **fields: Any) -> None:
        """See Log."""
        if event == "step":
            self._count(fields["stage"], fields["at"])
        self._log(event, **fields)

    def _count(self, stage: str, at: train.Moment) -> None:
        steps, images = self._last.get(stage, (0, 0))
        if at.step <= steps:  # another training of that name
            steps = images = 0
        spent = self.budget.setdefault(stage, {"steps": 0, "images": 0})
        spent["steps"] += at.step - steps
        spent["images"] += at.images - images
        self._last[stage] = at.step, at.images

    @property
    def images(self) -> int:
        """Of all stages."""
        return sum(spent["images"] for spent in self.budget.values())


class Ordinary:
    """Checkpoints of ordinary training alone, shared by the defenses of a group.

    One that `leads` looks at its training, so that it cannot take what is there; what it leaves
    serves the others. Nothing else is kept.
    """

    def __init__(self, folder: Folder, *, leads: bool = False) -> None:
        self._folder, self._leads = folder, leads
        self.found = self.made = False

    def load(self, name: str) -> Record | None:
        """See Checkpoints."""
        if self._leads or not name.startswith(f"{PLAIN}-"):
            return None
        if self._folder.load(SECONDS) is None:
            return None  # it was cut off, and how long it took would not be known
        record = self._folder.load(name)
        self.found |= record is not None
        return record

    def save(self, name: str, told: Callable[[], Record]) -> None:
        """See Checkpoints."""
        if name.startswith(f"{PLAIN}-"):
            self.made = True
            self._folder.save(name, told)

    def is_due(self) -> bool:
        """See Checkpoints: epochs are enough."""
        return False


def drawn(n: int, count: int, seed: int) -> Mask:
    """So many of n rows, at random. (n,)"""
    rng, chosen = np.random.default_rng(seed), np.zeros(n, bool)
    chosen[rng.choice(n, count, replace=False)] = True
    return chosen


def without(
    name: str,
    view: DefenderView,
    settings: csc.Common,
    backend: Backend,
    removed: Mask,
    *,
    seed: int,
    log: Log = quiet,
    kept: Checkpoints = NOWHERE,
) -> Outcome:
    """Train anew without some rows (N,): the poison (oracle), or as many at random (random)."""
    course = Course(view, settings, backend, seed=seed, log=log, kept=kept)
    found = verdict(removed, removed.astype(float), name)
    return course.outcome(course.retrained(removed), None, found)


# --- lines --------------------------------------------------------------------------------------

NAMES = (
    "key", "data", "attack", "rate", "rate_of", "label_noise", "attack_options", "seed", "defense",
    "changed", "error",
)  # fmt: skip
"""What every line says, whatever wrote it."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, none if it is not there; half a line at its end is passed over.

    Raises ConfigError for a file that holds anything else.
    """
    if not path.exists():
        return []
    try:
        *whole, last = path.read_text(encoding="utf-8").split("\n")
        lines = [json.loads(line) for line in (*whole, *([last] if _is_whole(last) else []))]
    except (OSError, ValueError) as fault:
        raise ConfigError(f"{path} is no results file of csc-gpu matrix: {fault}") from fault
    for number, line in enumerate(lines, 1):
        lacking = [name for name in NAMES if not isinstance(line, dict) or name not in line]
        if lacking:
            said = f"line {number} has no {lacking[0]!r}"
            raise ConfigError(f"{path} is no results file of csc-gpu matrix: {said}")
    return lines


def end_line(path: Path) -> None:
    """Make the file end with a line: half a line is cut off, a whole one gets its end.

    Raises ConfigError, and leaves the file, if it is no results file.
    """
    if not read_rows(path):
        return
    before, newline, last = path.read_text(encoding="utf-8").rpartition("\n")
    if last:
        run.write_text(path, before + newline + (f"{last}\n" if _is_whole(last) else ""))


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def append(path: Path, line: Mapping[str, Any]) -> None:
    """One more line, in one piece, on the disk when this returns."""
    content = json.dumps(run.plain(line), allow_nan=False) + "\n"
    with run.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(content.encode())
            os.fsync(file.fileno())


def _line(plan: Plan, group: Group, defense: str, backend: Backend) -> dict[str, Any]:
    """What a line says before anything is known."""
    return {
        "key": _key(plan, group, defense, backend),
        **group.about,
        "defense": defense,
        "changed": changes_of(plan, defense, 0.0),
        "settings": _telling(_settings(plan, defense, 0.0, backend)),
        "error": None,
        "backend": backend.name,
        "machine": backend.machine,
        "commit": run.commit(),
        "versions": describe(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def _key(plan: Plan, group: Group, defense: str, backend: Backend) -> str:
    """Tells this cell from every other; a rate that is told follows from the corpus."""
    settings = _telling(_settings(plan, defense, 0.0, backend))
    return _digest({**group.about, "defense": defense, "settings": settings})


def _digest(about: Mapping[str, Any]) -> str:
    text = json.dumps(run.plain(about), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _contents(split: Split) -> str:
    """A digest of the images and labels of both parts."""
    told = hashlib.sha256()
    for part in (split.train, split.test):
        told.update(f"{part.images.shape}".encode())
        told.update(part.images.tobytes())
        told.update(part.labels.astype("<i8").tobytes())
    return told.hexdigest()[:16]


def _settings(plan: Plan, defense: str, true_rate: float, backend: Backend) -> csc.Common:
    """The settings of a defense, the net's name filled in."""
    name = defense if defense in DEFENSES else "plain"
    settings = pipeline.settings_of(name, changes_of(plan, defense, true_rate))
    if not settings.train.model:
        settings = override(settings, {"train.model": backend.usual_model})
    return settings


def _shared_settings(plan: Plan, backend: Backend) -> dict[str, Any]:
    """How the shared net is trained."""
    return flattened(_settings(plan, "plain", 0.0, backend).train)


def _telling(settings: csc.Common) -> dict[str, Any]:
    """The settings that a result depends on."""
    flat = flattened(settings)
    return {name: value for name, value in flat.items() if not name.startswith(ELSEWHERE)}


def _trace(fault: Exception) -> list[str]:
    """Where it happened, innermost last; files by their last two names, for rows travel."""
    return [
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}: {frame.line}"
        for frame in traceback.extract_tb(fault.__traceback__)[-6:]
    ]


def _told(fault: Exception) -> str:
    kind = "" if isinstance(fault, CscError) else f"{type(fault).__name__}: "
    return kind + " ".join(str(fault).split())
