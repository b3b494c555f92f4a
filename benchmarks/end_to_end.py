"""What CSC does and what it costs beside plain training, by the ordinary commands.

    python -m benchmarks.end_to_end CORPUS --attack badnets --attack blend --work DIR

For each attack the corpus is poisoned once and trained on twice, `--defense plain` and
`--defense csc`, each in a process of its own, and both are scored with the key. `added` is
(csc - plain) / plain of the seconds of all stages; `added_without_verify` leaves out those in which
verification trains its nets. Reading the corpus is in neither.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks import results_file
from benchmarks.command import Command, require_gpu
from benchmarks.detection import STUDY, TARGETS, command, usual
from csc_gpu import bench

EFFECTIVE = 0.5
"""Attack success before a defense from which an attack took hold."""
VERIFY = "verify"
"""The stage in which nets are trained without the candidates."""


def is_missed(line: Mapping[str, Any]) -> bool:
    """Whether CSC found none of the poison of an attack that took hold."""
    return line["defense"] == "csc" and line["asr_before"] >= EFFECTIVE and not line["recall"]


def run_attack(
    corpus: str,
    attack: str,
    rate: float,
    work: Path,
    seed: int,
    flags: list[Any],
    machine: list[Any],
) -> list[bench.Line]:
    """Poison once, train plainly and with CSC, score both; a line for each."""
    poisoned = work / f"{attack}-{rate:g}-{seed}"
    # fmt: off
    command("poison", corpus, poisoned, "--attack", attack, usual(attack)[0], rate,
            "--target", TARGETS[seed], "--seed", seed, "--force")
    # fmt: on
    lines = []
    for defense in ("plain", "csc"):
        done = poisoned.with_name(f"{poisoned.name}-{defense}")
        common = ("--seed", seed, "--force", *flags, *machine)
        command("train", poisoned, "--out", done, "--defense", defense, "--no-report", *common)
        on_cpu = [flag for flag in machine if flag == "--cpu"]
        command("score", done, "--key", poisoned / "key.npz", *on_cpu)
        summary = json.loads((done / "summary.json").read_text(encoding="utf-8"))
        score = json.loads((done / "score.json").read_text(encoding="utf-8"))
        about = {"attack": attack, "rate": rate, "rate_of": usual(attack)[0], "seed": seed}
        lines.append(about | cell(summary, score))
    for line in lines:
        line["added"] = added(line, lines[0])
        line["added_without_verify"] = added(line, lines[0], without=VERIFY)
    return lines


def cell(summary: Mapping[str, Any], score: Mapping[str, Any]) -> bench.Line:
    """What a run's summary and score say, flat."""
    detection = score["detection"] or {}
    stages = summary["stage_seconds"]
    return {
        "defense": summary["defense"],
        "model": summary["model"],
        "rows": summary["rows"],
        "epochs": summary["epochs"],
        "optimiser_steps": summary["optimiser_steps"],
        "recall": detection.get("tpr"),
        "false_alarms": detection.get("fpr"),
        "asr_before": score["before"]["asr"],
        "asr_after": score["after"]["asr"],
        "accuracy_before": score["before"]["acc"],
        "accuracy_after": score["after"]["acc"],
        "total_s": sum(stages.values()),
        **{f"{stage}_s": seconds for stage, seconds in stages.items()},
    }


def added(line: Mapping[str, Any], plain: Mapping[str, Any], without: str = "") -> float:
    """(total - plain) / plain, both without a stage if one is named."""

    def spent(some: Mapping[str, Any]) -> float:
        return float(some["total_s"] - some.get(f"{without}_s", 0.0))

    return (spent(line) - spent(plain)) / spent(plain)


@click.command(cls=Command)
@click.argument("corpus")
@click.option("--attack", "attacks", multiple=True, type=click.Choice(STUDY), default=("badnets",))
@click.option("--rate", type=float, help="Another rate than the usual one.")
@click.option("--epochs", default=100, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, len(TARGETS) - 1))
@click.option("--flip", is_flag=True, help="Mirror images at random while training.")
@click.option("--set", "changed", multiple=True, help="A setting of csc-gpu train; repeat.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where runs are kept.")
@click.option("--threads", default=0, help="Processor threads; 0 takes every core.")
@click.option("--cpu", is_flag=True, help="Train on the processor.")
def main(
    corpus: str,
    attacks: tuple[str, ...],
    rate: float | None,
    epochs: int,
    seed: int,
    flip: bool,
    changed: tuple[str, ...],
    work: Path,
    threads: int,
    cpu: bool,
) -> None:
    """Plain training and CSC on a poisoned CORPUS: detection, concealment and what it adds."""
    if not cpu:
        require_gpu()
    work.mkdir(parents=True, exist_ok=True)
    flags = [word for text in (f"train.epochs={epochs}", *changed) for word in ("--set", text)]
    flags += ["--flip"] if flip else []
    machine = ["--threads", threads, *(["--cpu"] if cpu else [])]
    lines: list[bench.Line] = []
    for attack in attacks:
        lines += run_attack(corpus, attack, rate or usual(attack)[1], work, seed, flags, machine)
    about = {"corpus": corpus, "flip": flip, "set": list(changed)}
    backend = results_file.elsewhere("cpu" if cpu else "gpu", threads)
    results_file.publish(about | bench.report("end-to-end", backend, lines))
    missed = [line["attack"] for line in lines if is_missed(line)]
    if missed:
        click.echo(f"nothing was found of: {', '.join(missed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
