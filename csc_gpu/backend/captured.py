"""A step recorded once and replayed: the same signature and the same updates as the step itself.

The first calls run the step as it is, so that libraries and the optimiser's state are set up; they
count as steps, for they move the weights. The next call records, which computes nothing, and
replays; so does every later one, from static tensors. Whoever wants to keep a result clones it:
the next replay overwrites it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from csc_gpu.backend import Step

EAGER_CALLS = 1
"""Calls that run before the recording."""


class Graphs(Protocol):
    """What a driver can do with work of fixed shapes and addresses."""

    def aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Do the work where it may be recorded later; its result is ready for the caller."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
        """Record without computing: the result's place, and what computes it again."""


class Captured:
    """A Step. Raises ValueError for other shapes or dtypes than at the first call."""

    def __init__(self, step: Step, graphs: Graphs) -> None:
        self._step = step
        self._graphs = graphs
        self._calls = 0
        self._inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self._result: torch.Tensor | None = None
        self._replay: Callable[[], object] | None = None

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The step on these tensors."""
        if self._inputs is None:
            self._inputs = first.clone(), second.clone()
        else:
            for static, given in zip(self._inputs, (first, second), strict=True):
                _refuse_other_shape(static, given)
                static.copy_(given)
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            return self._graphs.aside(self._work)
        if self._replay is None:
            self._result, self._replay = self._graphs.record(self._work)
        self._replay()
        assert self._result is not None
        return self._result

    def _work(self) -> torch.Tensor:
        assert self._inputs is not None
        return self._step(*self._inputs)


def _refuse_other_shape(static: torch.Tensor, given: torch.Tensor) -> None:
    """copy_ would broadcast or convert in silence."""
    if static.shape != given.shape or static.dtype != given.dtype:
        raise ValueError(
            f"recorded with {tuple(static.shape)} {static.dtype}, "
            f"called with {tuple(given.shape)} {given.dtype}"
        )
