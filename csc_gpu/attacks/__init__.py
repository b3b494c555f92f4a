"""Poisoning a corpus: who is stamped, with what label, and the answer key that says so.

An attack is one file with a `Settings` and a pure `stamp`, and one line in ATTACKS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csc_gpu.attacks import badnets, blend, none, sig
from csc_gpu.config import override, parse_change
from csc_gpu.errors import ConfigError
from csc_gpu.types import AnswerKey, Corpus, Mask, Split

Labels = NDArray[np.int64]
ALL_TO_ALL = "all"
LABEL_NOISE = 1
"""Tells the random numbers of label noise from those of the attack."""
Stamp = Callable[[NDArray[np.uint8], Any], NDArray[np.uint8]]


@dataclass(frozen=True)
class Attack:
    """One attack: how it stamps, and which rows it may take."""

    stamp: Stamp  # (B, H, W, 3) uint8 and its settings -> (B, H, W, 3) uint8; pure
    settings: type
    labels: str  # "dirty": other classes relabelled; "clean": rows of the target; "none"
    summary: str

    @property
    def label_policy(self) -> str:
        """In the field's words: dirty-label, clean-label or - for none."""
        return "-" if self.labels == "none" else f"{self.labels}-label"


ATTACKS: dict[str, Attack] = {
    "badnets": Attack(badnets.stamp, badnets.Settings, "dirty", "3x3 checkerboard in a corner"),
    "blend": Attack(blend.stamp, blend.Settings, "dirty", "noise or a picture over the image"),
    "sig": Attack(sig.stamp, sig.Settings, "clean", "sine wave on the target class"),
    "none": Attack(none.stamp, none.Settings, "none", "nothing: the control"),
}


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
            raise ConfigError(f"unknown attack {self.attack!r}; there are {', '.join(ATTACKS)}")
        if (self.rate is None) == (self.rate_of_target is None):
            raise ConfigError("give one of --rate and --rate-of-target")
        for name in ("rate", "rate_of_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be above 0 and below 1, got {value}")
        if not 0 <= self.label_noise < 1:
            raise ConfigError(f"--label-noise must be in [0, 1), got {self.label_noise}")


def settings_of(attack: str, options: Sequence[str] = (), trigger: str = "") -> Any:
    """The attack's settings, with `name=value` options and a trigger picture put in."""
    if ATTACKS[attack].labels == "none":
        return ATTACKS[attack].settings()  # the control takes every attack's options
    changes = dict(map(parse_change, options))
    if trigger:
        changes["picture"] = trigger
    try:
        return override(ATTACKS[attack].settings(), changes)
    except ConfigError as fault:
        raise ConfigError(f"attack {attack}: {fault}") from fault


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


def target_class(target: str, classes: tuple[str, ...]) -> int:
    """The label of a class given by its name or, failing that, by its index in the list."""
    if target in classes:
        return classes.index(target)
    if target.isdecimal() and int(target) < len(classes):
        return int(target)
    raise ConfigError(
        f"target {target!r} is no class of this corpus: "
        f"give 0..{len(classes) - 1} or one of {', '.join(classes[:12])}"
        + (", ..." if len(classes) > 12 else "")
    )


def poison(split: Split, plan: Plan, settings: Any = None) -> tuple[Split, AnswerKey]:
    """Stamp and relabel some rows, shuffle all; the corpus to train on and the key to it.

    Rows of the result are numbered anew, so that neither order nor number gives poison away.
    """
    attack, true = ATTACKS[plan.attack], split.train.labels
    settings = attack.settings() if settings is None else settings
    targets = target_classes(plan.target, split.train.classes, attack)
    rng = np.random.default_rng(plan.seed)
    poisoned, n_pool = _chosen(split.train, attack, targets, plan, rng)
    order = rng.permutation(len(split.train))

    labels, pixels = true.copy(), split.train.images.copy()
    labels[poisoned] = aims(true[poisoned], targets, plan)
    pixels[poisoned] = stamped(pixels[poisoned], labels[poisoned], targets, plan, settings)
    _mislabel(labels, ~poisoned, split.train.n_classes, plan)
    train = _renumbered(replace(split.train, pixels=pixels, labels=labels).take(order), "train")
    test = _renumbered(split.test, "test")
    attacked = np.full(len(test), -1, np.int64)
    if attack.labels != "none":
        attacked = aims(test.labels, targets, plan)
    hit = attacked >= 0
    key = AnswerKey(
        is_poison=poisoned[order],
        is_cover=np.zeros(len(train), bool),
        orig_labels=true[order],
        given_labels=train.labels,
        paths=train.paths,
        test=test.images,
        triggered=stamped(test.images[hit], attacked[hit], targets, plan, settings),
        test_labels=test.labels,
        attack_labels=attacked,
        recipe={
            "attack": plan.attack,
            "settings": asdict(settings),
            "target": targets[0] if len(targets) == 1 else list(targets),
            "target_name": ", ".join(train.classes[target] for target in targets),
            "all_to_all": plan.target == ALL_TO_ALL and len(targets) > 1,
            "seed": plan.seed,
            "rate": plan.rate,
            "rate_of_target": plan.rate_of_target,
            "label_noise": plan.label_noise,
            "counts": {
                "rows": len(train),
                "poison": int(poisoned.sum()),
                "pool": n_pool,
                "mislabelled": int((~poisoned & (labels != true)).sum()),
                "target_class_before": int(np.isin(true, targets).sum()),
                "target_class_after": int(np.isin(labels, targets).sum()),
                "test": len(test),
            },
        },
    )
    return Split(train, test, split.broken), key


