"""Broken images that a run may put up with, found while all are read for the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from threading import Lock

from csc_gpu.errors import CorpusError

NAMED = 3
"""Broken images that an error names; it counts the others."""
Reason = tuple[str, str]
"""Path of a broken image, and why it is."""


class Tolerance:
    """Which rows of a corpus have proved broken, and how many may; the one value that changes.

    It is settled once every image has been read: what breaks later is an error, as it always is.
    """

    def __init__(
        self, most: int, log: Callable[..., None], held_out: Sequence[Reason] = ()
    ) -> None:
        """`held_out` are others that are known already; they count."""
        self.broken: dict[int, Reason] = {}  # by the row's id
        self.settled = False
        self._most, self._held_out = most, held_out
        self._log, self._lock = log, Lock()
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
        every = [*self.in_order(), *self._held_out]
        if len(every) > self._most:
            of_test = f", {len(self._held_out)} of them held out" if self._held_out else ""
            raise CorpusError(
                f"{named(every)} do not decode{of_test}: more than --max-bad {self._most} allows; "
                "replace them by sound ones of the same names, or allow more and go on with "
                "--resume"
            )

    def in_order(self) -> list[Reason]:
        """Those found so far, in the order of rows."""
        with self._lock:
            return [told for _, told in sorted(self.broken.items())]

    def settle(self, broken: dict[int, Reason]) -> None:
        """These it is, and no more."""
        self.broken, self.settled = broken, True
        self._told |= set(broken)


def listed(broken: Iterable[Reason]) -> tuple[str, ...]:
    """Each as the summary has it."""
    return tuple(f"{path}: {reason}" for path, reason in broken)


def named(broken: Sequence[Reason]) -> str:
    """The first few of these, and how many others."""
    some = ", ".join(f"{path} ({reason})" for path, reason in broken[:NAMED])
    return some + (f" and {len(broken) - NAMED} more" if len(broken) > NAMED else "")
