"""The whole defense from Python in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csc_gpu import csc, sources
from csc_gpu.backend import open_backend
from csc_gpu.config import override
from csc_gpu.types import DefenderView, Log, Outcome, quiet


def defend(
    source: Path | str,
    *,
    cpu: bool = False,
    threads: int = 0,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    log: Log = quiet,
) -> Outcome:
    """Train on a possibly poisoned source, as csc-gpu train does; nothing is written.

    `changes` are settings by name, as {"train.model": "resnet18"}. Rows are those of the source's
    training part, and outcome.suspects names their files. Raises a CscError that says what is wrong
    with the source, a setting or the machine.
    """
    settings = override(csc.Settings(), dict(changes or {}))
    backend = open_backend("cpu" if cpu else "gpu", threads, settings.gpu)
    if not settings.train.model:
        settings = override(settings, {"train.model": backend.usual_model})
    split = sources.load(str(source), settings.data, backend=backend, log=log)
    return csc.defend(DefenderView(split.train), settings, backend, seed=seed, log=log)
