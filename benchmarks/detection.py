"""Detection, concealment and recovery over data sets, attacks, rates, seeds and rules.

    python -m benchmarks.detection train CORPUS --name cifar10-10k --flip --work CELLS
    python -m benchmarks.detection judge --work CELLS
    python -m benchmarks.detection judge --work CELLS --rule again --out AGAIN
    python -m benchmarks.detection judge --work CELLS --rule "two-stage segregate.votes=2" --out TRY
    python -m benchmarks.detection table --rule two-stage
    python -m benchmarks.detection plot --out PICTURES

A cell is one poisoned corpus. `train` poisons it and trains on it once, with the ordinary commands,
and keeps the features of every snapshot; `judge` applies rules to these same features, asks the
witnesses, conceals and recovers, and writes one JSON line for each cell and rule. Both skip what is
done, so either can be stopped and called again. The net of the cell without an attack, of the same
seed, is the clean net that attack cells are compared with: what it makes of the same triggered
images, and how many of them it gets right (the bar for recovery).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.cells import open_cell, read_cell
from benchmarks.command import Commands, json_lines
from csc_gpu.cli import Failure
from csc_gpu.config import override, parse_change
from csc_gpu.errors import ConfigError, CorpusError

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).parent / "results" / "segregation.jsonl"
STUDY = ("none", "badnets", "blend", "sig")
"""The attacks where none are given."""
TARGETS = ("0", "3", "7", "1", "5", "9")
"""The target of seed 0, 1, 2, ... where none are given."""
CSC_GPU = (sys.executable, "-m", "csc_gpu")
DEFAULT, ORACLE, PLAIN = "two-stage", "oracle", "plain"
"""The rule that is judged in full; one that reads the key: what perfect detection gives; and no
defense at all: how well the attack takes hold."""
PAPERS = ("text", "algorithm1", "per_label")
ONCE = "-once"
"""Ends the name of a rule that sees one clustering as the paper does, of the last snapshot, and not
what any of several scales and snapshots shows."""
AT_ONCE = 0.5
"""The scale of that clustering."""
AGAIN, RECOVER = "again", "recover"
"""The default rule as it is now, without recovery: does it still suspect, and leave out of
recovery, whom it did when the cell's line was made? If so, that line stands, for a run on one core
repeats itself bit by bit. And recovery as it is now, from the verdict of that line. Both go to
files of their own."""


JOBS = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Cells at a time, one core each.",
)
LINES = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group(cls=Commands)
def cli() -> None:
    """Train the cells of the study, judge them, make the table or the plots."""


# --- train --------------------------------------------------------------------------------------


@cli.command()
@click.argument("corpus")
@click.option("--name", required=True, help="What to call the corpus in the lines.")
@click.option("--attack", "attacks", multiple=True, help="Only these attacks; repeat.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only these seeds; repeat.")
@click.option("--target", "targets", multiple=True, help="The targets of the seeds, in turn.")
@click.option("--option", "options", multiple=True, help="A setting of the attack; repeat.")
@click.option("--rate", type=float, help="Another rate than the usual one.")
@click.option("--label-noise", default=0.0, help="Share of clean rows with a false label.")
@click.option("--flip", is_flag=True, help="Mirror images at random while training.")
@click.option("--set", "changed", multiple=True, help="A setting of csc-gpu train; repeat.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where cells lie.")
@JOBS
def train(
    corpus: str,
    name: str,
    attacks: tuple[str, ...],
    seeds: tuple[int, ...],
    targets: tuple[str, ...],
    options: tuple[str, ...],
    rate: float | None,
    label_noise: float,
    flip: bool,
    changed: tuple[str, ...],
    work: Path,
    jobs: int,
) -> None:
    """Poison and train every cell that is not there yet."""
    if any(not text.startswith(("data.", "train.")) for text in changed):
        raise click.UsageError("--set takes data. and train. here: judge applies the usual rule")
    for attack in attacks or STUDY:
        require_poison(attack, rate, label_noise, options)
    require_settings(dict(map(parse_change, changed)))
    cells = [
        {
            "data": name,
            "attack": attack,
            "rate": usual(attack)[1] if attack == "none" or rate is None else rate,
            "rate_of": usual(attack)[0],
            "target": targets[number % len(targets)] if targets else TARGETS[seed % len(TARGETS)],
            "seed": seed,
            "label_noise": label_noise,
            "flip": flip,
            "set": list(changed),
            "options": list(options),
        }
        for number, seed in enumerate(seeds or (0, 1, 2))
        for attack in (attacks or STUDY)
    ]
    todo = [cell for cell in cells if not (folder(cell, work) / "cell.json").exists()]
    click.echo(f"{len(cells)} cells, {len(todo)} to train")
    with ThreadPoolExecutor(jobs) as pool:
        for cell in pool.map(lambda cell: train_cell(cell, corpus, work), todo):
            click.echo(f"trained {folder(cell, work).name}")


def require_poison(
    attack: str, rate: float | None, label_noise: float, options: tuple[str, ...]
) -> None:
    """Raises ConfigError for what csc-gpu poison would refuse."""
    from csc_gpu.attacks import Plan, settings_of

    rate = 0.05 if rate is None else rate
    Plan(attack=attack, target=TARGETS[0], rate=rate, label_noise=label_noise)
    settings_of(attack, options)


def require_settings(changes: dict[str, Any]) -> None:
    """Raises ConfigError for a setting of another name, or a value that it cannot have."""
    from csc_gpu import csc

    override(csc.Settings(), changes)


def usual(attack: str) -> tuple[str, float]:
    """The option that gives an attack its rate, and the rate: half of the target if clean-label."""
    from csc_gpu.attacks import ATTACKS

    if ATTACKS[attack].labels == "clean":
        return "--rate-of-target", 0.5
    return "--rate", 0.05


def train_cell(cell: dict[str, Any], corpus: str, work: Path) -> dict[str, Any]:
    """Poison and train one cell by the ordinary commands, on one core."""
    place = folder(cell, work)
    seed = ("--seed", cell["seed"], "--force")
    attack = ("--attack", cell["attack"], cell["rate_of"], cell["rate"], "--target", cell["target"])
    changed = (*cell["set"], "segregate.rule=persistence")  # what judge needs is the features
    flags = [flag for text in changed for flag in ("--set", text)]
    flags += ["--flip"] if cell["flip"] else []
    noise = ("--label-noise", cell["label_noise"])
    noise += tuple(word for text in cell.get("options", ()) for word in ("--option", text))
    here = ("--cpu", "--threads", 1, *seed)
    command("poison", corpus, place / "poisoned", *attack, *noise, *here)
    command(
        "train",
        place / "poisoned",
        "--out",
        place / "run",
        "--save-features",
        "--no-report",
        *here,
        *flags,
    )
    (place / "cell.json").write_text(json.dumps(cell) + "\n")
    return cell


def folder(cell: dict[str, Any], work: Path) -> Path:
    """Where a cell's corpus and run are kept."""
    said = [cell["data"], cell["attack"], cell["rate"], cell["seed"]]
    said += [f"to_{cell['target']}"] if cell["attack"] != "none" else []
    said += [f"noise_{cell['label_noise']}"] if cell["label_noise"] else []
    said += ["flip"] if cell["flip"] else []
    words = ["".join(c if c.isalnum() or c == "." else "_" for c in str(w)) for w in said]
    said = [*cell["set"], *map(told, cell.get("options", ()))]
    return work / "-".join([*words, *("".join(filter(str.isalnum, s)) for s in said)])


