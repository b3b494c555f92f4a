"""Who is stamped with what, and with which label; the key knows, and so does every test here."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from csc_gpu.attacks import (
    ATTACKS,
    Plan,
    adap_patch,
    badnets,
    blend,
    poison,
    preview,
    ready,
    target_classes,
)
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


def test_the_preview_shows_clean_poison_difference_triggered_and_cover_below_each_other():
    split = clean()
    trigger = ready(split, Plan(attack="adap-blend", target="emu", rate=0.1))
    times, count = 6, 8  # 12 pixels are drawn 64 high or more; eight samples
    drawn = preview(split.train, trigger)
    side = 12 * times + 2
    assert drawn.shape == (5 * side, count * side, 3)
    cells = drawn.reshape(5, side, count, side, 3).transpose(0, 2, 1, 3, 4)
    assert (cells[:, :, -2:] == 255).all() and (cells[:, :, :, -2:] == 255).all()  # the gaps
    lines = cells[:, :, : side - 2 : times, : side - 2 : times]
    known = {image.tobytes(): label for image, label in zip(
        split.train.images, split.train.labels, strict=True)}  # fmt: skip
    assert all(known[image.tobytes()] != 2 for image in lines[0])  # from the pool
    wanted = np.full(count, 2)
    assert (lines[1] == trigger.poison(lines[0], wanted)).all()
    difference = lines[1].astype(float) - lines[0]
    stretched = 127.5 + 127.5 * difference / np.abs(difference).max()
    assert np.abs(lines[2] - stretched).max() <= 0.51
    assert (lines[3] == trigger.test(lines[0], wanted)).all()
    assert (lines[4] == trigger.cover(lines[0])).all()
    assert (lines[1] != lines[3]).any() and (lines[1] != lines[4]).any()


def test_the_preview_has_a_line_for_covers_only_where_there_are_some():
    split = clean(n=5)
    drawn = preview(split.train, ready(split, Plan(attack="badnets", target="emu", rate=0.4)))
    assert drawn.shape == (4 * 74, 4 * 74, 3)  # four rows are of other classes


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
        ({"target": "cat,dog,emu,fox,gnu"}, "only 0 are outside the target class$"),
        ({"target": "cat", "rate": 0.95}, "only 160 are outside the target class$"),
        (
            {"target": "cat", "attack": "sig", "rate": 0.5},
            "only 40 are in the target class; --rate",
        ),
        ({"target": "dog", "attack": "badnets-a2a"}, "each class into the next; leave --target"),
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


def test_the_recipe_names_trigger_files_by_what_they_hold(tmp_path):
    Image.new("RGB", (4, 4), (200, 10, 10)).save(tmp_path / "red.png")
    digest = hashlib.sha256((tmp_path / "red.png").read_bytes()).hexdigest()
    path = str(tmp_path / "red.png")
    _, key = made("cat", "badnets", badnets.Settings(picture=path, mask=path))
    assert key.recipe["sha256"] == {"picture": digest, "mask": digest}
    settings = adap_patch.Settings(
        pictures=(path, path), masks=("", path), opacities=(0.5,), at_test=(1,)
    )
    _, key = made("cat", "adap-patch", settings)
    assert key.recipe["sha256"] == {"pictures": [digest] * 2, "masks": ["", digest]}
    assert made("cat")[1].recipe["sha256"] == {}


def test_a_corner_that_is_none_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"attack\.corner"):
        badnets.Settings(corner="middle")
