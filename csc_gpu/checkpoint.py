"""How far a run has come, on disk: after an end of any kind it goes on from there.

A record is one safetensors file, arrays with facts as JSON in its header; nothing in it is code. It
is written beside and put in place in one step, so that it is either the old record or the new one.
A training keeps its state so (train.py), the evidence and the verdict theirs (csc.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from csc_gpu.config import require
from csc_gpu.errors import CorpusError, Terminated

PATIENCE = 8.0
"""Seconds that a run asked to stop has to reach the end of a step; then it stops where it is."""
AGAIN = 0.5
"""Seconds until it is stopped once more: who survives any fault of an image survived that, too."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How often a run puts down how far it is."""

    minutes: float = 10.0
    """Most minutes between two checkpoints of a training; every epoch ends with one as well."""
    dates: bool = True
    """Go on only if the files of the corpus have the dates of then; false: a copy will do, if sizes
    and the images that are looked at are the same."""

    def __post_init__(self) -> None:
        require(self, "checkpoint", "above 0", lambda value: value > 0, "minutes")


@dataclass(frozen=True)
class Record:
    """What was put down under one name."""

    tensors: Mapping[str, torch.Tensor]  # on the CPU
    facts: Mapping[str, Any]  # JSON


class Held(dict[str, Any]):
    """What a record holds: asked for something else it raises CorpusError."""

    def __missing__(self, name: str) -> Any:
        raise damaged(f"it lacks {name!r}")


Kind = TypeVar("Kind", int, float, str, dict[str, Any])


def fact(record: Record, name: str, kind: type[Kind]) -> Kind:
    """What a record says under this name; raises CorpusError if that is of another kind."""
    value = record.facts[name]
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise damaged(f"its {name!r} is {str(value)[:40]!r}")


@contextmanager
def understood() -> Iterator[None]:
    """Raises CorpusError for a fault in a block that only takes a record apart."""
    try:
        yield
    except FAULTS as fault:
        raise damaged(" ".join(str(fault).split())[:200]) from fault


def damaged(why: str) -> CorpusError:
    """The error for a record that is one of ours, and cannot be gone on from."""
    return CorpusError(
        f"the checkpoint is damaged, or of another version ({why}); begin anew with --force"
    )


FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading arrays and facts of the wrong kind or shape may raise."""


def to_bytes(record: Record) -> bytes:
    """A record as one safetensors file."""
    whole = {key: tensor.cpu().contiguous() for key, tensor in record.tensors.items()}
    content: bytes = save(whole, metadata={"facts": json.dumps(record.facts)})
    return content


def from_bytes(content: bytes) -> Record:
    """What `to_bytes` made; else raises SafetensorError, or one of FAULTS."""
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")  # of the header, which safetensors has checked
    header = json.loads(content[8 : 8 + length])
    return Record(Held(tensors), Held(json.loads(header["__metadata__"]["facts"])))


def fingerprint(rows: NDArray[np.int64]) -> str:
    """Tells these rows (N,) from all others, for only the same may go on from a record."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]


class Checkpoints(Protocol):
    """Where a stage puts down how far it is, and finds what it put down before."""

    def load(self, name: str) -> Record | None:
        """The last record of that name; None if there is none."""

    def save(self, name: str, told: Callable[[], Record]) -> None:
        """Replace the record of that name. Raises Terminated if the run has been asked to stop."""

    def is_due(self) -> bool:
        """Whether the next moment at which the state is whole should be put down."""


class Nowhere:
    """Checkpoints of someone who keeps none."""

    def load(self, name: str) -> Record | None:
        """Nothing."""

    def save(self, name: str, told: Callable[[], Record]) -> None:
        """Not even told."""

    def is_due(self) -> bool:
        """Never."""
        return False


NOWHERE = Nowhere()


class Folder:
    """Checkpoints as files in a folder, which is made with the first of them."""

    def __init__(
        self, folder: Path, *, minutes: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.place, self._seconds, self._now = folder, 60 * minutes, now
        self._last = now()
        self._asked_to_stop = False

    def load(self, name: str) -> Record | None:
        """See Checkpoints. Raises CorpusError for a file that is none of ours."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            return from_bytes(path.read_bytes())
        except (OSError, SafetensorError, *FAULTS) as fault:
            raise CorpusError(
                f"cannot read the checkpoint {path}: {fault}; remove that file to do its part "
                "again, or begin anew with --force"
            ) from fault

    def save(self, name: str, told: Callable[[], Record]) -> None:
        """See Checkpoints. Raises OSError where the disk is full; the last record then stands."""
        content = to_bytes(told())
        self.place.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._last = self._now()
        if self._asked_to_stop:
            raise Terminated("terminated")

    def is_due(self) -> bool:
        """See Checkpoints."""
        return self._asked_to_stop or self._now() - self._last >= self._seconds

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """SIGTERM asks for a last record, and ends the work if PATIENCE runs out before that.

        Raises Terminated then; in threads other than the first nothing is heeded.
        """
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(number: int, frame: object) -> None:
            if not self._asked_to_stop:  # who asks again does not grant more time
                signal.setitimer(signal.ITIMER_REAL, PATIENCE, AGAIN)
            self._asked_to_stop = True

        def late(number: int, frame: object) -> None:
            raise Terminated("terminated")

        before = {
            kind: signal.signal(kind, do)
            for kind, do in ((signal.SIGTERM, asked), (signal.SIGALRM, late))
        }
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _path(self, name: str) -> Path:
        return self.place / f"{name}.safetensors"


class Following(Folder):
    """The checkpoints of a run that another process writes: read, and never written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, minutes=math.inf)

    def save(self, name: str, told: Callable[[], Record]) -> None:
        """The first rank does it."""

    def is_due(self) -> bool:
        """Never; a rank asked to stop waits for the first, which stops at its next record."""
        return False