def told(option: str) -> str:
    """A setting of an attack, a picture by its name alone."""
    name, _, value = option.partition("=")
    return f"{name}={Path(value).name}"


def command(*words: Any) -> None:
    """Run one csc-gpu command. Raises ConfigError with its last line if a user can mend it."""
    done = subprocess.run([*CSC_GPU, *map(str, words)], capture_output=True, text=True)
    if done.returncode == Failure.exit_code:
        line = done.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"{' '.join(map(str, words))}: {line}")
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, words))}: {done.stderr[-2000:]}")


# --- judge --------------------------------------------------------------------------------------


@cli.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where cells lie.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    default=(DEFAULT,),
    show_default=True,
    help="A rule, and after blanks the segregation settings it is tried with; repeat.",
)
@click.option("--only", default="", help="Cells whose folder begins so.")
@JOBS
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True
)
def judge(work: Path, rules: tuple[str, ...], only: str, jobs: int, out: Path) -> None:
    """Judge every trained cell by every rule that has no line yet."""
    for rule in rules:
        require_rule(rule)
    tried = [rule for rule in rules if rule.split()[1:] or rule in (AGAIN, RECOVER)]
    if tried and out.resolve() == RESULTS.resolve():
        raise ConfigError(f"give --out: lines of {tried[0]!r} are no part of the study's own")
    cells = [read_cell(path.parent) for path in sorted(work.glob(f"{only}*/cell.json"))]
    if not cells:
        such = f" that begins with {only}" if only else ""
        raise CorpusError(f"{work} holds no cell{such}; train makes them")
    known = [(key_of(line), line["rule"]) for line in read(out)]
    todo = [(c, rule) for rule in rules for c in cells if (key_of(c), rule) not in known]
    attacked = (ORACLE, PLAIN, RECOVER)
    todo = [(c, r) for c, r in todo if r.split()[0] not in attacked or c["attack"] != "none"]
    click.echo(f"{len(cells)} cells, {len(todo)} judgements to make")
    with ThreadPoolExecutor(jobs) as pool:
        asked = [pool.submit(judged, cell, rule, work) for cell, rule in todo]
        failed = []
        for done in as_completed(asked):
            if done.exception():
                failed.append(str(done.exception()))
                continue
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done.result()) + "\n")
            click.echo(said(done.result()))
    if failed:
        raise click.ClickException(f"{len(failed)} judgements failed; the first: {failed[0]}")


