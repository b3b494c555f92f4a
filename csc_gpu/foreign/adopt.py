"""A foreign set made ours: shuffled, named by row alone, and with the key that an evaluator needs.

Row numbers tell on poison: BackdoorBench's training-controlled attacks put it where batches begin.
So rows are shuffled by a recorded seed, numpy.random.default_rng(seed).permutation(N), and numbered
anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from csc_gpu.attacks import ALL_TO_ALL, ATTACKS, Plan, Trigger, digests, ready, renumbered
from csc_gpu.errors import ConfigError
from csc_gpu.foreign.found import UNKNOWN, Found, Labels, Triggered
from csc_gpu.types import AnswerKey, Corpus, Split

COMPARED = 256
"""Poisoned rows on which a trigger is tried."""


def stamped(found: Found, plan: Plan, settings: Any) -> Found:
    """The same set with its clean test images stamped by one of our attacks.

    The plan's target and rate are those of the set; its attack `none` leaves the set as it is.
    Raises ConfigError where that cannot be the trigger the set was poisoned with.
    """
    attack = ATTACKS[plan.attack]
    if attack.labels == "none":
        return found
    if found.triggered is not None:
        raise ConfigError("the set stores its triggered test images; leave --attack out")
    if found.clean is None:
        raise ConfigError("--attack stamps the clean test images; give them with --clean")
    if attack.learns(settings):
        raise ConfigError(f"{plan.attack} learns its trigger, and the set does not hold what it is")
    targets, share = _targets(found), float(found.is_poison.mean())
    if not 0 < share < 1:
        raise ConfigError("--attack needs a set of which some rows are poison, not all or none")
    if attack.only_all_to_all and not _is_all_to_all(found):
        names = ", ".join(found.classes[target] for target in targets)
        raise ConfigError(
            f"{plan.attack} turns each class into the next; the set's poison does not: its labels "
            f"are {names}"
        )
    if len(targets) > 1 and not _is_all_to_all(found):
        raise ConfigError(f"the poison has {len(targets)} labels: which trigger is whose?")
    target = ALL_TO_ALL if len(targets) > 1 else found.classes[targets[0]]
    trigger = ready(found.clean, replace(plan, target=target, rate=share), settings)
    if plan.attack in found.stamps:
        own = found.stamps[plan.attack]
        trigger = replace(trigger, attack=replace(trigger.attack, stamp=own, test=own))
    test = found.clean.test
    wanted = trigger.aims(test.labels, found.classes)
    hit = wanted >= 0
    images = trigger.test(test.images[hit], wanted[hit]) if hit.any() else test.images[hit]
    notes = {**found.notes, "trigger_off": _distances(found, found.clean.train, trigger)}
    return replace(found, triggered=Triggered(images, wanted), notes=notes)


def _distances(found: Found, clean: Corpus, trigger: Trigger) -> dict[str, float]:
    """How far clean rows are from the set's poison, as they are and once stamped, in grey levels.

    The mean over pixels of the first poisoned rows; a trigger that is the set's brings them nearer.
    {} if the clean images are not known.
    """
    seen = clean.images.any(axis=(1, 2, 3))  # what `export-corpus` calls clean is black there
    rows = np.flatnonzero(found.is_poison & seen)[:COMPARED]
    if not len(rows):
        return {}
    theirs = found.images[rows].astype(np.float32)
    ours = {"clean": clean.images[rows], "stamped": clean.images[rows]}
    ours["stamped"] = trigger.poison(ours["stamped"], found.labels[rows])
    return {name: float(np.abs(images - theirs).mean()) for name, images in ours.items()}


def adopt(
    found: Found, plan: Plan, settings: Any, origin: Mapping[str, Any]
) -> tuple[Split, AnswerKey]:
    """The corpus as a defender sees it, and its key, shuffled by the plan's seed.

    `origin` says in the recipe where the set is from.
    """
    order = np.random.default_rng(plan.seed).permutation(len(found.labels))
    train = renumbered(_corpus(found, order), "train")
    held = found.test
    if held is None and found.clean is not None:
        held = found.clean.test
    if held is None:
        held = Corpus(np.zeros(0, np.int64), found.classes, np.arange(0), (), found.images[:0])
    test = renumbered(held, "test")
    triggered = found.triggered or Triggered(test.images[:0], np.full(len(test), UNKNOWN, np.int64))
    key = AnswerKey(
        is_poison=found.is_poison[order],
        is_cover=found.is_cover[order],
        orig_labels=found.orig_labels[order],
        given_labels=train.labels,
        paths=train.paths,
        test=test.images,
        triggered=triggered.images,
        test_labels=test.labels,
        attack_labels=triggered.attack_labels,
        recipe=_recipe(found, plan, settings, len(test))
        | {"source": {**origin, "shuffled_by": plan.seed, **found.notes}},
    )
    return Split(train, test), key


def _recipe(found: Found, plan: Plan, settings: Any, n_test: int) -> dict[str, Any]:
    """As `csc-gpu poison` writes it; what the set does not tell is null."""
    labels, true, poison = found.labels, found.orig_labels, found.is_poison
    targets, known = _targets(found), true != UNKNOWN
    told = plan.attack != "none" or not poison.any()
    return {
        "attack": plan.attack if told else None,
        "settings": asdict(settings),
        "sha256": digests(settings),
        "target": targets[0] if len(targets) == 1 else targets,
        "target_name": ", ".join(found.classes[target] for target in targets),
        "all_to_all": _is_all_to_all(found),
        "seed": plan.seed,
        "rate": float(poison.mean()),
        "rate_of_target": None,
        "label_noise": None,
        "counts": {
            "rows": len(labels),
            "poison": int(poison.sum()),
            "covers": int(found.is_cover.sum()),
            "pool": None,
            "mislabelled": int((~poison & known & (labels != true)).sum()),
            "target_class_before": int(np.isin(true, targets).sum()) if known.all() else None,
            "target_class_after": int(np.isin(labels, targets).sum()),
            "test": n_test,
        },
    }


def _targets(found: Found) -> list[int]:
    """The labels that poison has."""
    return [int(label) for label in np.unique(found.labels[found.is_poison])]


def _is_all_to_all(found: Found) -> bool:
    """Whether poison has the label next to its own, of more than one class."""
    before, now = found.orig_labels[found.is_poison], found.labels[found.is_poison]
    to_the_next = (before != UNKNOWN) & (now == (before + 1) % len(found.classes))
    return len(_targets(found)) > 1 and bool(to_the_next.all())


def _corpus(found: Found, rows: Labels) -> Corpus:
    return Corpus(
        found.labels[rows], found.classes, rows, ("",) * len(rows), pixels=found.images[rows]
    )
