"""Poisoning a corpus: who is stamped, with what label, and the answer key that says so."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.attacks.attack import Attack, Learned, Pixels, Stamp, Whom
from csc_gpu.attacks.catalogue import ATTACKS
from csc_gpu.attacks.learnt import digests, learnt
from csc_gpu.backend import Backend
from csc_gpu.config import names, override, parse_change
from csc_gpu.errors import ConfigError
from csc_gpu.files import Files
from csc_gpu.types import AnswerKey, Corpus, Log, Mask, Split, quiet

Labels = NDArray[np.int64]
ALL_TO_ALL, USUAL_TARGET = "all", "0"
"""Words for --target; the second is its default."""
LABEL_NOISE, COVERS, STAMPS, COVER_STAMPS, TEST_STAMPS = 1, 2, 3, 4, 5
"""Tell the random numbers of these from those that choose the poison."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to poison: one of two rates, the target and the seed."""

    attack: str
    target: str  # a class; several, a,b,...: each with a trigger of its own; all: y becomes y + 1
    rate: float | None = None  # share of all training rows
    rate_of_target: float | None = None  # share of the target class's rows
    label_noise: float = 0.0  # share of the other rows that get a random false label
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS:
            near = difflib.get_close_matches(self.attack, ATTACKS, n=1)
            said = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ATTACKS)}"
            raise ConfigError(f"unknown attack {self.attack!r}; {said}")
        if (self.rate is None) == (self.rate_of_target is None):
            raise ConfigError("give one of --rate and --rate-of-target")
        for name in ("rate", "rate_of_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be above 0 and below 1, got {value}")
        if not 0 <= self.label_noise < 1:
            raise ConfigError(f"--label-noise must be in [0, 1), got {self.label_noise}")


def settings_of(attack: str, options: Sequence[str] = (), picture: str = "", mask: str = "") -> Any:
    """The attack's settings, with `name=value` options, a trigger picture and its mask put in."""
    if ATTACKS[attack].labels == "none":
        return ATTACKS[attack].settings()  # the control takes every attack's options
    changes = dict(map(parse_change, options))
    usual = ATTACKS[attack].settings()
    for name, option, path in (("picture", "--trigger", picture), ("mask", "--mask", mask)):
        if path and name not in names(usual):
            several = f"{name}s" in names(usual)
            instead = f'give --option {name}s=["a.png",...]' if several else f"leave {option} out"
            raise ConfigError(f"{attack} takes no trigger {name}; {instead}")
        changes |= {name: path} if path else {}
    try:
        return override(usual, changes)
    except ConfigError as fault:
        raise ConfigError(f"attack {attack}: {fault}") from fault