def require_rule(rule: str) -> None:
    """Raises ConfigError for a rule of another name, or settings that it cannot be tried with."""
    from csc_gpu.segregate import RULES

    known = (*RULES, *(name + ONCE for name in RULES), ORACLE, PLAIN, AGAIN, RECOVER)
    if rule.split(" ")[0] not in known:
        raise ConfigError(f"unknown rule {rule!r}; there are {', '.join(known)}")
    require_settings(changes_of(rule))


def changes_of(rule: str) -> dict[str, Any]:
    """The settings that a rule is judged with."""
    base, *tried = rule.split()
    named_rule = DEFAULT if base in (AGAIN, RECOVER) else base.removesuffix(ONCE)
    changes: dict[str, Any] = {} if rule in (ORACLE, PLAIN) else {"segregate.rule": named_rule}
    if base.endswith(ONCE):
        changes |= {"segregate.scales": [AT_ONCE], "segregate.coarsest": AT_ONCE}
    changes |= dict(map(parse_change, tried)) | {"recover.on": rule in (DEFAULT, ORACLE)}
    if named_rule in PAPERS:  # they have no caps; ours would free what they flag
        changes |= {"segregate.max_share": 1.0, "segregate.max_label_share": 1.0}
    return changes


def judged(cell: dict[str, Any], rule: str, work: Path) -> dict[str, Any]:
    """One cell by one rule, in a process of its own: one core, and its memory is given back."""
    line = [sys.executable, "-m", "benchmarks.detection", "one", str(folder(cell, work)), rule]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(line)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@cli.command(hidden=True)
@click.argument("place", type=click.Path(path_type=Path))
@click.argument("rule")
def one(place: Path, rule: str) -> None:
    """Judge the cell in PLACE by RULE and print its line."""
    click.echo(json.dumps(judge_cell(place, rule)))


