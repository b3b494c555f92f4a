"""What the commands of the benchmarks have in common: a fault is one line, and no GPU is said.

Quick to import: the commands of the study start no torch to say what they take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from csc_gpu.cli import Failure
from csc_gpu.errors import BackendUnavailable, CscError


class Command(click.Command):
    """Turns what a user can mend into one line and exit status 2, as csc-gpu does."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CscError as fault:
            raise Failure(" ".join(str(fault).split())) from fault


class Commands(click.Group):
    """Several of them under one name."""

    command_class = Command


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there.

    Raises Failure for another file: one line, also in a command that is none of ours.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [dict(json.loads(line)) for line in text.splitlines()]
    except (OSError, ValueError, TypeError) as fault:
        raise Failure(f"{path} is no file of results, one JSON line each: {fault}") from fault


def require_gpu() -> None:
    """Raises BackendUnavailable, which names all that the GPU backend lacks here."""
    from csc_gpu.backend import doctor

    lacks = doctor.missing_for_gpu()
    if lacks:
        told = "; ".join(f"{lack.what} ({lack.remedy})" for lack in lacks)
        raise BackendUnavailable(f"this needs a GPU: {told}")
