"""How far long work is: a bar and some lines on stderr, one JSON line an event in a file."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from tqdm import tqdm

from csc_gpu.board import Board
from csc_gpu.harmless import printable
from csc_gpu.train import Moment
from csc_gpu.types import Sighting

STATM = Path("/proc/self/statm")


class Pace:
    """How fast a training goes: seconds between its steps, without what is done in between."""

    def __init__(self) -> None:
        self._stage, self._last = "", 0.0
        self._images = self._seconds = 0.0

    def step(self, stage: str, at: Moment) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if stage == self._stage and self._last:
            self._images += at.rows / at.budget.steps_per_epoch
            self._seconds += now - self._last
        self._stage, self._last = stage, now

    def pause(self) -> None:
        """Something else took time: the next step begins a new measurement."""
        self._last = 0.0

    def images_per_second(self) -> float:
        """Since the last call; 0 if no step could be measured."""
        rate = self._images / self._seconds if self._seconds else 0.0
        self._images = self._seconds = 0.0
        return round(rate, 1)


def memory() -> dict[str, float]:
    """Bytes in use now, of main memory and of the GPU, where they can be told."""
    told: dict[str, float] = {}
    if STATM.exists():
        pages = int(STATM.read_text(encoding="ascii").split()[1])
        told["resident_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        told["gpu_bytes"] = torch.cuda.memory_allocated()
    return told


class Heard(logging.Handler):
    """Hands on what other libraries log as a warning; without a handler it would go to stderr."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """One message: who says it, and what."""
        self._tell(record.name, record.getMessage())


class Console:
    """A Log: call it with an event and its fields. Use it in a with-block.

    With `silent` nothing goes to stderr; the file and the board are written all the same. Warnings
    given meanwhile are told like everything else. A file that was long silent gets a line about
    what goes on, so that it can be told from a run that hangs.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        every: float = 5.0,
        pulse: float = 60.0,
        silent: bool = False,
        board: Board | None = None,
    ) -> None:
        self._file = file.open("a", encoding="utf-8") if file else None
        self._start = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._every = every  # seconds between two lines about epochs
        self._pulse = pulse  # seconds after which long work is worth a line in the file
        self._spoke = self._wrote = self._start
        self._silent, self._board = silent, board
        self._heard = Heard(self._tell_warning)
        self._pace = Pace()

    def __enter__(self) -> Console:
        self._before, warnings.showwarning = warnings.showwarning, self._warn
        logging.getLogger().addHandler(self._heard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        warnings.showwarning = self._before
        logging.getLogger().removeHandler(self._heard)
        self._close_bar()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def __call__(self, event: str, **fields: Any) -> None:
        """Tell one event; known ones are step, snapshot, stream, and done/total of anything."""
        if event == "step":
            self._step(fields["stage"], fields["at"])
        elif event == "snapshot":
            self._snapshot(fields["sighting"], fields.get("accuracy"))
        elif event == "stream":
            gigabytes = f"{fields['bytes'] / 1e9:.3f} GB of pixels, {fields['room'] / 1e9:.3f} GB"
            self.say(f"{gigabytes} free: the files are read in every epoch")
            self._write(event, **fields)
        elif "total" in fields:
            self._advance(event, fields["done"], fields["total"], "images")
            self._beat(event, fields["done"], fields["total"])
        else:
            self._write(event, **fields)

    def say(self, text: str) -> None:
        """A line for the user, above the bar."""
        if not self._silent:
            tqdm.write(printable(text), file=sys.stderr)

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """In place of warnings.showwarning."""
        self._tell_warning(category.__name__, str(message))

    def _tell_warning(self, kind: str, text: str) -> None:
        self.say(f"warning: {text}")
        self._write("warning", kind=kind, text=text)

    def _step(self, stage: str, at: Moment) -> None:
        steps = at.budget.steps_per_epoch
        self._pace.step(stage, at)
        self._advance(stage, at.step, at.budget.steps, "steps")
        if at.step % steps and at.step != at.budget.steps:
            self._beat(stage, at.step, at.budget.steps)
            return
        epoch, loss = round(at.epoch), float(at.loss)
        told = {"images_per_second": self._pace.images_per_second(), **memory()}
        self._write(stage, epoch=epoch, step=at.step, loss=loss, lr=at.lr, **told)
        if self._board:
            self._board.epoch(stage, at, told)
        now = time.perf_counter()
        if now - self._spoke < self._every and at.step < at.budget.steps:
            return
        self._spoke = now
        self.say(
            f"{stage}: epoch {epoch}/{at.budget.epochs}, step {at.step}/{at.budget.steps}, "
            f"loss {loss:.3f}, lr {at.lr:.4f}, {now - self._start:.0f} s"
        )

    def _snapshot(self, sighting: Sighting, accuracy: float | None) -> None:
        self._pace.pause()
        if self._board:
            self._board.snapshot(sighting)
        sizes = [len(clusters.size) for clusters in sighting.clusterings]
        self._write(
            "snapshot",
            epoch=sighting.epoch,
            accuracy=accuracy,
            min_samples=sighting.min_samples,
            scales=[clusters.scale for clusters in sighting.clusterings],
            eps=[clusters.eps for clusters in sighting.clusterings],
            clusters=sizes,
        )

    def _advance(self, what: str, done: int, total: int, unit: str) -> None:
        if self._bar is None or self._bar.desc != f"{what}: ":
            self._close_bar()
            quiet = self._silent or not sys.stderr.isatty()
            self._bar = tqdm(
                total=total, desc=what, unit=f" {unit}", leave=False, file=sys.stderr, disable=quiet
            )
            self._bar.desc = f"{what}: "
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close_bar()

    def _beat(self, what: str, done: int, total: int) -> None:
        """A line about long work, if there was none for long."""
        if time.perf_counter() - self._wrote >= self._pulse:
            self._write("progress", of=what, done=done, total=total, **memory())

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, event: str, **fields: Any) -> None:
        if self._file:
            self._wrote = time.perf_counter()
            seconds = round(self._wrote - self._start, 3)
            self._file.write(json.dumps({"event": event, "seconds": seconds, **fields}) + "\n")
            self._file.flush()