def judge_cell(place: Path, rule: str) -> dict[str, Any]:
    """The line of a cell and a rule: scores before and after, detection, notes, seconds."""
    from csc_gpu import csc, evaluate, recover, run
    from csc_gpu.backend.doctor import describe

    there = open_cell(place, changes_of(rule))
    settings, cpu, snapshots = there.settings, there.backend, there.snapshots
    cell, summary, corpus = there.told, there.summary, there.corpus
    key, rows, model = there.key, there.rows, there.model
    base = rule.split()[0]
    if base.endswith(ONCE):
        last = {"features": snapshots.features[-1:], "epoch": snapshots.epoch[-1:]}
        snapshots = replace(snapshots, **last)

    scored = lambda net: evaluate.accuracy_and_attack(net, key, corpus.n_classes, cpu)  # noqa: E731
    clean = clean_net(place, cell, corpus)
    line = {
        **cell,
        "rule": rule,
        "before": scored(model),
        "after": None,
        "recovered": None,
        "clean_net": scored(clean) if clean and cell["attack"] != "none" else None,
        "detection": None,
        "counts": key.recipe["counts"],
        "training_seconds": summary["stage_seconds"],
        "model": summary["model"],
        "optimiser_steps": summary["optimiser_steps"],
        "trained_at": summary["commit"],
        "commit": run.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": describe(),
    }
    if rule == PLAIN:
        return line
    if base == RECOVER:
        was = verdict_of(place / f"{DEFAULT}.csv", corpus.paths)
        back = recover.recover(
            corpus,
            recover.left_out(was, corpus.labels, settings.recover),
            lambda seed: csc.fresh_model(corpus, settings, cpu, seed=seed),
            settings.train,
            cpu,
            seed=cell["seed"],
        )
        without = int(back.without.sum())
        return line | {"recovered": scored(back.model), "recovered_without": without}

    start, clock = used(), csc.Stopwatch(cpu)
    if rule == ORACLE:
        outcome = told_the_truth(model, corpus, there.poison, settings, cpu, cell["seed"])
    else:
        learnt = csc.Learnt(model, sighted(snapshots, settings.segregate, cpu, clock))
        outcome = csc.conclude(learnt, corpus, settings, cpu, clock, seed=cell["seed"])
    spent = used() - start

    found = outcome.segregation
    if base == AGAIN:
        was, how = verdict_of(place / f"{DEFAULT}.csv", corpus.paths), settings.recover
        line["changed"] = int((was.suspect != found.suspect).sum())
        both = (recover.left_out(verdict, corpus.labels, how) for verdict in (was, found))
        line["left_out_changed"] = int((next(both) != next(both)).sum())
    if rule != ORACLE:
        run.save_suspects(place / f"{rule}.csv", snapshots.names, found)
    suspect, score = found.suspect.copy(), found.score.copy()
    suspect[rows], score[rows] = found.suspect, found.score
    return line | {
        "after": scored(outcome.model),
        "recovered": scored(outcome.recovered.model) if outcome.recovered else None,
        "recovered_without": int(outcome.recovered.without.sum()) if outcome.recovered else None,
        "detection": evaluate.detection(suspect, score, key),
        "segregation": run.plain(found.notes),
        "seconds": {stage: round(s, 1) for stage, s in outcome.seconds.items()},
        "cpu_seconds": round(spent, 1),
    }


def verdict_of(path: Path, paths: tuple[str, ...]) -> Any:
    """The verdict on these images (N,) that a judgement has written."""
    import numpy as np

    from csc_gpu import run
    from csc_gpu.types import Segregation

    kept = run.load_suspects(path)
    if kept.paths != paths:
        raise CorpusError(f"{path} is of another corpus; judge it by {DEFAULT} again")
    return Segregation(kept.suspect, kept.score.astype(np.float32), {}, {})


def sighted(snapshots: Any, settings: Any, backend: Any, clock: Any) -> tuple[Any, ...]:
    """Every snapshot clustered as training would have done it."""
    from csc_gpu import segregate

    scales = segregate.looked_at(range(len(snapshots.epoch)), settings)
    with clock("cluster"):
        return tuple(
            segregate.observe(
                snapshots.features[number],
                snapshots.labels,
                float(epoch),
                settings,
                backend,
                scales=scales[number],
            )
            for number, epoch in enumerate(snapshots.epoch)
        )


def told_the_truth(
    model: Any, corpus: Any, poison: Any, settings: Any, backend: Any, seed: int
) -> Any:
    """What CSC ends with if its suspects are the poison; the net without them has this seed."""
    import numpy as np

    from csc_gpu import conceal, csc, recover, train
    from csc_gpu.types import Outcome, Segregation

    net = csc.fresh_model(corpus, settings, backend, seed=seed)
    rows = np.flatnonzero(~poison)
    for _ in train.train(net, corpus, settings.train, backend, seed=seed, rows=rows):
        pass
    concealed = conceal.conceal(model, corpus, poison, settings.conceal, backend, seed=seed)
    verdict = Segregation(poison, poison.astype(np.float32), {}, {})
    recovered = recover.Recovered(net, poison)
    return Outcome(concealed, model, corpus.n_classes, verdict, {}, {}, recovered)


def clean_net(place: Path, cell: dict[str, Any], corpus: Any) -> Any:
    """The net of the cell without an attack, of the same data and seed; None if it is missing."""
    from csc_gpu.run import load_model

    alike = {**cell, "attack": "none", "rate": usual("none")[1], "rate_of": usual("none")[0]}
    alike |= {"label_noise": 0.0, "options": []}
    there = folder(alike, place.parent) / "run"
    if not (there / "summary.json").exists():
        return None
    summary = json.loads((there / "summary.json").read_text())
    return load_model(there / "undefended.safetensors", summary, corpus.n_classes)


def used() -> float:
    """CPU seconds of this process."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


# --- what came out ------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there."""
    lines = json_lines(path)
    if any("clean_net" not in line for line in lines):
        raise Failure(f"{path} holds lines of an earlier study; give another file")
    for line in lines:
        for part in ("recovered", "clean_net"):
            if line[part]:
                line[part]["target"] = of_target(line[part]["counts"])
    return lines


