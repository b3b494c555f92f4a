"""What each attack does to pixels: laws that all keep, and facts of each, computed by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dct, dctn

from csc_gpu.attacks import (
    ATTACKS,
    Plan,
    adap_blend,
    adap_k_way,
    adap_patch,
    baat,
    badnets,
    blend,
    bpp,
    ctrl,
    filter,
    ftrojan,
    low_frequency,
    poison,
    ready,
    settings_of,
    sig,
    tact,
    wanet,
)
from csc_gpu.attacks.badnets import PATTERN
from csc_gpu.attacks.cosine import basis
from csc_gpu.config import explained
from csc_gpu.errors import ConfigError
from csc_gpu.types import Corpus, Split

STAMPS = [name for name, attack in ATTACKS.items() if attack.learn is None]
SIZES = [(8, 8), (13, 13), (28, 28), (32, 32), (32, 20), (20, 33), (64, 64)]
CLASSES = tuple(f"class{number}" for number in range(10))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(*shape: int, seed: int = 0) -> Any:
    """Images of noise. (B, H, W, 3) uint8"""
    return rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def flat(level: int, count: int = 1, size: tuple[int, int] = (32, 32)) -> Any:
    """Images of one grey level. (B, H, W, 3) uint8"""
    return np.full((count, *size, 3), level, np.uint8)


def boxes(changed: Any) -> Any:
    """Top, bottom, left and right of where a mask (H, W) holds."""
    rows, columns = np.nonzero(changed)
    return rows.min(), rows.max(), columns.min(), columns.max()


# ------------------------------------------------------------------------------- laws of all stamps


@pytest.mark.parametrize("name", STAMPS)
@pytest.mark.parametrize("size", SIZES)
def test_stamps_keep_shape_and_type_and_leave_what_they_were_given(name: str, size: Any):
    attack = ATTACKS[name]
    settings = attack.settings()
    grey = noise(1, *size)[..., :1].repeat(3, axis=3)
    images = np.concatenate([noise(5, *size), flat(0, 1, size), flat(255, 1, size), grey])
    before = images.copy()
    for stamp in {attack.stamp, attack.test or attack.stamp, attack.cover or attack.stamp}:
        for given in (images, images[:1]):
            stamped = stamp(given, settings, rng(3))
            assert stamped.shape == given.shape and stamped.dtype == np.uint8
            assert not np.shares_memory(stamped, images)
            assert (stamp(given, settings, rng(3)) == stamped).all()
            differs = (stamped != given).any(axis=(1, 2, 3))
            assert differs[0] == (name != "none")
    assert (images == before).all()


@pytest.mark.parametrize("name", STAMPS)
def test_every_setting_says_what_it_means(name: str):
    usual = ATTACKS[name].settings()
    lines = explained(usual).splitlines()
    told = {line.partition(" = ")[0]: above for above, line in itertools.pairwise(["", *lines])}
    for field in dataclasses.fields(usual):
        assert told[field.name].startswith("# ") and len(told[field.name]) > 10


TROJAN_NET = {"fixed": False, "neurons": 2, "aim": 100.0}
PGD = {"eps": 8.0, "step": 1.5, "amplitude": 255.0, "cell": 1}
INPUT_AWARE = {"density": 0.032, "thrift": 100.0, "diversity": 1.0}
RECIPES: dict[str, dict[str, Any]] = {
    "badnets": {"cell": 1, "corner": "bottom-right"},
    "badnets-a2a": {"cell": 1, "corner": "bottom-right"},
    "blend": {"alpha": 0.2},
    "sig": {"delta": 40.0, "frequency": 6.0},
    "trojan": TROJAN_NET,
    "label-consistent": PGD,
    "input-aware": {**INPUT_AWARE, "cover": 1.0},
    "dynamic": INPUT_AWARE,
    "sample-specific": {"bits": 20},
    "tact": {"source": "1", "cover_classes": ("5", "7"), "cover": 1.0},
    "adap-blend": {"alpha": 0.15, "test_alpha": 0.2, "pieces": 16, "masked": 0.5, "cover": 1.0},
    "adap-patch": {"opacities": (0.5, 0.2, 0.5, 0.3), "at_test": (4, 2), "cover": 2.0},
    "adap-k-way": {"cover": 1.0},
    "wanet": {"k": 4, "s": 0.5, "grid_rescale": 1.0, "cover": 2.0},
    "filter": {},  # ours: no recipe is public
    "baat": {},
    "ftrojan": {"magnitude": 30.0},
    "ctrl": {"magnitude": 100.0},
    "low-frequency": {"amplitude": 25.5},  # BackdoorBench's arrays span 51
    "bpp": {"levels": 8, "cover": 1.0},
    "none": {},
}
"""The defaults that attacks.md gives; the others are ours."""


def test_the_defaults_are_those_of_the_recipes():
    assert RECIPES.keys() == ATTACKS.keys()
    for name, recipe in RECIPES.items():
        usual = asdict(ATTACKS[name].settings())
        assert {setting: usual[setting] for setting in recipe} == recipe, name
        assert all(not usual.get(file) for file in ("picture", "mask", "pictures", "masks")), name


def clean() -> Split:
    """Noise, no two images alike; every class alike often."""

    def part(count: int, seed: int) -> Corpus:
        labels = np.arange(count) % len(CLASSES)
        pixels = noise(count, 16, 16, seed=seed)
        return Corpus(labels, CLASSES, np.arange(count), ("",) * count, pixels)

    return Split(part(200, 0), part(50, 1))


def seen(images: Any, among: Any) -> Any:
    """Which images are, byte for byte, among others. (B,) bool"""
    known = {image.tobytes() for image in among}
    return np.array([image.tobytes() in known for image in images])


@pytest.mark.parametrize("name", STAMPS)
def test_the_key_tells_all_rows_and_labels_that_were_changed(name: str):
    split = clean()
    trigger = ready(split, Plan(attack=name, target="0", rate=0.04, seed=2))
    made, key = poison(split, trigger)
    policy = ATTACKS[name].labels
    assert key.is_poison.sum() == (0 if policy == "none" else 8)
    stamped = key.is_poison | key.is_cover
    assert (seen(made.train.images, split.train.images) == ~stamped).all()
    relabelled = key.given_labels != key.orig_labels
    assert (relabelled == (key.is_poison if policy == "dirty" else False)).all()
    if policy == "clean":
        assert (key.orig_labels[key.is_poison] == 0).all()
    assert not seen(key.triggered, split.test.images).any()
    assert (key.test == split.test.images).all()


COVERED = {
    "tact": 8,
    "adap-blend": 8,
    "adap-patch": 16,
    "adap-k-way": 8,
    "wanet": 16,
    "bpp": 8,
}


@pytest.mark.parametrize("name", STAMPS)
def test_covers_keep_their_label_and_are_counted_apart_from_poison(name: str):
    split = clean()
    _, key = poison(split, ready(split, Plan(attack=name, target="0", rate=0.04)))
    assert key.is_cover.sum() == key.recipe["counts"]["covers"] == COVERED.get(name, 0)
    assert not (key.is_cover & key.is_poison).any()
    assert (key.given_labels == key.orig_labels)[key.is_cover].all()


@pytest.mark.parametrize("name", COVERED)
def test_no_covers_are_made_where_none_are_asked_for(name: str):
    split = clean()
    trigger = ready(split, Plan(attack=name, target="0", rate=0.04), settings_of(name, ["cover=0"]))
    assert not poison(split, trigger)[1].is_cover.any()


def test_covers_and_test_images_are_stamped_in_their_own_way_where_there_is_one():
    images, wanted = noise(8, 32, 32), np.zeros(8, np.int64)
    own = {name: {"test"} for name in ("adap-blend", "adap-patch", "adap-k-way")}
    own |= {name: {"cover"} for name in ("wanet", "bpp")}
    for name in STAMPS:
        trigger = ready(clean(), Plan(attack=name, target="0", rate=0.04))
        attack, how = trigger.attack, trigger.how
        assert {kind for kind in ("test", "cover") if getattr(attack, kind)} == own.get(name, set())
        usual = attack.stamp(images, how, rng(1))
        if attack.test:
            assert (trigger.test(images, wanted) == attack.test(images, how, rng(2))).all()
            assert (trigger.test(images, wanted) != usual).any(axis=(1, 2, 3)).all()
        if attack.cover:
            assert (trigger.cover(images) != usual).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("tact", "cover=-1"),
        ("tact", "cover_classes=[]"),
        ("adap-blend", "alpha=0"),
        ("adap-blend", "test_alpha=1.5"),
        ("adap-blend", "pieces=8"),
        ("adap-blend", "masked=1.0"),
        ("adap-patch", "opacities=[]"),
        ("adap-patch", "opacities=[0.5, 2.0]"),
        ("adap-patch", "at_test=[5]"),
        ("adap-patch", "at_test=[]"),
        ("adap-patch", 'masks=["a.png"]'),
        ("adap-k-way", "cover=-1"),
        ("wanet", "k=1"),
        ("wanet", "s=0"),
        ("filter", "strength=0"),
        ("filter", "vignette=2"),
        ("baat", "strength=0"),
        ("ftrojan", "magnitude=0"),
        ("ctrl", "magnitude=-1"),
        ("low-frequency", "amplitude=0"),
        ("low-frequency", "frequencies=0"),
        ("bpp", "levels=1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name: str, option: str):
    with pytest.raises(ConfigError, match=option.partition("=")[0]):
        settings_of(name, [option])


# --------------------------------------------------------------------------------------------- tact


def test_tact_turns_its_source_class_alone_and_takes_covers_from_the_classes_named():
    split = clean()
    settings = tact.Settings(source="class4", cover_classes=("6", "class9"))
    _, key = poison(split, ready(split, Plan(attack="tact", target="0", rate=0.04), settings))
    assert set(key.orig_labels[key.is_poison]) == {4}
    assert set(key.orig_labels[key.is_cover]) == {6, 9}
    assert (key.attack_labels[key.test_labels == 4] == 0).all()
    assert (key.attack_labels[key.test_labels != 4] == -1).all()
    source = split.test.images[split.test.labels == 4]
    assert (key.triggered == tact.stamp(source, settings, rng())).all()


def test_tacts_patch_lies_where_it_should_and_grows_with_the_image():
    for side, first, last in [(32, 21, 28), (64, 42, 57), (16, 10, 13)]:
        changed = tact.stamp(flat(0, 1, (side, side)), tact.Settings(), rng())[0].any(axis=2)
        assert boxes(changed) == (first, last, first, last)
    one, two = (tact.stamp(flat(0), tact.Settings(pattern_seed=seed), rng()) for seed in (0, 1))
    assert (one != two).any()


def test_tact_stamps_a_picture_where_it_is_not_black(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[4:6, 7:9] = (200, 10, 10)
    Image.fromarray(pixels).save(tmp_path / "t.png")
    stamped = tact.stamp(flat(90), tact.Settings(picture=str(tmp_path / "t.png")), rng())[0]
    assert boxes((stamped != 90).any(axis=2)) == (4, 5, 7, 8)
    assert (stamped[4, 7] == (200, 10, 10)).all()
    pixels[4:6, 8:10] = 255
    Image.fromarray(pixels).save(tmp_path / "m.png")
    both = {"picture": str(tmp_path / "t.png"), "mask": str(tmp_path / "m.png")}
    stamped = tact.stamp(flat(90), tact.Settings(**both), rng())[0]
    assert boxes((stamped != 90).any(axis=2)) == (4, 5, 7, 9)
    assert (stamped[4, 9] == 0).all()


def test_tacts_source_cannot_be_its_cover():
    with pytest.raises(ConfigError, match=r"attack\.cover_classes"):
        tact.Settings(source="5")


@pytest.mark.parametrize(
    ("target", "source", "covers", "told"),
    [
        ("5", "1", ("5", "7"), "'class5' is a cover class and a target"),
        ("class5", "1", ("5", "7"), "'class5' is a cover class and a target"),
        ("1", "class1", ("5",), "'class1' is a source and a target"),
        ("0", "1", ("class1", "7"), "'class1' is a source and a cover class"),
    ],
)
def test_tacts_three_roles_are_of_different_classes(
    target: str, source: str, covers: Any, told: str
):
    settings = tact.Settings(source=source, cover_classes=covers)
    with pytest.raises(ConfigError, match=rf"^tact: class {told}"):
        ready(clean(), Plan(attack="tact", target=target, rate=0.04), settings)


# ---------------------------------------------------------------------------------------------- sig


def test_sigs_wave_is_40_grey_levels_high_and_has_six_periods_across():
    stamped = sig.stamp(flat(128, 2, (20, 32)), sig.Settings(), rng())
    wanted = [round(128 + 40 * math.sin(2 * math.pi * column * 6 / 32)) for column in range(32)]
    assert wanted[:4] == [128, 165, 156, 113]
    assert (stamped == np.array(wanted)[None, None, :, None]).all()
    bright = sig.stamp(flat(250, 1, (4, 32)), sig.Settings(), rng())[0, 0, :, 0]
    assert bright[1] == 255 and bright[3] == 250 - 15


@pytest.mark.parametrize(
    ("name", "size", "options"), [("sig", (16, 12), ()), ("sig", (16, 32), ("frequency=32",))]
)
def test_a_stamp_that_changes_nothing_is_refused(name: str, size: Any, options: Any):
    labels = np.arange(40) % len(CLASSES)
    part = Corpus(labels, CLASSES, np.arange(40), ("",) * 40, noise(40, *size))
    trigger = ready(
        Split(part, part), Plan(attack=name, target="0", rate=0.04), settings_of(name, options)
    )
    told = f"{name} with these settings changes nothing on these images of {size[0]}x{size[1]}"
    with pytest.raises(ConfigError, match=told):
        poison(Split(part, part), trigger)


# --------------------------------------------------------------------------------------- adap-blend


def test_adap_blend_gives_each_training_image_half_the_pieces_of_its_own():
    settings = adap_blend.Settings()
    whole = blend.trigger(32, 32, blend.Settings())
    stamped = adap_blend.stamp(flat(0, 6), settings, rng())
    pieces = stamped.reshape(6, 4, 8, 4, 8, 3).any(axis=(2, 4, 5)).reshape(6, 16)
    assert (pieces.sum(axis=1) == 8).all()
    assert len({tuple(row) for row in pieces}) > 1
    there = pieces.reshape(6, 4, 4).repeat(8, axis=1).repeat(8, axis=2)
    faint = np.rint(whole * np.float32(0.15))
    assert (stamped == np.where(there[..., None], faint, 0)).all()


def test_adap_blend_gives_a_test_image_all_pieces_more_strongly():
    images = noise(3, 32, 32)
    tested = adap_blend.test(images, adap_blend.Settings(), rng())
    assert (tested == blend.stamp(images, blend.Settings(alpha=0.2), rng())).all()
    split = clean()
    _, key = poison(split, ready(split, Plan(attack="adap-blend", target="0", rate=0.04)))
    images = split.test.images
    assert (key.triggered == blend.stamp(images, blend.Settings(alpha=0.2), rng())).all()


def test_adap_blend_takes_a_picture_and_any_number_of_pieces(tmp_path):
    Image.new("RGB", (9, 9), (200, 200, 200)).save(tmp_path / "grey.png")
    settings = adap_blend.Settings(picture=str(tmp_path / "grey.png"), pieces=4, masked=0.25)
    stamped = adap_blend.stamp(flat(0, 2, (12, 12)), settings, rng())
    assert set(np.unique(stamped)) == {0, 30}
    assert ((stamped == 30).mean(axis=(1, 2, 3)) == 0.75).all()


# --------------------------------------------------------------------------------------- adap-patch


def test_adap_patch_deals_its_four_triggers_evenly_each_at_its_opacity():
    stamped = adap_patch.stamp(flat(0, 8), adap_patch.Settings(), rng())
    drawn = [adap_patch.stand_in(number, 0).clip(0) for number in range(4)]
    wanted = [np.rint(t * np.float32(a)) for t, a in zip(drawn, (0.5, 0.2, 0.5, 0.3), strict=True)]
    for trigger in wanted:
        assert (stamped == trigger).all(axis=(1, 2, 3)).sum() == 2
    places = [(27, 31, 27, 31), (1, 13, 18, 30), (0, 31, 0, 31), (21, 28, 21, 28)]
    assert [boxes(trigger.any(axis=2)) for trigger in wanted] == places
    assert (drawn[0][27, 27:] != drawn[3][21, 21:26]).any()  # noise of their own
    others = adap_patch.stamp(flat(0, 8), adap_patch.Settings(), rng(1))
    assert (others != stamped).any()  # dealt anew


def test_adap_patch_shows_two_whole_triggers_at_test_and_nothing_else():
    tested = adap_patch.test(flat(128), adap_patch.Settings(), rng())[0]
    for down in (1, -1):
        for across in (1, -1):  # checkerboards, each mirrored into its corner
            corner = tested[::down, ::across][-3:, -3:]
            assert (corner == PATTERN[:, :, None]).all()
    phoenix = adap_patch.stand_in(0, 0)[27:, 27:]
    assert (tested[27:29, 27:] == phoenix[:2]).all()
    assert (tested[27:29, :5] == phoenix[:2]).all()
    tested[:3, :3] = tested[:3, -3:] = tested[27:, :5] = tested[27:, 27:] = 128
    assert (tested == 128).all()


def test_adap_patch_takes_pictures_and_masks(tmp_path):
    paths = []
    for name, colour in [("red", (240, 0, 0)), ("dark", (0, 0, 0)), ("mask", (255, 255, 255))]:
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
        paths.append(str(tmp_path / f"{name}.png"))
    settings = adap_patch.Settings(
        pictures=(paths[0], paths[1]), masks=("", paths[2]), opacities=(0.5,), at_test=(0, 1)
    )
    assert (adap_patch.stamp(flat(0, 3), settings, rng()) == (120, 0, 0)).all()
    assert (adap_patch.test(flat(99), settings, rng()) == 0).all()
    with pytest.raises(ConfigError, match=r"attack\.pictures"):
        adap_patch.stamp(flat(0), adap_patch.Settings(pictures=("no.png",) * 5), rng())


def test_images_too_small_for_a_trigger_are_told():
    with pytest.raises(ConfigError, match="too small"):
        adap_patch.stamp(flat(0, 8, (2, 2)), adap_patch.Settings(), rng())


# --------------------------------------------------------------------------------------- adap-k-way


def test_adap_k_way_gives_one_pixel_in_training_and_all_four_at_test():
    stamped = adap_k_way.stamp(flat(200, 8), adap_k_way.Settings(), rng())
    tested = adap_k_way.test(flat(200, 1), adap_k_way.Settings(), rng())
    wanted = {(16, 11): (92, 0, 24), (27, 5): (88, 112, 110)}
    wanted |= {(7, 30): (0, 32, 46), (22, 22): (11, 49, 95)}
    assert ((stamped != 200).any(axis=3).sum(axis=(1, 2)) == 1).all()
    assert (tested != 200).any(axis=3).sum() == 4
    for place, colour in wanted.items():
        assert (stamped[:, *place] == colour).all(axis=1).sum() == 2
        assert (tested[0, *place] == colour).all()


# -------------------------------------------------------------------------------------------- wanet


def ramp(down: int, across: int, size: tuple[int, int]) -> Any:
    """An image that gets lighter by so much a row and a column. (1, H, W, 3)"""
    rows, columns = np.indices(size)
    return (down * rows + across * columns).astype(np.uint8)[None, :, :, None].repeat(3, axis=3)


def moved(grid: Any) -> Any:
    """Which row and column each pixel is read from. (1, H, W, 2) -> (H, W) each"""
    height, width = grid.shape[1:3]
    return (grid[0, ..., 1] + 1) / 2 * (height - 1), (grid[0, ..., 0] + 1) / 2 * (width - 1)


@pytest.mark.parametrize("size", SIZES)
def test_the_identity_grid_leaves_images_as_they_are(size: Any):
    images = noise(2, *size)
    grid = wanet.identity_grid(*size)
    assert grid.shape == (1, *size, 2) and np.abs(grid).max() == 1
    assert (wanet.bent(images, grid) == images).all()


@pytest.mark.parametrize("size", SIZES)
def test_wanets_grid_is_bounded_smooth_and_bends_by_part_of_a_pixel(size: Any):
    grid = wanet.trigger_grid(*size, wanet.Settings())
    assert grid.shape == wanet.noise_grid(*size, wanet.Settings()).shape == (1, *size, 2)
    assert np.abs(grid).max() <= 1
    offsets = [at - np.indices(size)[axis] for axis, at in enumerate(moved(grid))]
    assert 0.05 < np.abs(offsets).mean() < 0.5 and np.abs(offsets).max() < 1.5
    # neighbours move alike: far less apart than they are large
    steps = np.abs(np.diff(offsets, axis=1)).mean()
    assert steps < np.abs(offsets).mean() * 8 / size[0]


def test_the_noise_of_wanet_goes_through_its_points_which_are_one_large_on_average():
    grid = wanet.noise_grid(31, 31, wanet.Settings(pattern_seed=5))
    assert np.abs(grid[0, ::10, ::10]).mean() == pytest.approx(1, abs=1e-5)  # the 4 x 4 points


def test_wanet_reads_each_pixel_from_where_its_grid_says():
    size = (20, 33)
    rows, columns = moved(wanet.trigger_grid(*size, wanet.Settings(s=1.5)))
    noise = wanet.noise_grid(*size, wanet.Settings(s=1.5))[0]
    inner = np.s_[3:-3, 3:-3]  # no pixel of these is read from beyond the rim
    away = rows - np.indices(size)[0], columns - np.indices(size)[1]
    assert np.allclose(away[0][inner], (1.5 * noise[..., 1] / 20 * 19 / 2)[inner], atol=1e-4)
    assert np.allclose(away[1][inner], (1.5 * noise[..., 0] / 33 * 32 / 2)[inner], atol=1e-4)
    for down, across in [(12, 0), (0, 7)]:
        stamped = wanet.stamp(ramp(down, across, size), wanet.Settings(s=1.5), rng())
        wanted = down * rows + across * columns
        assert np.abs(stamped[0, ..., 0] - wanted).max() < 0.51


def test_wanet_bends_many_images_in_parts_to_the_same_bytes(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (9, 12, 14, 3), np.uint8)
    settings = wanet.Settings(s=1.5)
    at_once = [made(images, settings, rng()) for made in (wanet.stamp, wanet.cover)]
    monkeypatch.setattr(wanet, "AT_A_TIME", 4)
    in_parts = [made(images, settings, rng()) for made in (wanet.stamp, wanet.cover)]
    np.testing.assert_array_equal(at_once, in_parts)


def test_wanets_covers_have_noise_of_their_own_of_up_to_half_a_pixel():
    image = ramp(0, 7, (32, 32))
    settings = wanet.Settings()
    covers = wanet.cover(image.repeat(4, axis=0), settings, rng()).astype(float)
    away = covers - wanet.stamp(image, settings, rng())
    assert 2 < np.abs(away).max() <= 7 * 0.5 * 31 / 32 + 1
    assert (covers[0] != covers[1]).any() and (covers[2] != covers[3]).any()
    assert not np.isclose(np.corrcoef(away[0].ravel(), away[1].ravel())[0, 1], 1, atol=0.5)


# ------------------------------------------------------------------------------------ filter, baat


def test_the_filter_maps_black_and_white_as_its_curves_say_and_darkens_the_corners():
    black = filter.stamp(flat(0, 1, (33, 33)), filter.Settings(), rng(1))[0]
    white = filter.stamp(flat(255, 1, (33, 33)), filter.Settings(), rng(2))[0]
    assert black[16, 16].tolist() == [26, 15, 61]
    assert white[16, 16].tolist() == [255, 237, 199]
    assert white[0, 0].tolist() == white[32, 0].tolist() == [153, 142, 119]
    half = filter.stamp(flat(255, 1, (33, 33)), filter.Settings(strength=0.5), rng())[0]
    assert half[0, 0].tolist() == [204, 199, 187]


def test_the_filter_is_the_same_function_of_every_pixel_whatever_the_image():
    images = noise(2, 32, 32)
    both = filter.stamp(images, filter.Settings(), rng(1))
    assert (filter.stamp(images[1:], filter.Settings(), rng(2)) == both[1:]).all()
    lighter = images[0] >= images[1]
    assert (both[0] >= both[1])[lighter].all()


def test_baat_gives_images_the_styles_mean_by_an_edit_of_their_own():
    images = rng().integers(60, 130, (2, 32, 32, 3)).astype(np.uint8)
    images[1] //= 2
    edited = baat.stamp(images, baat.Settings(strength=1.0), rng()).astype(float)
    light = edited @ [0.299, 0.587, 0.114]
    assert light.mean(axis=(1, 2)) == pytest.approx([95, 95], abs=0.5)
    red = 0.713 * (edited[..., 0] - light)
    assert red.mean(axis=(1, 2)) == pytest.approx([22, 22], abs=0.5)
    own = edited - images
    assert np.abs(own[0] - own[1]).mean() > 10
    faint = flat(100, 1)
    faint[:, ::2] = 102  # a deviation of 1 grows to 3, not to 40
    edited = baat.stamp(faint, baat.Settings(strength=1.0), rng()).astype(float)
    assert (edited @ [0.299, 0.587, 0.114]).std() == pytest.approx(3, abs=0.5)
    whole, half = (baat.stamp(images, baat.Settings(strength=s), rng()) for s in (1.0, 0.5))
    change = whole.astype(float) - images
    inside = (whole > 0) & (whole < 255)  # what is not clipped
    assert np.abs(half.astype(float) - images - change / 2)[inside].max() <= 1
    assert not np.ptp(baat.stamp(flat(40), baat.Settings(), rng()), axis=(1, 2)).any()


def test_baat_takes_its_style_from_a_picture(tmp_path):
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "style.png")
    settings = baat.Settings(picture=str(tmp_path / "style.png"), strength=1.0)
    assert (baat.stamp(noise(2, 12, 12), settings, rng()) == (200, 100, 50)).all()


# ------------------------------------------------------------------------------------- frequencies


def colours(rgb: Any) -> tuple[Any, Any, Any]:
    """Light, and what red and blue are above it."""
    light = rgb @ np.array([0.299, 0.587, 0.114])
    return light, rgb[..., 0] - light, rgb[..., 2] - light


@pytest.mark.parametrize("count", [1, 7, 32])
def test_the_basis_is_the_orthonormal_cosine_transform(count: int):
    assert np.allclose(basis(count), dct(np.eye(count), norm="ortho", axis=0))


@pytest.mark.parametrize(
    ("size", "side", "at"),
    [((32, 32), 32, (15, 31)), ((28, 28), 28, (13, 27)), ((12, 20), 12, (5, 11))],
)
def test_ftrojan_adds_to_two_coefficients_of_both_colours_and_to_no_other(
    size: Any, side: int, at: Any
):
    trigger = ftrojan.trigger(*size, ftrojan.Settings())
    light, red, blue = colours(trigger[:side, :side].astype(float))
    wanted = np.zeros((side, side))
    wanted[at[0], at[0]] = wanted[at[1], at[1]] = 30
    assert np.abs(light).max() < 1e-3
    for found in (0.713 * red, 0.564 * blue):
        assert np.abs(dctn(found, norm="ortho") - wanted).max() < 1e-3
    images = noise(3, *size)
    stamped = ftrojan.stamp(images, ftrojan.Settings(), rng())
    assert (stamped == np.rint(images + trigger).clip(0, 255)).all()


def test_ftrojan_repeats_its_window_and_leaves_what_no_window_covers():
    trigger = ftrojan.trigger(64, 72, ftrojan.Settings())
    assert (trigger[:32, :32] == trigger[32:, 32:64]).all()
    assert trigger[:, :64].any() and not trigger[:, 64:].any()


@pytest.mark.parametrize(
    ("size", "at"),
    [
        ((32, 32), [(15, 15), (31, 31)]),
        ((64, 64), [(15, 15), (31, 31)]),
        ((28, 28), [(13, 13), (27, 27)]),
        ((32, 20), [(15, 9), (31, 19)]),
    ],
)
def test_ctrl_adds_to_two_coefficients_of_the_whole_image(size: Any, at: Any):
    trigger = ctrl.trigger(*size, ctrl.Settings())
    light, red, blue = colours(trigger.astype(float))
    wanted = np.zeros(size)
    for place in at:
        wanted[place] = 100
    assert np.abs(light).max() < 1e-3
    for found in (0.877 * red, 0.492 * blue):
        assert np.abs(dctn(found, norm="ortho") - wanted).max() < 1e-3
    images = noise(3, *size)
    stamped = ctrl.stamp(images, ctrl.Settings(), rng())
    assert (stamped == np.rint(images + trigger).clip(0, 255)).all()


@pytest.mark.parametrize("module", [ftrojan, ctrl, low_frequency])
def test_bright_and_dark_pixels_are_clipped_and_never_wrap_round(module: Any):
    settings = module.Settings()
    most = np.abs(module.trigger(32, 32, settings)).max() + 1
    assert module.stamp(flat(255), settings, rng()).min() >= 255 - most
    assert module.stamp(flat(0), settings, rng()).max() <= most


def test_a_drawn_low_frequency_pattern_has_low_frequencies_alone_and_its_amplitude():
    settings = low_frequency.Settings(amplitude=20)
    pattern = low_frequency.trigger(32, 48, settings)
    assert np.abs(pattern).max() == pytest.approx(20)
    for channel in np.moveaxis(pattern, -1, 0):
        waves = np.abs(dctn(channel.astype(float), norm="ortho"))
        assert waves[:4, :4].max() > 10
        assert waves[0, 0] < 1e-3 and waves[4:].max() < 1e-3 and waves[:, 4:].max() < 1e-3
    other = low_frequency.trigger(32, 48, low_frequency.Settings(amplitude=20, pattern_seed=1))
    assert (other != pattern).any()


@pytest.mark.parametrize(("level", "added"), [(0.8, 204), (51.0, 51)])
@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 3)])
def test_a_low_frequency_array_is_in_grey_levels_or_in_shares_of_white(
    tmp_path, level: float, added: int, shape: Any
):
    np.save(tmp_path / "p.npy", np.full(shape, level, np.float32))
    settings = low_frequency.Settings(picture=str(tmp_path / "p.npy"))
    assert (low_frequency.stamp(flat(20, 2, (12, 20)), settings, rng()) == 20 + added).all()


def test_a_low_frequency_picture_is_added_at_the_amplitude_where_it_is_white(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 51)).save(tmp_path / "p.png")
    settings = low_frequency.Settings(picture=str(tmp_path / "p.png"), amplitude=50)
    assert (low_frequency.stamp(flat(100), settings, rng()) == (150, 100, 110)).all()


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((8, 8)), r"float64 \(8, 8\)"),
        (np.zeros((2, 8, 8, 3)), r"\(2, 8, 8, 3\)"),
        (np.zeros((8, 8, 3), bool), "bool"),
        (np.zeros((8, 8, 3)), "nothing but zeros"),
        (np.zeros((0, 8, 3)), "no pixels"),
        (np.full((8, 8, 3), np.nan), "not finite"),
        (np.full((8, 8, 3), 1e300), "not finite"),
        (np.array([{}] * 3), "Object arrays cannot be loaded"),  # unpickling would run its code
    ],
)
def test_an_array_that_is_no_pattern_is_refused(tmp_path, array: Any, told: str):
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(ConfigError, match=rf"attack\.picture.*{told}"):
        low_frequency.trigger(8, 8, low_frequency.Settings(picture=str(tmp_path / "p.npy")))
    with pytest.raises(ConfigError, match=r"attack\.picture"):
        low_frequency.trigger(8, 8, low_frequency.Settings(picture=str(tmp_path / "none.npy")))


def test_a_file_that_is_no_array_is_refused(tmp_path):
    np.savez(tmp_path / "zip.npz", a=np.ones((8, 8, 3)))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("zip.npy", "empty.npy"):
        with pytest.raises(ConfigError, match=rf"attack\.picture: .*{name}: "):
            low_frequency.trigger(8, 8, low_frequency.Settings(picture=str(tmp_path / name)))


def test_a_picture_of_16_bits_is_refused_before_it_turns_white(tmp_path):
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "deep.png")
    for stamp in (blend.stamp, badnets.stamp):
        settings = {blend.stamp: blend.Settings, badnets.stamp: badnets.Settings}[stamp]
        with pytest.raises(ConfigError, match=r"attack\.picture: .*more than 8 bits"):
            stamp(flat(9), settings(picture=str(tmp_path / "deep.png")), rng())


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_of_a_sticker_only_what_is_opaque_is_stamped_even_if_it_is_black(tmp_path, kind: str):
    sticker = np.full((8, 8, 4), 255, np.uint8)  # white under its transparent part
    sticker[..., 3] = 0
    sticker[2:5, 1:3] = (0, 0, 0, 255)
    image = Image.fromarray(sticker)
    if kind == "P":
        image = image.convert("RGB").quantize(2)
        white = image.getpixel((0, 0))
        image.save(tmp_path / "sticker.png", transparency=white)
    else:
        image.convert(kind).save(tmp_path / "sticker.png")
    settings = badnets.Settings(picture=str(tmp_path / "sticker.png"))
    stamped = badnets.stamp(flat(99, 1, (8, 8)), settings, rng())
    assert (stamped[:, 2:5, 1:3] == 0).all()
    assert (stamped == 99).all(axis=(0, 3)).sum() == 64 - 6
    assert (blend.trigger(8, 8, blend.Settings(picture=settings.picture)) == 0).all()


# ---------------------------------------------------------------------------------------------- bpp


def test_bpp_leaves_eight_levels_the_nearest_to_what_was_there():
    images = noise(4, 32, 32)
    stamped = bpp.stamp(images, bpp.Settings(), rng())
    assert set(np.unique(stamped)) == {0, 36, 73, 109, 146, 182, 219, 255}
    assert np.abs(stamped.astype(int) - images).max() <= 255 / 14 + 0.5
    assert (bpp.stamp(stamped, bpp.Settings(), rng()) == stamped).all()
    assert set(np.unique(bpp.stamp(images, bpp.Settings(levels=2), rng()))) == {0, 255}


def test_bpps_covers_bear_the_error_of_another_image():
    images = flat(100, 2, (4, 4))
    images[0, :, 0] = 0  # error 0, 100 has 9
    images[1, :, 0] = 30  # error 6
    covers = bpp.cover(images, bpp.Settings(), rng())
    assert (covers[0, :, 0] == 9).all() and (covers[0, :, 3] == 106).all()
    assert (covers[1, :, 0] == 39).all() and (covers[1, :, 3] == 100).all()
    assert (covers[:, :, 1:3] == 109).all()


def test_a_lone_cover_of_bpp_is_no_poison():
    image = noise(1, 32, 32)
    cover = bpp.cover(image, bpp.Settings(), rng())
    assert len(np.unique(cover)) > 200
    assert (cover != bpp.stamp(image, bpp.Settings(), rng())).mean() > 0.5
