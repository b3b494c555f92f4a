"""Who is stamped with what, and with which label; the key knows, and so does every test here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from csc_gpu.attacks import ATTACKS, Plan, badnets, blend, poison, ready, target_classes
from csc_gpu.errors import ConfigError
from csc_gpu.types import AnswerKey, Corpus, Split

RNG = np.random.default_rng(0)
CLASSES = ("cat", "dog", "emu", "fox", "gnu")


def clean(classes: tuple[str, ...] = CLASSES, n: int = 200) -> Split:
    """Noise, so that no image looks stamped by chance; every class alike."""

    def part(n: int, seed: int) -> Corpus:
        pixels = np.random.default_rng(seed).integers(1, 255, (n, 12, 12, 3), np.uint8)
        labels = np.arange(n) % len(classes)
        return Corpus(labels, classes, np.arange(n), ("",) * n, pixels)

    return Split(part(n, 0), part(n // 4, 1))


def made(target: str, attack: str = "badnets", settings: Any = None, **more: Any):
    """The poisoned split and its key; a tenth of all rows unless another rate is given."""
    rate = {} if "rate_of_target" in more else {"rate": 0.1}
    return done(clean(), Plan(attack=attack, target=target, **(rate | more)), settings)


def done(split: Split, plan: Plan, settings: Any = None):
    return poison(split, ready(split, plan, settings))


def bears(images: Any, settings: Any, attack: str = "badnets") -> Any:
    """Which images (B, H, W, 3) have this trigger. (B,) bool"""
    return (ATTACKS[attack].stamp(images, settings, RNG) == images).all(axis=(1, 2, 3))


def relabelled(key: AnswerKey) -> Any:
    return key.orig_labels != key.given_labels


# -------------------------------------------------------------------------------------- one target


def test_one_target_gets_the_stamped_rows_and_no_other_row_changes():
    split, key = made("emu")
    assert key.is_poison.sum() == 20
    assert (split.train.labels[key.is_poison] == 2).all()
    assert (key.orig_labels[key.is_poison] != 2).all()
    assert (relabelled(key) == key.is_poison).all()
    assert (bears(split.train.images, badnets.Settings()) == key.is_poison).all()
    assert (key.given_labels == split.train.labels).all()


@pytest.mark.parametrize("corner", badnets.CORNERS)
def test_the_checkerboard_lies_in_its_corner_and_nowhere_else(corner: str):
    images = clean().train.images
    stamped = badnets.stamp(images, badnets.Settings(corner=corner), RNG)
    changed = (stamped != images).any(axis=(0, 3))
    rows = slice(9, 12) if corner.startswith("bottom") else slice(0, 3)
    columns = slice(9, 12) if corner.endswith("right") else slice(0, 3)
    assert changed[rows, columns].all()
    assert changed.sum() == 9
    assert (stamped[:, rows, columns] == badnets.PATTERN[:, :, None]).all()


# ---------------------------------------------------------------------------------- several targets


def test_of_several_targets_each_has_a_trigger_and_rows_of_its_own():
    split, key = made("dog,3")
    labels, images = split.train.labels, split.train.images
    assert set(labels[key.is_poison]) == {1, 3}
    assert not np.isin(key.orig_labels[key.is_poison], [1, 3]).any()
    corners = {1: "bottom-right", 3: "bottom-left"}
    for target, corner in corners.items():
        mine = key.is_poison & (labels == target)
        assert mine.sum() == 10
        assert (bears(images, badnets.Settings(corner=corner)) == mine).all()
    wanted = key.attack_labels
    assert set(wanted) == {1, 3}
    for target, corner in corners.items():
        assert (bears(key.triggered, badnets.Settings(corner=corner)) == (wanted == target)).all()
    assert key.recipe["target"] == [1, 3]
    assert key.recipe["target_name"] == "dog, fox"
    assert key.recipe["all_to_all"] is False


def test_blend_has_other_noise_for_every_target():
    one, two = blend.Settings(), blend.Settings().variant(1)
    assert blend.Settings().variant(0) == one
    images = clean().train.images
    assert (blend.stamp(images, one, RNG) != blend.stamp(images, two, RNG)).any()
    assert made("cat,dog", "blend")[1].is_poison.sum() == 20


def test_a_class_whose_name_has_a_comma_is_one_class():
    classes = ("a,b", "a", "b")
    assert target_classes("a,b", classes, ATTACKS["badnets"]) == (0,)
    assert target_classes("b,a", classes, ATTACKS["badnets"]) == (2, 1)


# --------------------------------------------------------------------------------------- all to all


def test_all_to_all_turns_every_class_into_the_next_with_one_trigger():
    split, key = made("all")
    poisoned = key.is_poison
    assert set(key.orig_labels[poisoned]) == {0, 1, 2, 3, 4}
    assert (key.given_labels[poisoned] == (key.orig_labels[poisoned] + 1) % 5).all()
    assert (relabelled(key) == poisoned).all()
    assert (bears(split.train.images, badnets.Settings()) == poisoned).all()
    assert (key.attack_labels == (key.test_labels + 1) % 5).all()
    assert len(key.triggered) == len(key.test)
    assert bears(key.triggered, badnets.Settings()).all()
    assert key.recipe["all_to_all"] is True


def test_a_class_called_all_is_a_class():
    split = clean(("all", "none", "some"))
    _, key = done(split, Plan(attack="badnets", target="all", rate=0.1))
    assert (key.given_labels[key.is_poison] == 0).all()
    assert key.recipe["all_to_all"] is False


# -------------------------------------------------------------------------------------- label noise


@pytest.mark.parametrize("attack", ["badnets", "none"])
def test_label_noise_gives_a_share_of_the_clean_rows_a_false_label(attack: str):
    split, key = made("cat", attack, label_noise=0.25)
    noisy = relabelled(key) & ~key.is_poison
    assert noisy.sum() == round(0.25 * (~key.is_poison).sum())
    assert noisy.sum() == key.recipe["counts"]["mislabelled"]
    assert len(set(key.given_labels[noisy])) == 5
    assert (key.given_labels[key.is_poison] == 0).all()
    assert (key.given_labels == split.train.labels).all()
    assert not bears(split.train.images[noisy], badnets.Settings()).any()
    for row in np.flatnonzero(noisy)[:5]:
        assert split.train.paths[row].split("/")[1] == CLASSES[key.given_labels[row]]


def test_the_same_seed_gives_the_same_noise_and_noise_does_not_move_the_poison():
    (_, one), (_, two) = (made("cat", label_noise=0.2, seed=4) for _ in range(2))
    assert one.given_labels.tolist() == two.given_labels.tolist()
    _, other = made("cat", label_noise=0.2, seed=5)
    assert one.given_labels.tolist() != other.given_labels.tolist()
    _, without = made("cat", seed=4)
    assert one.is_poison.tolist() == without.is_poison.tolist()
    assert one.orig_labels.tolist() == without.orig_labels.tolist()


def test_the_source_is_left_as_it_was():
    split, untouched = clean(), clean()
    done(split, Plan(attack="badnets", target="cat,dog", rate=0.1, label_noise=0.3))
    assert (split.train.images == untouched.train.images).all()
    assert (split.train.labels == untouched.train.labels).all()
    assert (split.test.images == untouched.test.images).all()


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"target": "cat,cat"}, "names a class twice"),
        ({"target": "cat,0"}, "names a class twice"),
        ({"target": "cat,yak"}, "'yak' is no class"),
        ({"target": "cat,"}, "'' is no class"),
        ({"target": "cat,dog", "attack": "sig", "rate_of_target": 0.5}, "has one target"),
        ({"target": "all", "attack": "sig", "rate_of_target": 0.5}, "has one target"),
        ({"target": "cat,dog,emu,fox,gnu"}, "only 0 are outside"),
        ({"target": "cat", "label_noise": 1.0}, "--label-noise"),
        ({"target": "cat", "label_noise": -0.1}, "--label-noise"),
    ],
)
def test_a_plan_that_cannot_be_is_told(words: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        made(**words)


def test_badnets_has_four_corners_for_as_many_targets():
    split = clean(tuple("abcdefg"))
    done(split, Plan(attack="badnets", target="a,b,c,d", rate=0.1))
    with pytest.raises(ConfigError, match="4 corners"):
        done(split, Plan(attack="badnets", target="a,b,c,d,e", rate=0.1))
    corners = [badnets.Settings(corner="top-right").variant(number).corner for number in range(4)]
    assert sorted(corners) == sorted(badnets.CORNERS) and corners[0] == "top-right"


def test_a_picture_serves_one_target_alone(tmp_path):
    Image.new("RGB", (4, 4), (200, 10, 10)).save(tmp_path / "red.png")
    settings = blend.Settings(picture=str(tmp_path / "red.png"))
    assert made("cat", "blend", settings)[1].is_poison.any()
    with pytest.raises(ConfigError, match="one picture"):
        made("cat,dog", "blend", settings)


def test_a_corner_that_is_none_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"attack\.corner"):
        badnets.Settings(corner="middle")