@dataclass(frozen=True)
class Trigger:
    """An attack made ready: what it stamps on whom, for which targets."""

    attack: Attack
    plan: Plan
    how: Any  # the attack's settings, or Learned
    targets: tuple[int, ...]

    @property
    def settings(self) -> Any:
        """The attack's settings."""
        return self.how.settings if isinstance(self.how, Learned) else self.how

    @property
    def whom(self) -> Whom:
        """Which rows it takes."""
        return self.attack.whom(self.settings)

    @property
    def is_all_to_all(self) -> bool:
        """Whether every class is turned into the next one."""
        return self.plan.target == ALL_TO_ALL and len(self.targets) > 1

    def aims(self, true: Labels, classes: tuple[str, ...]) -> Labels:
        """The label wanted for images of these true labels; -1: not under attack. (B,) -> (B,)

        Several targets take turns; all-to-all wants the next label.
        """
        if self.attack.labels == "none":
            return np.full(len(true), -1, np.int64)
        if self.is_all_to_all:
            wanted = (true + 1) % len(self.targets)
        else:
            wanted = np.array(self.targets)[np.arange(len(true)) % len(self.targets)]
        return np.where(self.comes_from(true, classes), wanted, -1)

    def comes_from(self, true: Labels, classes: tuple[str, ...]) -> Mask:
        """Which rows are of a class that the attack takes its poison from. (B,)"""
        sources = [target_class(name, classes, "source") for name in self.whom.sources]
        return np.isin(true, sources or np.arange(len(classes)))

    def may_take(self, corpus: Corpus) -> Mask:
        """The rows that its poison may be drawn from. (N,)

        Dirty-label poison comes from all classes but the target: a row of the target would keep its
        label. Fight-Poison-With-Poison and BackdoorBench draw from all, so that of their poison
        about 1 in C is labelled truly, and at one rate ours is that much stronger.
        """
        is_target = np.isin(corpus.labels, self.targets)
        pool = is_target if self.attack.labels == "clean" else ~is_target
        if self.is_all_to_all or self.attack.labels == "none":
            pool = np.ones(len(corpus), bool)
        return pool & self.comes_from(corpus.labels, corpus.classes)

    def poison(self, images: Pixels, wanted: Labels) -> Pixels:
        """Training images with the trigger of the label wanted for each. (B, H, W, 3)"""
        return self._stamped(self.attack.stamp, images, wanted, STAMPS)

    def test(self, images: Pixels, wanted: Labels) -> Pixels:
        """Held-out images with the trigger of the label wanted for each. (B, H, W, 3)"""
        return self._stamped(self.attack.test or self.attack.stamp, images, wanted, TEST_STAMPS)

    def cover(self, images: Pixels) -> Pixels:
        """Training images that carry the trigger, or what is like it, and their true label."""
        rng = np.random.default_rng((self.plan.seed, COVER_STAMPS))
        return (self.attack.cover or self.attack.stamp)(images, self.how, rng)

    def _stamped(self, stamp: Stamp, images: Pixels, wanted: Labels, kind: int) -> Pixels:
        """All-to-all has one trigger for all; several targets have one each: variants."""
        rng = np.random.default_rng((self.plan.seed, kind))
        if len(self.targets) == 1 or self.is_all_to_all:
            return stamp(images, self.how, rng)
        out = images.copy()
        for number, target in enumerate(self.targets):
            mine = wanted == target
            out[mine] = stamp(images[mine], self.how.variant(number), rng)
        return out


def ready(
    split: Split,
    plan: Plan,
    settings: Any = None,
    backend: Backend | None = None,
    log: Log = quiet,
) -> Trigger:
    """The attack's trigger for a corpus; one that has to be learnt is learnt now, on the backend.

    Raises ConfigError for targets that the corpus or the attack does not have.
    """
    attack = ATTACKS[plan.attack]
    settings = attack.settings() if settings is None else settings
    if attack.only_all_to_all:
        if plan.target not in (ALL_TO_ALL, USUAL_TARGET):
            raise ConfigError(f"{plan.attack} turns each class into the next; leave --target out")
        plan = replace(plan, target=ALL_TO_ALL)
    targets = target_classes(plan.target, split.train.classes, attack)
    _require_apart(plan.attack, attack.whom(settings), targets, split.train.classes)
    several = len(targets) > 1 and plan.target != ALL_TO_ALL
    if several and not hasattr(settings, "variant"):
        raise ConfigError(f"{plan.attack} has one trigger, so one target; give one class")
    if not attack.learns(settings):
        return Trigger(attack, plan, settings, targets)
    if len(targets) > 1:
        raise ConfigError(f"{plan.attack} learns the trigger of one target; give one class")
    if backend is None:
        raise ConfigError(f"{plan.attack} learns its trigger first and needs a machine for that")
    tensors = learnt(
        plan.attack, attack, split.train, targets[0], settings, backend, plan.seed, log
    )
    return Trigger(attack, plan, Learned(settings, tensors, targets[0]), targets)


