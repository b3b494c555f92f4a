"""Everything that only a GPU can show, in eight minutes: `make gpu-check`.

Each step is a process of its own with its own time limit, and writes its dated result. A step that
fails, or is stopped, does not stop the rest. Exit status 1 if any failed, 2 without a GPU.

CSC_GPU_CORPUS may name a folder of image files: then loaders are measured, and the shortened end to
end runs on it and not on the embedded digits.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import results_file
from benchmarks.command import Command, require_gpu
from csc_gpu import bench

CORPUS = "CSC_GPU_CORPUS"
ALL = 450.0
"""Seconds for all steps; what starts and ends them takes a little more."""
LEAST = 10.0
"""Seconds below which no step is begun."""
EPOCHS = 12
"""Of the shortened end to end; csc-gpu trains at least train.min_steps all the same."""
KEPT = 4000
"""Characters kept of the end of a failed step's output."""


@dataclass(frozen=True)
class Step:
    """One process of the check."""

    name: str
    words: tuple[str, ...]  # after `python -m`
    limit: float  # seconds
    must_say: str = ""  # a pattern without which success is not believed
    skip: str = ""  # why it cannot run here


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    outcome: str  # ok, failed or skipped
    why: str
    seconds: float = 0.0
    output: str = ""  # the end of what it printed


def steps(corpus: str, work: str) -> list[Step]:
    """The check, in its order; `work` is a folder to train in."""
    no_corpus = "" if Path(corpus).is_dir() and corpus else f"{CORPUS} names no folder of images"
    source = "digits" if no_corpus else corpus
    passed = r"\d+ passed"
    return [
        Step("tests", ("pytest", "-q", "-m", "gpu", "-W", "default", "tests/gpu"), 130, passed),
        Step("traffic", ("benchmarks.traffic",), 60),
        Step("conceal", ("benchmarks.conceal", "--repeats", "2"), 75),
        Step("clustering", ("benchmarks.clustering", "--budget", "60"), 95),
        Step(
            "loader",
            ("benchmarks.loader", corpus, "--budget", "45", "--repeats", "1"),
            75,
            skip=no_corpus,
        ),
        Step(
            f"end to end, {EPOCHS} epochs (or train.min_steps) of {Path(source).name}",
            ("benchmarks.end_to_end", source, "--epochs", str(EPOCHS), "--work", work),
            ALL,  # what is left
        ),
    ]


def run_step(step: Step, left: float) -> Ended:
    """Run a step within its limit and what is left, in seconds; what overruns is stopped."""
    if step.skip:
        return Ended("skipped", step.skip)
    limit = min(step.limit, left)
    if limit < min(LEAST, step.limit):
        return Ended("skipped", f"{max(left, 0.0):.0f} s are left of {ALL:.0f} s")
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.words],
            stdout=printed,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, to be stopped with its children
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _stop(process)
        printed.seek(0)
        output = printed.read()
    seconds = time.perf_counter() - start
    if status is None:
        return Ended("failed", f"stopped after its limit of {limit:.0f} s", seconds, output[-KEPT:])
    if status:
        why = f"exit status {status}: {last_line(output)}"
        return Ended("failed", why, seconds, output[-KEPT:])
    if not re.search(step.must_say, output):
        why = f"{last_line(output)} (there is no {step.must_say!r} in it)"
        return Ended("failed", why, seconds, output[-KEPT:])
    return Ended("ok", last_line(output), seconds)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a step that still runs, with its children: its group bears its id."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(output: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def run_all(every: Sequence[Step], seconds: float) -> Iterator[bench.Line]:
    """Run the steps within so many seconds; a line for each as it ends."""
    end = time.perf_counter() + seconds
    for step in every:
        ended = run_step(step, end - time.perf_counter())
        line: bench.Line = {"step": step.name, "outcome": ended.outcome, "seconds": ended.seconds}
        yield line | {"why": ended.why, "output": ended.output}


@click.command(cls=Command)
def main() -> None:
    """All tests and benchmarks that need a GPU, in eight minutes."""
    require_gpu()
    lines: list[bench.Line] = []
    try:
        with tempfile.TemporaryDirectory() as work:
            for line in run_all(steps(os.environ.get(CORPUS, ""), work), ALL):
                click.echo("{step}: {outcome}, {seconds:.0f} s, {why}".format(**line))
                lines.append(line)
    finally:
        backend = results_file.elsewhere("gpu")
        path = results_file.save(bench.report("gpu-check", backend, lines))
        click.echo(f"written: {path}")
    sys.exit(int(any(line["outcome"] == "failed" for line in lines)))


if __name__ == "__main__":
    main()
