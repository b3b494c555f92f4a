"""Detection and concealment over attacks and seeds: what the README's table is made of.

    python -m benchmarks.detection run CORPUS --name cifar10-10k --flip --work /tmp/cells
    python -m benchmarks.detection table benchmarks/results/detection.jsonl

A cell is one poisoned corpus, trained on with the ordinary commands (`csc-gpu poison`, `train`,
`score`), and one JSON line when it ends; cells that have a line are not run again. Each attack cell
is also compared with what a net trained on the clean corpus of the same seed makes of the same
triggered images, so `none` runs first.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
RATES = {
    "none": ("--rate", 0.05),
    "badnets": ("--rate", 0.05),
    "blend": ("--rate", 0.05),
    "sig": ("--rate-of-target", 0.5),
}
TARGETS = (0, 3, 7, 1, 5, 9)
"""The target class of seed 0, 1, 2, ..."""
CSC_GPU = (sys.executable, "-m", "csc_gpu")


@click.group()
def cli() -> None:
    """Run the cells of the study, or make the table of what was run."""


@cli.command()
@click.argument("corpus")
@click.option("--name", required=True, help="What to call the corpus in the lines.")
@click.option("--attack", "attacks", multiple=True, help="Only these attacks; repeat.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only these seeds; repeat.")
@click.option("--rate", type=float, help="Another rate than the usual one.")
@click.option("--flip", is_flag=True, help="Mirror images at random while training.")
@click.option("--set", "changed", multiple=True, help="A setting of csc-gpu train; repeat.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where runs are kept.")
@click.option("--jobs", default=2, show_default=True, help="Cells at a time, one core each.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def run(
    corpus: str,
    name: str,
    attacks: tuple[str, ...],
    seeds: tuple[int, ...],
    rate: float | None,
    flip: bool,
    changed: tuple[str, ...],
    work: Path,
    jobs: int,
    out: Path,
) -> None:
    """Run every cell that has no line yet, controls first."""
    wanted = [
        {
            "data": name,
            "attack": attack,
            "rate": RATES[attack][1] if attack == "none" else rate or RATES[attack][1],
            "rate_of": RATES[attack][0],
            "target": TARGETS[seed],
            "seed": seed,
            "flip": flip,
            "set": list(changed),
        }
        for attack in (attacks or tuple(RATES))
        for seed in (seeds or (0, 1, 2))
    ]
    known = [{key: line.get(key) for key in wanted[0]} for line in read(out)]
    todo = [cell for cell in wanted if cell not in known]
    click.echo(f"{len(wanted)} cells, {len(todo)} to run")
    out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        controls = [cell for cell in todo if cell["attack"] == "none"]
        others = [cell for cell in todo if cell["attack"] != "none"]
        for batch in (controls, others):
            for line in pool.map(lambda cell: run_cell(cell, corpus, work), batch):
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                click.echo(said(line))


def run_cell(cell: dict[str, Any], corpus: str, work: Path) -> dict[str, Any]:
    """Poison, train and score one cell by the ordinary commands, one core each."""
    place = folder(cell, work)
    poisoned, done, key = place / "poisoned", place / "run", place / "poisoned" / "key.npz"
    start = time.perf_counter()
    seed = ("--seed", cell["seed"], "--force")
    attack = ("--attack", cell["attack"], cell["rate_of"], cell["rate"], "--target", cell["target"])
    flags = [flag for text in cell["set"] for flag in ("--set", text)]
    flags += ["--flip"] if cell["flip"] else []
    cpu = {
        "poison": command("poison", corpus, poisoned, *attack, *seed),
        "train": command("train", poisoned, "--out", done, "--cpu", "--threads", 1, *seed, *flags),
        "score": command("score", done, "--key", key),
    }
    score = json.loads((done / "score.json").read_text())
    summary = json.loads((done / "summary.json").read_text())
    clean = folder({**cell, "attack": "none", "rate": RATES["none"][1]}, work) / "run"
    return {
        **cell,
        "before": score["before"],
        "after": score["after"],
        "detection": score["detection"],
        "asr_of_clean_net": attack_on(clean, key) if cell["attack"] != "none" else None,
        "verdict": summary["verdict"],
        "segregation": summary["segregation"],
        "stage_seconds": summary["stage_seconds"],
        "cpu_seconds": round(sum(cpu.values()), 1),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "model": summary["model"],
        "optimiser_steps": summary["optimiser_steps"],
        "commit": summary["commit"],
        "versions": summary["versions"],
    }


def folder(cell: dict[str, Any], work: Path) -> Path:
    """Where a cell's corpus and run are kept."""
    changed = "".join("-" + "".join(c if c.isalnum() else "_" for c in s) for s in cell["set"])
    changed += "-flip" if cell["flip"] else ""
    return work / f"{cell['data']}-{cell['attack']}-{cell['rate']}-{cell['seed']}{changed}"