def aims(true: Labels, targets: tuple[int, ...], plan: Plan) -> Labels:
    """The label that the attacker wants for images of these true labels. (B,) -> (B,)

    Several targets take turns; all-to-all wants the next label.
    """
    if plan.target == ALL_TO_ALL and len(targets) > 1:
        return (true + 1) % len(targets)
    return np.array(targets)[np.arange(len(true)) % len(targets)]


def stamped(
    images: NDArray[np.uint8],
    wanted: Labels,
    targets: tuple[int, ...],
    plan: Plan,
    settings: Any,
) -> NDArray[np.uint8]:
    """Images with the trigger of the label wanted for each. (B, H, W, 3) -> (B, H, W, 3)

    All-to-all has one trigger for all; several targets have one each, the settings' variants.
    """
    stamp, labels = ATTACKS[plan.attack].stamp, ATTACKS[plan.attack].labels
    if len(targets) == 1 or plan.target == ALL_TO_ALL or labels == "none":
        return stamp(images, settings)
    out = images.copy()
    for number, target in enumerate(targets):
        out[wanted == target] = stamp(images[wanted == target], settings.variant(number))
    return out


def _mislabel(labels: Labels, pool: Mask, n_classes: int, plan: Plan) -> None:
    """Give a share of the pool another label, drawn evenly from the others; in place."""
    rng = np.random.default_rng((plan.seed, LABEL_NOISE))
    rows = np.flatnonzero(pool)
    rows = rng.choice(rows, round(plan.label_noise * len(rows)), replace=False)
    labels[rows] = (labels[rows] + rng.integers(1, n_classes, len(rows))) % n_classes


def _chosen(
    train: Corpus,
    attack: Attack,
    targets: tuple[int, ...],
    plan: Plan,
    rng: np.random.Generator,
) -> tuple[Mask, int]:
    is_target = np.isin(train.labels, targets)
    chosen = np.zeros(len(train), bool)
    if attack.labels == "none":
        return chosen, 0
    everyone = plan.target == ALL_TO_ALL and len(targets) > 1
    outside = np.ones(len(train), bool) if everyone else ~is_target
    pool = np.flatnonzero(is_target if attack.labels == "clean" else outside)
    if plan.rate is not None:
        share, of = plan.rate, len(train)
    else:
        share, of = plan.rate_of_target or 0.0, int(is_target.sum())
    count = round(share * of)
    if count == 0:
        raise ConfigError(f"that rate is less than one of {of} rows; raise it")
    if count > len(pool):
        where = "in" if attack.labels == "clean" else "outside"
        raise ConfigError(
            f"that rate asks for {count} rows, but only {len(pool)} are {where} the target class"
            + ("; --rate-of-target is the share of that class" if plan.rate is not None else "")
        )
    chosen[rng.choice(pool, count, replace=False)] = True
    return chosen, len(pool)


def _renumbered(corpus: Corpus, part: str) -> Corpus:
    """Rows 0..N-1, each named part/class/row.png, with as many digits as the last one has."""
    digits = len(str(max(len(corpus) - 1, 0)))
    paths = tuple(
        f"{part}/{corpus.classes[label]}/{row:0{digits}d}.png"
        for row, label in enumerate(corpus.labels)
    )
    return replace(corpus, ids=np.arange(len(corpus)), paths=paths, files=())
