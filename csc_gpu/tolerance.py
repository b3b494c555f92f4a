"""Broken images that a run may put up with, found while all are read for the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock

from csc_gpu.errors import CorpusError

NAMED = 3
"""Broken images that an error names; it counts the others."""


class Tolerance:
    """Which rows of a corpus have proved broken, and how many may; the one value that changes.

    It is settled once every image has been read: what breaks later is an error, as it always is.
    """

    def __init__(self, most: int, log: Callable[..., None]) -> None:
        self.broken: dict[int, tuple[str, str]] = {}  # by the row's id: path and reason
        self.settled = False
        self._most, self._log, self._lock = most, log, Lock()
        self._told: set[int] = set()

    def note(self, row: int, path: str, reason: str) -> None:
        """This one is broken; threads that read ahead may say so, and more than once."""
        with self._lock:
            self.broken.setdefault(row, (path, reason))

    def require_few(self) -> None:
        """Log those that are new; raises CorpusError if there are too many."""
        with self._lock:
            new = sorted(self.broken.keys() - self._told)
        for row in new:
            path, reason = self.broken[row]
            self._log("broken", image=path, reason=reason)
        self._told |= set(new)
        require_few(self.in_order(), self._most)

    def in_order(self) -> list[tuple[str, str]]:
        """Path and reason of those found so far, in the order of rows."""
        with self._lock:
            return [told for _, told in sorted(self.broken.items())]

    def settle(self, broken: dict[int, tuple[str, str]]) -> None:
        """These it is, and no more."""
        self.broken, self.settled = broken, True
        self._told |= set(broken)


def listed(broken: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Each as the summary has it."""
    return tuple(f"{path}: {reason}" for path, reason in broken)


def require_few(broken: list[tuple[str, str]], most: int) -> None:
    """Raises CorpusError if more images, (path, reason) each, are broken than --max-bad allows."""
    if len(broken) > most:
        raise CorpusError(
            f"{named(broken)} do not decode, more than --max-bad {most} allows; replace them by "
            "sound ones of the same names, or allow more and go on with --resume"
        )


def named(broken: list[tuple[str, str]]) -> str:
    """The first few of these, and how many others."""
    some = ", ".join(f"{path} ({reason})" for path, reason in broken[:NAMED])
    return some + (f" and {len(broken) - NAMED} more" if len(broken) > NAMED else "")