def command(*words: Any) -> float:
    """Run one csc-gpu command; its CPU seconds. Raises if it fails."""
    probe = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print('CPU', used.ru_utime + used.ru_stime); sys.exit(done.returncode)"
    )
    line = [sys.executable, "-c", probe, *CSC_GPU, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, words))}: {done.stderr[-2000:]}")
    return float(done.stdout.rsplit("CPU", 1)[1])


def attack_on(run_of_clean: Path, key: Path) -> float | None:
    """asr of the net trained on the clean corpus, on this key's triggered images."""
    if not (run_of_clean / "summary.json").exists():
        return None
    from csc_gpu import answers, evaluate
    from csc_gpu.backend import open_backend
    from csc_gpu.run import load_model

    summary = json.loads((run_of_clean / "summary.json").read_text())
    model = load_model(run_of_clean / "undefended.safetensors", summary, summary["n_classes"])
    found = evaluate.accuracy_and_attack(
        model, answers.load_key(key), summary["n_classes"], open_backend("cpu", 1)
    )
    return float(found["asr"])


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(line: dict[str, Any]) -> str:
    """One cell in one line of text."""
    figures = [
        f"acc {number(line['before']['acc'])} -> {number(line['after']['acc'])}",
        f"asr {number(line['before']['asr'])} -> {number(line['after']['asr'])}",
        f"tpr {number(line['detection']['tpr'])}",
        f"fpr {number(line['detection']['fpr'], 4)}",
        f"{line['cpu_seconds']:.0f} CPU-s",
    ]
    return f"{line['data']} {line['attack']} seed {line['seed']}: " + ", ".join(figures)


def number(value: float | None, digits: int = 3) -> str:
    """A fraction as text, - if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


@cli.command()
@click.argument("lines", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--seed", "seeds", multiple=True, type=int, help="Only these seeds; repeat.")
def table(lines: Path, seeds: tuple[int, ...]) -> None:
    """The cells as Markdown: the median over seeds, and each seed's value."""
    rows = [row for row in read(lines) if not seeds or row["seed"] in seeds]
    click.echo(
        "| data | attack | n | recall | false alarms | asr before | asr after | "
        "clean net | accuracy before | accuracy after | CPU-s |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(map(kind_of, rows)):
        cells = [row for row in rows if kind_of(row) == kind]
        columns = [
            spread([cell["detection"]["tpr"] for cell in cells]),
            spread([cell["detection"]["fpr"] for cell in cells], 4),
            spread([cell["before"]["asr"] for cell in cells]),
            spread([cell["after"]["asr"] for cell in cells]),
            spread([cell["asr_of_clean_net"] for cell in cells]),
            spread([cell["before"]["acc"] for cell in cells]),
            spread([cell["after"]["acc"] for cell in cells]),
            spread([cell["cpu_seconds"] for cell in cells], 0),
        ]
        click.echo(f"| {kind[0]} | {named(cells[0])} | {len(cells)} | {' | '.join(columns)} |")
    machines = {
        f"{row['versions']['processor']}, one core of {row['versions']['cores']}, "
        f"torch {row['versions']['torch']}, scikit-learn {row['versions']['scikit-learn']}, "
        f"commit {row['commit']}"
        for row in rows
    }
    click.echo(
        "\nMedian over the seeds, and each seed's value. " + "; ".join(sorted(machines)) + "."
    )


def kind_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What the cells of one line of the table have in common: all but the seed and its target."""
    alike = (row[key] for key in ("data", "attack", "rate", "rate_of", "flip", "commit"))
    return (*alike, tuple(row["set"]))


def named(row: dict[str, Any]) -> str:
    """Attack, rate and settings of a line."""
    if row["attack"] == "none":
        return " ".join(["none", *row["set"]])
    of = " of target" if "target" in row["rate_of"] else ""
    return " ".join([f"{row['attack']} {row['rate']:g}{of}", *row["set"]])


def spread(values: list[float | None], digits: int = 3) -> str:
    """Median (each value), as text."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    each = ", ".join(number(value, digits) for value in known)
    return f"**{number(statistics.median(known), digits)}** ({each})"


if __name__ == "__main__":
    cli()