def _require_apart(
    name: str, whom: Whom, targets: tuple[int, ...], classes: tuple[str, ...]
) -> None:
    """Raises ConfigError where a source, a class of covers or a target is another of these, too."""
    roles = {
        "source": [target_class(each, classes, "source") for each in whom.sources],
        "cover class": [target_class(each, classes, "cover class") for each in whom.bystanders],
        "target": list(targets if whom.sources or whom.bystanders else ()),
    }
    for (one, mine), (other, theirs) in itertools.combinations(roles.items(), 2):
        for label in set(mine) & set(theirs):
            raise ConfigError(
                f"{name}: class {classes[label]!r} is a {one} and a {other}; "
                "give --target, --option source= and --option cover_classes= that differ"
            )


def target_classes(target: str, classes: tuple[str, ...], attack: Attack) -> tuple[int, ...]:
    """The labels that the attacker wants: one, several, or all of them.

    Raises ConfigError for a stranger, a class given twice, or several where labels stay true.
    """
    if target == ALL_TO_ALL and target not in classes:
        wanted = tuple(range(len(classes)))
    else:
        parts = (target,) if target in classes else tuple(target.split(","))
        wanted = tuple(target_class(part, classes) for part in parts)
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"target {target!r} names a class twice")
    if len(wanted) > 1 and attack.labels == "clean":
        raise ConfigError("a clean-label attack has one target; its rows keep their label")
    return wanted


def target_class(target: str, classes: tuple[str, ...], role: str = "target") -> int:
    """The label of a class given by its name or, failing that, by its index in the list."""
    if target in classes:
        return classes.index(target)
    if target.isdecimal() and int(target) < len(classes):
        return int(target)
    raise ConfigError(
        f"{role} {target!r} is no class of this corpus: "
        f"give 0..{len(classes) - 1} or one of {', '.join(classes[:12])}"
        + (", ..." if len(classes) > 12 else "")
    )


def poison(split: Split, trigger: Trigger) -> tuple[Split, AnswerKey]:
    """Stamp and relabel some rows, shuffle all; the corpus to train on and the key to it.

    Rows of the result are numbered anew, so that neither order nor number gives poison away.
    """
    attack, plan, true = trigger.attack, trigger.plan, split.train.labels
    classes = split.train.classes
    rng = np.random.default_rng(plan.seed)
    poisoned, pool = _poisoned(split.train, trigger, rng)
    order = rng.permutation(len(split.train))
    covers = _covers(split.train, trigger, ~poisoned, round(trigger.whom.covers * poisoned.sum()))

    labels, pixels = true.copy(), split.train.images.copy()
    if attack.labels != "none":
        labels[poisoned] = trigger.aims(true[poisoned], classes)
        stamped = trigger.poison(pixels[poisoned], labels[poisoned])
        if (stamped == pixels[poisoned]).all():
            height, width = split.train.image_size
            raise ConfigError(
                f"{plan.attack} with these settings changes nothing on these images of "
                f"{height}x{width}, so there is no trigger to learn; change its --option"
            )
        pixels[poisoned] = stamped
    if covers.any():
        pixels[covers] = trigger.cover(pixels[covers])
    _mislabel(labels, ~poisoned & ~covers, split.train.n_classes, plan)
    train = renumbered(replace(split.train, pixels=pixels, labels=labels).take(order), "train")
    test = renumbered(split.test, "test")
    attacked = trigger.aims(test.labels, classes)
    hit = attacked >= 0
    stamped = test.images[hit]
    if hit.any():
        stamped = trigger.test(stamped, attacked[hit])
    key = AnswerKey(
        is_poison=poisoned[order],
        is_cover=covers[order],
        orig_labels=true[order],
        given_labels=train.labels,
        paths=train.paths,
        test=test.images,
        triggered=stamped,
        test_labels=test.labels,
        attack_labels=attacked,
        recipe=_recipe(trigger, classes)
        | {
            "counts": {
                "rows": len(train),
                "poison": int(poisoned.sum()),
                "covers": int(covers.sum()),
                "pool": int(pool.sum()),
                "mislabelled": int((~poisoned & (labels != true)).sum()),
                "target_class_before": int(np.isin(true, trigger.targets).sum()),
                "target_class_after": int(np.isin(labels, trigger.targets).sum()),
                "test": len(test),
            },
        },
    )
    return Split(train, test, split.broken), key


