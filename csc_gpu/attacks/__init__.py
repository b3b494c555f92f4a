"""Poisoning a corpus: the attacks by name, who is stamped with what, and the answer key."""

from csc_gpu.attacks.attack import Attack, Learned, Stamp, Whom
from csc_gpu.attacks.catalogue import ATTACKS
from csc_gpu.attacks.learnt import digests
from csc_gpu.attacks.poisoning import (
    ALL_TO_ALL,
    Plan,
    Trigger,
    poison,
    ready,
    renumbered,
    settings_of,
    target_class,
    target_classes,
)
from csc_gpu.attacks.preview import preview

__all__ = [
    "ALL_TO_ALL",
    "ATTACKS",
    "Attack",
    "Learned",
    "Plan",
    "Stamp",
    "Trigger",
    "Whom",
    "digests",
    "poison",
    "preview",
    "ready",
    "renumbered",
    "settings_of",
    "target_class",
    "target_classes",
]