def read_some(path: Path, rules: tuple[str, ...]) -> list[dict[str, Any]]:
    """The lines of these rules, of all if none is given. Raises CorpusError if there is none."""
    lines = read(path)
    if not lines:
        raise CorpusError(f"{path} holds no line; judge writes them")
    found = [line for line in lines if not rules or line["rule"] in rules]
    if not found:
        has = ", ".join(dict.fromkeys(line["rule"] for line in lines))
        raise CorpusError(f"{path} holds no line of the rule {' or '.join(rules)}; it has {has}")
    return found


def of_target(counts: dict[str, list[int]]) -> float | None:
    """Share of the triggered images of the target class itself that get it, rightly; RA is over the
    other classes. None where every class is a target."""
    (others, of_others), (every, of_all) = counts["asr"], counts["asr_incl_target"]
    return (every - others) / (of_all - of_others) if of_all > of_others else None


def key_of(cell: dict[str, Any]) -> str:
    """What tells a cell from every other, whatever the rule."""
    names = ("data", "attack", "rate", "rate_of", "target", "seed", "label_noise", "flip", "set")
    return json.dumps([*(cell[name] for name in names), *cell.get("options", ())])


def said(line: dict[str, Any]) -> str:
    """One line of the results, as one line of text."""
    if line["after"] is None:
        before = line["before"]
        took = f"acc {number(before['acc'])}, asr {number(before['asr'])}, undefended"
        return f"{line['data']} {named(line)} seed {line['seed']}: {took}"
    recovered = line["recovered"] or {}
    figures = [
        f"acc {number(line['before']['acc'])} -> {number(line['after']['acc'])}",
        f"asr {number(line['before']['asr'])} -> {number(line['after']['asr'])}",
        f"tpr {number(line['detection']['tpr'])}",
        f"fpr {number(line['detection']['fpr'], 4)}",
        f"recovered {number(recovered.get('acc'))} {number(recovered.get('ra'))}",
        f"{line['cpu_seconds']:.0f} CPU-s",
    ]
    return f"{line['data']} {named(line)} {line['rule']} seed {line['seed']}: " + ", ".join(figures)


def number(value: float | None, digits: int = 3) -> str:
    """A fraction as text, - if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


COLUMNS = {
    "recall": (("detection", "tpr"), 3),
    "false alarms": (("detection", "fpr"), 4),
    "asr before": (("before", "asr"), 3),
    "asr after": (("after", "asr"), 3),
    "clean net": (("clean_net", "asr"), 3),
    "accuracy before": (("before", "acc"), 3),
    "accuracy after": (("after", "acc"), 3),
    "RA recovered": (("recovered", "ra"), 3),
    "RA clean net": (("clean_net", "ra"), 3),
    "target class recovered": (("recovered", "target"), 3),
    "target class clean net": (("clean_net", "target"), 3),
    "recovered asr": (("recovered", "asr"), 3),
    "RA after": (("after", "ra"), 3),
    "clean rejected": (("after", "virtual_clean"), 3),
    "recovered accuracy": (("recovered", "acc"), 3),
}


@cli.command()
@click.argument("lines", type=LINES, default=RESULTS)
@click.option("--rule", "rules", multiple=True, help="Only these rules; repeat.")
@click.option("--column", "columns", multiple=True, type=click.Choice(list(COLUMNS)))
def table(lines: Path, rules: tuple[str, ...], columns: tuple[str, ...]) -> None:
    """The cells as Markdown: the median over seeds, and each seed's value."""
    rows = read_some(lines, rules)
    click.echo(f"{markdown(rows, columns or tuple(COLUMNS))}\n\n{made_by(rows)}")