def _recipe(trigger: Trigger, classes: tuple[str, ...]) -> dict[str, Any]:
    plan, targets = trigger.plan, trigger.targets
    return {
        "attack": plan.attack,
        "settings": asdict(trigger.settings),
        "sha256": digests(trigger.how),
        "target": targets[0] if len(targets) == 1 else list(targets),
        "target_name": ", ".join(classes[target] for target in targets),
        "all_to_all": trigger.is_all_to_all,
        "seed": plan.seed,
        "rate": plan.rate,
        "rate_of_target": plan.rate_of_target,
        "label_noise": plan.label_noise,
    }


def _poisoned(train: Corpus, trigger: Trigger, rng: np.random.Generator) -> tuple[Mask, Mask]:
    """The rows to poison, and those they were drawn from. (N,) each"""
    chosen, policy = np.zeros(len(train), bool), trigger.attack.labels
    if policy == "none":
        return chosen, chosen
    pool = trigger.may_take(train)
    if trigger.plan.rate is not None:
        share, of = trigger.plan.rate, len(train)
    else:
        share = trigger.plan.rate_of_target or 0.0
        of = int(np.isin(train.labels, trigger.targets).sum())
    count = round(share * of)
    if count == 0:
        raise ConfigError(f"that rate is less than one of {of} rows; raise it")
    if count > pool.sum():
        where = "in the target class" if policy == "clean" else "outside the target class"
        if trigger.whom.sources:
            where = f"in the source {', '.join(trigger.whom.sources)}"
        of_class = policy == "clean" and trigger.plan.rate is not None
        other = "; --rate-of-target is the share of that class" if of_class else ""
        raise ConfigError(
            f"that rate asks for {count} rows, but only {pool.sum()} are {where}{other}"
        )
    chosen[rng.choice(np.flatnonzero(pool), count, replace=False)] = True
    return chosen, pool


def _covers(train: Corpus, trigger: Trigger, free: Mask, count: int) -> Mask:
    """So many rows to stamp that keep their label, of the classes they may come from. (N,)"""
    chosen, names = np.zeros(len(train), bool), trigger.whom.bystanders
    of = [target_class(name, train.classes, "cover class") for name in names]
    pool = np.flatnonzero(free & np.isin(train.labels, of or np.arange(train.n_classes)))
    if count > len(pool):
        raise ConfigError(f"{count} covers are asked for, but only {len(pool)} rows may be covers")
    rng = np.random.default_rng((trigger.plan.seed, COVERS))
    chosen[rng.choice(pool, count, replace=False)] = True
    return chosen


def _mislabel(labels: Labels, pool: Mask, n_classes: int, plan: Plan) -> None:
    """Give a share of the pool another label, drawn evenly from the others; in place."""
    rng = np.random.default_rng((plan.seed, LABEL_NOISE))
    rows = np.flatnonzero(pool)
    rows = rng.choice(rows, round(plan.label_noise * len(rows)), replace=False)
    labels[rows] = (labels[rows] + rng.integers(1, n_classes, len(rows))) % n_classes


def renumbered(corpus: Corpus, part: str) -> Corpus:
    """Rows 0..N-1, each named part/class/row.png, with as many digits as the last one has."""
    digits = len(str(max(len(corpus) - 1, 0)))
    paths = tuple(
        f"{part}/{corpus.classes[label]}/{row:0{digits}d}.png"
        for row, label in enumerate(corpus.labels)
    )
    return replace(corpus, ids=np.arange(len(corpus)), paths=paths, files=Files())
