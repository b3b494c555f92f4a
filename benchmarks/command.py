"""What the commands of the benchmarks have in common: a fault is one line, and no GPU is said."""

from __future__ import annotations

from typing import Any

import click

from csc_gpu.backend import doctor
from csc_gpu.cli import Failure
from csc_gpu.errors import BackendUnavailable, CscError


class Command(click.Command):
    """Turns what a user can mend into one line and exit status 2, as csc-gpu does."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CscError as fault:
            raise Failure(" ".join(str(fault).split())) from fault


def require_gpu() -> None:
    """Raises BackendUnavailable, which names all that the GPU backend lacks here."""
    lacks = doctor.missing_for_gpu()
    if lacks:
        told = "; ".join(f"{lack.what} ({lack.remedy})" for lack in lacks)
        raise BackendUnavailable(f"this needs a GPU: {told}")
