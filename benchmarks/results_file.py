"""The one place that names and writes dated results. A file is never edited, nor replaced."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from csc_gpu import bench, run
from csc_gpu.backend import Decoder, usable_cores

RESULTS = Path(__file__).parent / "results"
COMMIT = "CSC_GPU_COMMIT"
"""Environment variable that names the commit where a copy of the tree runs without its history."""


@dataclass(frozen=True)
class _Elsewhere:
    name: str
    decoder: Decoder


def elsewhere(name: str, threads: int = 0) -> Any:
    """What bench.report wants to know of the backend "cpu" or "gpu" of other processes."""
    device = torch.device("cpu" if name == "cpu" else "cuda")
    return _Elsewhere(name, Decoder(device, threads or usable_cores()))


def save(report: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a report of bench.report as `YYYY-MM-DD-<bench>-<device>.json`; where it lies.

    `folder` is $OUT if that is set, else benchmarks/results. A second report of the same day ends
    in -2, the next in -3. Raises OutputError if the folder cannot be written to.
    """
    folder = folder or Path(os.environ.get("OUT") or RESULTS)
    report = dict(report)
    if report["commit"] == "unknown":
        report["commit"] = os.environ.get(COMMIT) or "unknown"
    stem = f"{report['date'][:10]}-{slug(report['bench'])}-{slug(device(report))}"
    text = json.dumps(run.plain(report), indent=1, allow_nan=False) + "\n"
    with run.writing(folder / stem):
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                continue
            return path
    raise AssertionError("unreachable: every number is tried")


def publish(report: Mapping[str, Any]) -> Path:
    """Print the table and write the file; where it lies."""
    click.echo(bench.table(report["lines"]))
    path = save(report)
    click.echo(f"written: {path}")
    return path


def device(report: Mapping[str, Any]) -> str:
    """The GPU's name, or the processor's where the work was done there."""
    machine: Mapping[str, str] = report["machine"]
    return machine["gpu" if report["backend"] == "gpu" else "processor"]


def slug(name: str) -> str:
    """Letters and digits in lower case, with a dash for anything else."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"
