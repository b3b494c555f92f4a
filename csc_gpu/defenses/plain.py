"""Ordinary training, no defense: the control of every comparison."""

from __future__ import annotations

from typing import Any

from csc_gpu import csc
from csc_gpu.backend import Backend
from csc_gpu.defenses.course import Course
from csc_gpu.types import DefenderView, Outcome

Settings = csc.Common


def defend(view: DefenderView, settings: Settings, backend: Backend, **how: Any) -> Outcome:
    """Train as CSC does, and look at nothing."""
    course = Course(view, settings, backend, **how)
    model = course.trained()
    return course.outcome(model, model)
