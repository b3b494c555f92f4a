"""A run killed at moments drawn at random and resumed: is its end that of the uninterrupted one?

    python -m benchmarks.kill CORPUS --work FOLDER --kills 20
    python -m benchmarks.kill CORPUS --work FOLDER --stage conceal --set conceal.epochs=400

Moments are drawn over the whole run, or over one stage of it, so that a short one is hit too.
Every killed run is started with --resume until it has ended; its suspects and weights are compared
bit by bit with those of one run that nobody disturbed. One JSON line a run.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from safetensors.torch import load_file

from csc_gpu.run import commit

RESULTS = Path(__file__).parent / "results" / "kill.jsonl"
COMPARED = ("suspects.csv", "clusters.csv", "model.safetensors", "undefended.safetensors",
            "recovered.safetensors")  # fmt: skip


def started(corpus: str, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """csc-gpu train as a process of its own, on one core."""
    words = ["train", corpus, "--out", str(out), "--cpu", "--threads", "1", "--recover", *more]
    words += ["--no-report"]
    # often enough that some kills fall into the writing of a checkpoint
    words += ["--set", "checkpoint.minutes=0.002"]
    log = out.with_name(out.name + ".log").open("ab")
    return subprocess.Popen([sys.executable, "-m", "csc_gpu", *words], stdout=log, stderr=log)


def hashes(folder: Path) -> dict[str, str]:
    """What is compared, file by file: bytes of tables, names and numbers of weights."""
    found = {}
    for name in COMPARED:
        content = hashlib.sha256()
        if name.endswith(".safetensors"):  # the order of its header is not fixed
            for key, value in sorted(load_file(folder / name).items()):
                content.update(key.encode() + value.numpy().tobytes())
        else:
            content.update((folder / name).read_bytes())
        found[name] = content.hexdigest()
    return found


@click.command()
@click.argument("corpus")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where runs lie.")
@click.option("--kills", default=20, show_default=True, help="Moments to kill at.")
@click.option("--each", default=1, show_default=True, help="Kills of one run.")
@click.option("--seed", default=0, show_default=True, help="Draws the moments.")
@click.option("--stage", default="", help="Kill in this stage alone, as log.jsonl names it.")
@click.option("--set", "changes", multiple=True, help="A setting of csc-gpu train; repeat.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    corpus: str,
    work: Path,
    kills: int,
    each: int,
    seed: int,
    stage: str,
    changes: tuple[str, ...],
    out: Path,
) -> None:
    """Kill and resume, and compare."""
    rng, whole = random.Random(seed), work / "whole"
    more = [word for change in changes for word in ("--set", change)]
    work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if started(corpus, whole, "--force", *more).wait():
        raise click.ClickException(f"the undisturbed run failed: {whole}.log")
    took = time.perf_counter() - start
    lasts = spell(whole / "log.jsonl", stage) if stage else took
    wanted, equal, hit = hashes(whole), 0, 0
    for number in range(-(-kills // each)):
        place = work / f"killed-{number}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(place.with_name(place.name + ".partial"), ignore_errors=True)
        moments, stages, left = [], [], lasts
        told = place.with_name(place.name + ".partial") / "log.jsonl"
        for _ in range(each):
            moments.append(round(rng.uniform(0, left), 3))
            begun = told.stat().st_size if told.exists() else 0  # what earlier starts told
            process = started(corpus, place, "--resume", *more)
            try:
                while stage and not events(told, stage, begun) and process.poll() is None:
                    time.sleep(0.002)
                process.wait(moments[-1])
                break  # it had less to do than we thought
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            stages.append(furthest(told, begun))
            left = max(lasts - sum(moments), lasts / 4)
        status = started(corpus, place, "--resume", *more).wait()
        same = status == 0 and hashes(place) == wanted
        hit += bool(stages)
        equal += same and bool(stages)
        line = {"killed_after_s": moments, "of": stage or "run", "set": list(changes),
                "in": stages, "status": status, "equal": same,
                "whole_run_s": round(took, 1), "corpus": Path(corpus).name, "commit": commit(),
                "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(f"killed after {moments} s, in {stages}: {'equal' if same else 'DIFFERENT'}")
    click.echo(
        f"{equal} of {hit} killed runs equal the undisturbed one; the others had ended before"
    )
    sys.exit(not hit or equal != hit)


def lines(log: Path, begun: int) -> list[dict[str, Any]]:
    """What the start of a run told whose log began at this byte; a line half written is none."""
    if not log.exists():
        return []
    whole = log.read_bytes()[begun:].rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def events(log: Path, stage: str, begun: int = 0) -> list[float]:
    """When a start told of a stage, in seconds from its beginning."""
    return [line["seconds"] for line in lines(log, begun) if line["event"] == stage]


def spell(log: Path, stage: str) -> float:
    """Seconds from the first word of a stage to the last."""
    told = events(log, stage)
    if not told:
        raise click.BadParameter(f"no stage {stage!r} in {log}", param_hint="--stage")
    return told[-1] - told[0]


def furthest(log: Path, begun: int) -> str:
    """The last event that a start told, and where in it."""
    told = lines(log, begun)
    if not told:
        return "before training"
    last = told[-1]
    return f"{last['event']} {last.get('epoch', '')}".strip()


if __name__ == "__main__":
    main()