def markdown(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """One line of a Markdown table for all lines that differ in seed and target alone."""
    lines = [
        f"| data | attack | rule | n | {' | '.join(columns)} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for cells in alike(rows):
        first = cells[0]
        shown = [spread(column(cells, *COLUMNS[name][0]), COLUMNS[name][1]) for name in columns]
        words = [first["data"], named(first), first["rule"], str(len(cells)), *shown]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def made_by(rows: list[dict[str, Any]]) -> str:
    """What the figures of a table are, and on which machines and commits they were made."""
    machines = {
        f"{row['versions']['processor']}, one core of {row['versions']['cores']}, "
        f"torch {row['versions']['torch']}, scikit-learn {row['versions']['scikit-learn']}"
        for row in rows
    }
    trained, judged = ({str(row[name]) for row in rows} for name in ("trained_at", "commit"))
    days = sorted({row["date"] for row in rows})
    return (
        f"Median over the seeds, and each seed's value. {'; '.join(sorted(machines))}; trained at "
        f"{', '.join(sorted(trained))}, judged at {', '.join(sorted(judged))}; {', '.join(days)}."
    )


def alike(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The lines that differ in nothing but seed and target, together."""

    def kind(row: dict[str, Any]) -> str:
        several = row["target"] if not row["target"].isdecimal() else ""
        return key_of({**row, "seed": 0, "target": several}) + row["rule"]

    for wanted in dict.fromkeys(map(kind, rows)):
        yield [row for row in rows if kind(row) == wanted]


def column(cells: list[dict[str, Any]], part: str, name: str) -> list[float | None]:
    """One figure of each cell; None where a cell has none."""
    return [cell[part][name] if cell[part] else None for cell in cells]


def named(row: dict[str, Any]) -> str:
    """Attack, rate, targets, noise and settings of a line."""
    words = [row["attack"]]
    if row["attack"] != "none":
        words.append(f"{row['rate']:g}" + (" of target" if "target" in row["rate_of"] else ""))
    words += [f"to {row['target']}"] if not row["target"].isdecimal() else []
    words += [f"+ {row['label_noise']:g} label noise"] if row["label_noise"] else []
    return " ".join([*words, *map(told, row.get("options", ())), *row["set"]])


def spread(values: list[float | None], digits: int = 3) -> str:
    """Median (each value), as text."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    each = ", ".join(number(value, digits) for value in values)
    middle = number(statistics.median(known), digits)
    return f"**{middle}** ({each})" if len(values) > 1 else f"**{middle}**"


@cli.command()
@click.argument("lines", type=LINES, default=RESULTS)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where pictures go.",
)
def plot(lines: Path, out: Path) -> None:
    """Recall and false alarms, attack success and accuracy of every cell, as two pictures."""
    from benchmarks.pictures import dots

    rows = read_some(lines, (DEFAULT,))
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "detection.png": (("recall", ("detection", "tpr")), ("false alarms", ("detection", "fpr"))),
        "concealment.png": (
            ("attack success before", ("before", "asr")),
            ("after", ("after", "asr")),
            ("accuracy before", ("before", "acc")),
            ("accuracy after", ("after", "acc")),
        ),
    }
    for name, panels in found.items():
        groups = [
            (f"{cells[0]['data']} {named(cells[0])}", {t: column(cells, *p) for t, p in panels})
            for cells in alike(rows)
        ]
        dots(groups, [title for title, _ in panels], out / name)
        click.echo(str(out / name))


@cli.command()
@click.argument("place", type=click.Path(path_type=Path))
@click.option("--verdict", type=click.Path(path_type=Path), help="suspects.csv; default: the run's")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The picture.")
def picture(place: Path, verdict: Path | None, out: Path) -> None:
    """The last snapshot of the cell in PLACE: who is poison, and who was found."""
    import numpy as np

    from benchmarks.pictures import scatter
    from csc_gpu import answers, run

    read_cell(place)
    key = answers.load_key(place / "poisoned" / "key.npz")
    snapshots = run.load_snapshots(place / "run" / "features.npz")
    paths = snapshots.names.paths
    found = verdict_of(verdict or place / "run" / "suspects.csv", paths)
    row = {path: number for number, path in enumerate(key.paths)}
    poison = key.is_poison[[row[path] for path in paths]]
    z = snapshots.features[-1]
    z = z / np.linalg.norm(z, axis=1, keepdims=True).clip(1e-12)
    concerned = np.unique(snapshots.labels[poison | found.suspect])
    attacked = np.isin(snapshots.labels, concerned if len(concerned) else snapshots.labels)
    centre = z[attacked].mean(axis=0)
    axes = np.linalg.eigh(np.cov((z[attacked] - centre).T))[1][:, ::-1][:, :2]
    kinds = np.where(attacked, "benign, of the label", "benign, other labels")
    kinds[found.suspect & ~poison] = "benign, flagged"
    kinds[poison & found.suspect] = "poison, found"
    kinds[poison & ~found.suspect] = "poison, missed"
    out.parent.mkdir(parents=True, exist_ok=True)
    scatter((z - centre) @ axes, kinds, place.name, out)
    click.echo(str(out))


if __name__ == "__main__":
    cli()
