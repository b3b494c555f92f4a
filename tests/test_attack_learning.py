"""Attacks that learn their trigger: what they learn is kept, and does what the recipe says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from csc_gpu.attacks import (
    ATTACKS,
    Learned,
    Plan,
    input_aware,
    label_consistent,
    learnt,
    poison,
    ready,
    sample_specific,
    settings_of,
    trojan,
)
from csc_gpu.backend import Settings, open_backend
from csc_gpu.backend.cpu import CpuBackend
from csc_gpu.errors import ConfigError
from csc_gpu.types import Corpus, Split, quiet

CPU = open_backend("cpu", 1)
CLASSES = ("red", "green", "blue", "grey")
TARGET = 2
SMALL: dict[str, tuple[str, ...]] = {
    "trojan": ("train_steps=6", "rounds=12", "step=16"),
    "label-consistent": ("train_steps=16", "steps=8"),
    "input-aware": ("mask_steps=6", "train_steps=6", "batch=40", "width=4"),
    "dynamic": ("mask_steps=6", "train_steps=6", "batch=40", "width=4"),
    "sample-specific": ("train_steps=6", "batch=40", "width=4", "bits=6"),
}


def world(height: int = 16, width: int = 16, n: int = 120, seed: int = 0) -> Split:
    """Noise with a square at some place, whose colour is the class."""

    def part(n: int, seed: int) -> Corpus:
        rng = np.random.default_rng(seed)
        pixels = rng.integers(20, 120, (n, height, width, 3), np.uint8)
        labels = np.arange(n) % len(CLASSES)
        for image, label in zip(pixels, labels, strict=True):
            up, across = rng.integers(2, 6, 2)
            square = image[up : up + 6, across : across + 6]
            square[..., label if label < 3 else slice(None)] = 220
        return Corpus(labels, CLASSES, np.arange(n), ("",) * n, pixels)

    return Split(part(n, seed), part(n // 4, seed + 1))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def plan(attack: str, **more: Any) -> Plan:
    return Plan(attack=attack, target=str(TARGET), **({"rate": 0.1} | more))


@functools.cache
def taught(attack: str, *options: str, seed: int = 0) -> Learned:
    """The attack's trigger for the world, learnt once for all tests."""
    settings = settings_of(attack, options or SMALL[attack])
    learn = ATTACKS[attack].learn
    assert learn is not None
    tensors = learn(world().train, TARGET, settings, CPU, seed, quiet)
    return Learned(settings, tensors, TARGET)


def equal(one: Learned, other: Learned) -> bool:
    mine, theirs = one.tensors, other.tensors
    return mine.keys() == theirs.keys() and all(mine[k].equal(theirs[k]) for k in mine)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("attack", SMALL)
def test_learning_depends_on_the_seed_alone_and_moves_no_other_chance(attack: str):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = taught.__wrapped__(attack)
    assert torch.get_rng_state().equal(before)
    assert equal(taught(attack), again)
    assert not equal(again, taught(attack, seed=1))


@pytest.mark.parametrize("attack", SMALL)
def test_what_is_learnt_lies_on_the_processor_and_is_no_part_of_a_graph(attack: str):
    for tensor in taught(attack).tensors.values():
        assert tensor.device.type == "cpu" and not tensor.requires_grad and tensor.is_contiguous()


class InHalves(CpuBackend):
    """A processor that trains in bfloat16, as a GPU does."""

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("attack", SMALL)
def test_learning_in_bfloat16_gives_whole_and_finite_weights(attack: str):
    learn, settings = ATTACKS[attack].learn, settings_of(attack, SMALL[attack])
    assert learn is not None
    tensors = learn(world(n=60).train, TARGET, settings, InHalves(1, Settings()), 0, quiet)
    for tensor in tensors.values():
        assert tensor.dtype in (torch.float32, torch.int64, torch.uint8)
        assert tensor.isfinite().all()


@pytest.mark.parametrize("attack", SMALL)
def test_learning_tells_how_far_it_is(attack: str):
    told: list[tuple[str, int]] = []

    def log(event: str, **fields: Any) -> None:
        if event == "step":
            told.append((fields["stage"], fields["at"].budget.steps - fields["at"].step))

    learn = ATTACKS[attack].learn
    assert learn is not None
    learn(world(n=60).train, TARGET, settings_of(attack, SMALL[attack]), CPU, 0, log)
    stages = {stage for stage, _ in told}
    assert stages and all((stage, 0) in told for stage in stages)


# ----------------------------------------------------------------------------------------- stamps


@pytest.mark.parametrize("attack", SMALL)
@pytest.mark.parametrize("kind", ["stamp", "test", "cover"])
def test_a_stamp_is_pure_and_changes_every_image_but_not_its_shape(attack: str, kind: str):
    stamp = getattr(ATTACKS[attack], kind)
    if stamp is None:
        return
    images = world().test.images
    untouched = images.copy()
    stamped = stamp(images, taught(attack), rng())
    assert stamped.shape == images.shape and stamped.dtype == np.uint8
    assert (stamped != images).any(axis=(1, 2, 3)).all()
    assert (images == untouched).all()
    assert (stamp(images, taught(attack), rng()) == stamped).all()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@pytest.mark.parametrize("attack", SMALL)
def test_images_need_be_neither_square_nor_a_multiple_of_eight(attack: str):
    split = world(15, 22, n=60)
    trigger = ready(split, plan(attack), settings_of(attack, SMALL[attack]), CPU)
    stamped = trigger.poison(split.test.images, np.full(len(split.test), TARGET))
    assert stamped.shape == split.test.images.shape
    assert (stamped != split.test.images).any()


@pytest.mark.parametrize("attack", SMALL)
def test_many_images_are_stamped_as_each_of_them_would_be(
    attack: str, monkeypatch: pytest.MonkeyPatch
):
    images = world().test.images[:9]
    stamp, trigger = ATTACKS[attack].stamp, taught(attack)
    together = stamp(images, trigger, rng()).astype(int)
    monkeypatch.setattr(learnt, "TOGETHER", 2)
    assert np.abs(stamp(images, trigger, rng()).astype(int) - together).max() <= 2


@pytest.mark.parametrize("attack", SMALL)
def test_poison_is_stamped_and_labelled_as_the_attack_says(attack: str):
    split = world()
    trigger = ready(split, plan(attack), settings_of(attack, SMALL[attack]), CPU)
    poisoned, key = poison(split, trigger)
    assert key.is_poison.sum() == 12
    assert (poisoned.train.labels[key.is_poison] == TARGET).all()
    relabelled = key.orig_labels != key.given_labels
    assert (relabelled == (key.is_poison & (ATTACKS[attack].labels == "dirty"))).all()
    assert key.is_cover.sum() == (12 if attack == "input-aware" else 0)
    assert (key.triggered != split.test.images).any(axis=(1, 2, 3)).all()


# ------------------------------------------------------------------------------------------ cache


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often label-consistent has learnt."""
    calls = []

    def learn(corpus: Corpus, target: int, *rest: Any) -> dict[str, torch.Tensor]:
        calls.append(target)
        return {"numbers": torch.arange(5.0) + len(calls)}

    attack = replace(ATTACKS["label-consistent"], learn=learn)
    monkeypatch.setitem(ATTACKS, "label-consistent", attack)
    return lambda: len(calls)


def learns(split: Split | None = None, *, backend: Any = CPU, seed: int = 0, **changes: Any) -> Any:
    """The tensors of label-consistent, by way of the cache."""
    target = changes.pop("target", str(TARGET))
    how = Plan(attack="label-consistent", target=target, rate=0.1, seed=seed)
    settings = label_consistent.Settings(**changes)
    trigger = ready(world() if split is None else split, how, settings, backend)
    return trigger.how.tensors


def only_file(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "csc-gpu" / "triggers").iterdir()
    return found


def test_what_was_learnt_is_not_learnt_again(count: Callable[[], int], tmp_path: Path):
    first, second = learns(), learns()
    assert count() == 1
    assert first["numbers"].equal(second["numbers"])
    assert only_file(tmp_path).suffix == ".safetensors"


def test_whatever_a_trigger_depends_on_makes_another(
    count: Callable[[], int], monkeypatch: pytest.MonkeyPatch
):
    learns()
    other, relabelled, narrow = world(), world(), world()
    other.train.images[7, 3, 3, 1] ^= 1
    relabelled.train.labels[:2] = relabelled.train.labels[:2][::-1]
    narrow = replace(narrow, train=replace(narrow.train, classes=(*CLASSES, "none")))
    learns(eps=9.0)
    learns(seed=1)
    learns(target="1")
    for number, split in enumerate((other, relabelled, narrow)):
        learns(split)
        assert count() == 5 + number
    gpu = CpuBackend(1, Settings())
    monkeypatch.setattr(gpu, "name", "gpu", raising=False)
    learns(backend=gpu)
    threaded = CpuBackend(1, Settings())
    monkeypatch.setattr(threaded, "threads", 2)
    learns(backend=threaded)
    monkeypatch.setattr(CpuBackend, "machine", "another, 1 threads")
    learns()
    monkeypatch.setattr(learnt, "FORMAT", learnt.FORMAT + 1)
    learns()
    assert count() == 11
    learns()
    assert count() == 11


def test_the_recipe_tells_learnt_triggers_apart():
    split, found = world(n=60), []
    for seed in (0, 0, 1):
        settings = settings_of("trojan", SMALL["trojan"])
        _, key = poison(split, ready(split, plan("trojan", seed=seed), settings, CPU))
        found.append(key.recipe["sha256"])
    assert found[0] == found[1] != found[2]
    assert all(set(told) == {"learnt"} and len(told["learnt"]) == 64 for told in found)


def test_the_held_out_part_and_the_rate_make_no_other_trigger(count: Callable[[], int]):
    learns()
    split = world()
    learns(replace(split, test=split.test.take(np.arange(3))))
    assert count() == 1


@pytest.mark.parametrize(
    "harm", ["cut", "flipped", "empty", "text", "foreign", "other's", "folder"]
)
def test_a_file_that_cannot_be_trusted_is_made_anew(
    harm: str, count: Callable[[], int], tmp_path: Path
):
    learns()
    file = only_file(tmp_path)
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-3])
    elif harm == "flipped":
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif harm == "foreign":
        save_file({"numbers": torch.zeros(5, dtype=torch.bfloat16)}, file)
    elif harm == "other's":
        learns(eps=9.0)
        others = [f for f in file.parent.iterdir() if f != file]
        file.write_bytes(others[0].read_bytes())
    elif harm == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(b"" if harm == "empty" else b"no tensors here")
    before = count()
    learnt_anew = learns()
    assert count() == before + 1
    if harm == "folder":
        return
    assert learns()["numbers"].equal(learnt_anew["numbers"])
    assert count() == before + 1
    assert not list(file.parent.glob("*.partial"))


def test_where_nothing_can_be_kept_the_trigger_is_learnt_all_the_same(
    count: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    learns()
    learns()
    assert count() == 2


def test_a_mask_painted_over_makes_another_trigger(tmp_path: Path):
    path = tmp_path / "mask.png"
    patterns = []
    for side in (3, 5):
        picture = np.zeros((16, 16), np.uint8)
        picture[:side, :side] = 255
        Image.fromarray(picture).save(path)
        settings = settings_of("trojan", SMALL["trojan"], mask=str(path))
        patterns.append(ready(world(), plan("trojan"), settings, CPU).how.tensors["mask"].sum())
    assert patterns == [9, 25]


@pytest.mark.parametrize("attack", SMALL)
def test_a_kept_trigger_stamps_as_it_did(attack: str):
    split, settings = world(n=60), settings_of(attack, SMALL[attack])
    images, wanted = split.test.images, np.full(len(split.test), TARGET)
    fresh, kept = (ready(split, plan(attack), settings, CPU) for _ in range(2))
    assert equal(fresh.how, kept.how)
    assert (fresh.poison(images, wanted) == kept.poison(images, wanted)).all()


# ----------------------------------------------------------------------------------------- trojan


def test_the_trojan_pattern_lies_in_its_square_and_is_added_without_wrapping():
    images, trigger = world().test.images, taught("trojan")
    stamped = trojan.stamp(images, trigger, rng())
    place = np.zeros((16, 16), bool)
    place[10:14, 10:14] = True
    assert ((stamped != images).any(axis=(0, 3)) == place).all()
    assert (stamped >= images).all()
    bright = trojan.stamp(np.full_like(images, 250), trigger, rng())
    assert (bright >= 250).all() and (bright == 255).any()


def test_the_trojan_pattern_raises_the_neurons_it_was_made_for():
    trigger, split = taught("trojan"), world()
    settings = trigger.settings
    net = learnt.surrogate(split.train, settings.model, settings.train_steps, CPU, 0, quiet)
    weights = net.head.weight.abs().sum(0)
    chosen = trigger.tensors["neurons"]
    assert len(chosen) == 2
    assert (
        weights[chosen].min() >= weights[torch.isin(torch.arange(128), chosen, invert=True)].max()
    )

    def value(images: Any) -> float:
        with torch.no_grad():
            return float(net.features(learnt.seen(images))[:, chosen].mean())

    images = split.test.images
    unguided = replace(settings, rounds=1, step=1e-6)
    where = trigger.tensors["mask"].numpy()
    noise = trojan.excited(net, split.train, where, unguided, CPU, 0, quiet)["pattern"]
    random = Learned(settings, {**trigger.tensors, "pattern": noise}, TARGET)
    raised = value(trojan.stamp(images, trigger, rng()))
    assert raised > value(images)
    assert raised > value(trojan.stamp(images, random, rng()))
    assert trigger.tensors["raised"][1] > trigger.tensors["raised"][0]


def test_the_search_for_the_trojan_pattern_ends_at_its_aim():
    split, rounds = world(), []
    settings = settings_of("trojan", ("aim=1e-9", *SMALL["trojan"]))

    def log(event: str, **fields: Any) -> None:
        rounds.extend([event] if event == "trojan" else [])

    trojan.learn(split.train, TARGET, settings, CPU, 0, log)
    assert not rounds


def test_the_fixed_trojan_is_a_coloured_square_and_trains_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(learnt, "surrogate", None)
    split = world(32, 32, n=60)
    trigger = ready(split, plan("trojan"), trojan.Settings(fixed=True))
    images = split.test.images
    stamped = trigger.poison(images, np.full(len(images), TARGET))
    place = np.zeros((32, 32), bool)
    place[21:29, 21:29] = True
    assert ((stamped != images).any(axis=(0, 3)) == place).all()
    square = stamped[:, 21:29, 21:29]
    assert (square == square[0]).all()
    assert len(np.unique(square[0].reshape(-1, 3), axis=0)) == 64


def test_the_fixed_trojan_takes_a_picture(tmp_path: Path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[2:5, 1:3] = (9, 90, 200)
    Image.fromarray(picture).save(tmp_path / "mark.png")
    settings = settings_of("trojan", ("fixed=true",), picture=str(tmp_path / "mark.png"))
    images = world().test.images
    trigger = ready(world(), plan("trojan"), settings)
    stamped = trigger.poison(images, np.full(len(images), TARGET))
    place = picture.any(axis=2)
    assert (stamped[:, place] == (9, 90, 200)).all()
    assert (stamped[:, ~place] == images[:, ~place]).all()


@pytest.mark.parametrize(("height", "width"), [(64, 16), (16, 64), (8, 5)])
def test_the_trojan_square_is_sized_by_the_shorter_side(height: int, width: int):
    where = trojan.covered(height, width, trojan.Settings())[..., 0].astype(bool)
    side, margin = (4, 2) if min(height, width) == 16 else (1, 0)
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    assert rows.tolist() == list(range(height - margin - side, height - margin))
    assert columns.tolist() == list(range(width - margin - side, width - margin))


def test_a_trojan_pattern_is_for_images_of_one_size():
    with pytest.raises(ConfigError, match="learnt for images of"):
        trojan.stamp(world(20, 20).test.images, taught("trojan"), rng())


# ------------------------------------------------------------------------------- label-consistent


def corners(height: int, width: int) -> Any:
    place = np.zeros((height, width), bool)
    for rows in (slice(0, 3), slice(-3, None)):
        for columns in (slice(0, 3), slice(-3, None)):
            place[rows, columns] = True
    return place


@pytest.mark.parametrize("eps", [8.0, 2.6])
def test_the_perturbation_stays_within_eps_and_the_corners_are_the_checkerboard(eps: float):
    known = taught("label-consistent")
    trigger = replace(known, settings=replace(known.settings, eps=eps))
    images = world().test.images
    images[0], images[1] = 0, 255  # so that clipping is seen, too
    stamped = label_consistent.stamp(images, trigger, rng())
    place = corners(16, 16)
    change = np.abs(stamped.astype(int) - images)[:, ~place]
    assert change.max() == int(eps)
    assert (change > 0).any(axis=(1, 2)).all()
    assert (stamped[:, place].reshape(-1, 36, 3) == stamped[0, place]).all()
    assert set(stamped[0, place].ravel()) == {0, 255} and (stamped[0, place] == 255).sum() == 16 * 3


def test_the_perturbation_raises_the_loss_of_the_surrogate():
    trigger = taught("label-consistent")
    split = world()
    mine = split.test.images[split.test.labels == TARGET]
    net = label_consistent.surrogate(trigger, 16)
    pushed = label_consistent.pushed(net, mine, TARGET, trigger.settings)
    labels = torch.full((len(mine),), TARGET)
    with torch.no_grad():
        before, after = (
            functional.cross_entropy(net(learnt.seen(x)), labels, reduction="none")
            for x in (mine, pushed)
        )
    assert (after > before).all()
    by_chance = rng().choice([-8, 8], mine.shape) + mine.astype(int)
    with torch.no_grad():
        noisy = learnt.seen(by_chance.clip(0, 255).astype(np.uint8))
        random = functional.cross_entropy(net(noisy), labels)
    assert after.mean() - before.mean() > 2 * (random - before.mean()).abs()


def test_held_out_images_get_the_patch_without_the_perturbation():
    split = world()
    trigger = ready(
        split,
        plan("label-consistent"),
        settings_of("label-consistent", SMALL["label-consistent"]),
        CPU,
    )
    _, key = poison(split, trigger)
    place = corners(16, 16)
    assert (key.triggered[:, ~place] == split.test.images[:, ~place]).all()
    assert (key.triggered[:, place] == key.triggered[0, place]).all()


def test_a_weaker_patch_shines_through():
    known = taught("label-consistent")
    trigger = replace(known, settings=replace(known.settings, amplitude=32.0))
    images = np.full((1, 16, 16, 3), 100, np.uint8)
    patched = label_consistent.patched(images, trigger, rng())
    assert set(patched[:, corners(16, 16)].ravel()) == {68, 132}


# -------------------------------------------------------------------------- input-aware, dynamic


@pytest.mark.parametrize("attack", ["input-aware", "dynamic"])
def test_masks_and_patterns_differ_between_images(attack: str):
    nets = input_aware.revived(taught(attack))
    images = learnt.seen(world().test.images)
    with torch.no_grad():
        masks, patterns = nets.mask(images), nets.pattern(images)
    for made in (masks, patterns):
        apart = (made[1:] - made[:-1]).abs().flatten(1).amax(1)
        assert (apart > 0.01).all()
    assert masks.min() >= 0 and masks.max() <= 1
    assert patterns.abs().max() <= 2


def test_outside_its_mask_an_image_is_left_as_it_was():
    nets = input_aware.Nets(*(torch.nn.Identity() for _ in range(2)))  # type: ignore[arg-type]
    images = torch.tensor([[[[2.0, -2.0]]] * 3])
    mask = nets.mask(images[:, :1])
    assert mask[0, 0, 0, 0] > 0.999 and mask[0, 0, 0, 1] < 0.001
    stamped = images + mask * (nets.pattern(images) - images)
    assert stamped[0, :, 0, 1].allclose(images[0, :, 0, 1], atol=0.01)
    assert stamped[0, :, 0, 0].allclose(nets.pattern(images)[0, :, 0, 0], atol=0.01)


def test_covers_carry_the_pattern_of_another_image_and_never_their_own():
    images, trigger = world().test.images[:12], taught("input-aware")
    crossed = input_aware.cross(images, trigger, rng())
    donors = []
    for image, cover in zip(images, crossed, strict=True):
        every = input_aware.patterned(np.repeat(image[None], 12, axis=0), images, trigger)
        donors.append(int(np.abs(every.astype(int) - cover).max(axis=(1, 2, 3)).argmin()))
        assert np.abs(every[donors[-1]].astype(int) - cover).max() <= 2
    assert sorted(donors) == list(range(12))
    assert all(donor != row for row, donor in enumerate(donors))


def test_poison_carries_its_own_pattern_and_the_covers_among_it_another_one():
    images = world().test.images[:6]
    trigger = ready(world(), plan("input-aware"), taught("input-aware").settings, CPU)
    poisoned, covers = trigger.poison(images, np.full(6, TARGET)), trigger.cover(images)
    for image, stamped, cover in zip(images, poisoned, covers, strict=True):
        alone = input_aware.patterned(image[None], image[None], trigger.how)[0].astype(int)
        assert np.abs(stamped - alone).max() <= 2
        assert np.abs(cover - alone).max() > 2


def test_a_lone_cover_carries_the_pattern_of_a_training_image():
    trigger, image = taught("input-aware"), world().test.images[:1]
    crossed = input_aware.cross(image, trigger, rng())
    donor = trigger.tensors["donors"][:1].numpy()
    assert (crossed == input_aware.patterned(image, donor, trigger)).all()
    assert (crossed != input_aware.stamp(image, trigger, rng())).any()
    itself = trigger.tensors["donors"][:1].numpy()
    other = trigger.tensors["donors"][1:2].numpy()
    lone = input_aware.cross(itself, trigger, rng())
    assert (lone == input_aware.patterned(itself, other, trigger)).all()


def test_equal_images_break_no_loss():
    images = torch.zeros(4, 3, 8, 8, requires_grad=True)
    apart = input_aware.alike(images, images, images, images)
    apart.backward()
    assert apart.isfinite() and images.grad is not None and images.grad.isfinite().all()


def test_patterns_that_are_alike_cost_more_than_patterns_that_differ():
    one, other = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    alike = input_aware.alike(one, other, one, one + 0.1)
    assert input_aware.alike(one, other, one, other) < alike


# -------------------------------------------------------------------------------- sample-specific

LONGER = ("train_steps=60", "batch=40", "width=8", "bits=4", "strength=48", "lr=6e-3", "faint=0.5")


def test_the_decoder_reads_the_secret_in_stamped_images_alone():
    trigger, images = taught("sample-specific", *LONGER), world().test.images
    secret = trigger.tensors["secret"].numpy().astype(bool)
    stamped = sample_specific.stamp(images, trigger, rng())
    right = (sample_specific.hidden(stamped, trigger) == secret).mean()
    unstamped = (sample_specific.hidden(images, trigger) == secret).mean()
    assert right > 0.75 and right > unstamped + 0.1


def test_other_bits_are_another_residual_and_can_be_read():
    trigger, images = taught("sample-specific", *LONGER), world().test.images
    flipped = {**trigger.tensors, "secret": 1 - trigger.tensors["secret"]}
    other = Learned(trigger.settings, flipped, TARGET)
    stamped = sample_specific.stamp(images, other, rng())
    assert (stamped != sample_specific.stamp(images, trigger, rng())).any()
    read = sample_specific.hidden(stamped, trigger)
    assert (read == flipped["secret"].numpy().astype(bool)).mean() > 0.75


def test_the_residual_is_bounded_and_differs_between_images():
    trigger = taught("sample-specific", *LONGER)
    images = world().test.images
    change = sample_specific.stamp(images, trigger, rng()).astype(int) - images
    assert 4 < np.abs(change).max() <= 48
    inside = (images > 50) & (images < 200)  # where nothing was clipped
    both = inside[1:] & inside[:-1]
    assert ((change[1:] != change[:-1]) & both).any(axis=(1, 2, 3)).all()


def test_a_fainter_residual_can_be_asked_for():
    images = world().test.images
    changes = []
    for more in ((), ("faint=40",)):
        trigger = taught("sample-specific", *LONGER, *more)
        stamped = sample_specific.stamp(images, trigger, rng()).astype(int)
        changes.append(np.abs(stamped - images).mean())
    assert changes[1] < 0.7 * changes[0]


def test_a_residual_costs_more_where_the_image_is_flat():
    flat = torch.zeros(1, 3, 8, 8)
    lively = flat.clone()
    lively[..., ::2] = 1
    residual = torch.full_like(flat, 0.1)
    there, here = (sample_specific.to_the_eye(x, residual) for x in (lively, flat))
    assert there < here and here.isclose(torch.tensor(0.01))


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("attack", SMALL)
def test_an_attack_that_learns_has_one_target_and_needs_a_machine(attack: str):
    split = world(n=60)
    told = "has one target" if ATTACKS[attack].labels == "clean" else "one target|one class"
    with pytest.raises(ConfigError, match=told):
        ready(split, replace(plan(attack), target="red,blue"), None, CPU)
    with pytest.raises(ConfigError, match=told):
        ready(split, replace(plan(attack), target="all"), None, CPU)
    with pytest.raises(ConfigError, match="needs a machine"):
        ready(split, plan(attack), None, None)


@pytest.mark.parametrize(
    ("attack", "option"),
    [
        ("trojan", "neurons=0"),
        ("trojan", "model=vgg"),
        ("trojan", "step=0"),
        ("trojan", "picture=x.png"),
        ("label-consistent", "eps=0"),
        ("label-consistent", "steps=0"),
        ("input-aware", "share=0.6"),
        ("input-aware", "cover=-1"),
        ("input-aware", "width=6"),
        ("dynamic", "cover=1"),
        ("dynamic", "density=1"),
        ("sample-specific", "bits=0"),
        ("sample-specific", "strength=0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(attack: str, option: str):
    with pytest.raises(ConfigError, match=option.split("=")[0]):
        settings_of(attack, [option])


def test_a_mask_that_is_no_picture_is_told(tmp_path: Path):
    settings = settings_of("trojan", SMALL["trojan"], mask=str(tmp_path / "none.png"))
    with pytest.raises(ConfigError, match=r"attack\.mask"):
        ready(world(n=60), plan("trojan"), settings, CPU)


def test_patches_that_do_not_fit_are_told():
    with pytest.raises(ConfigError, match="do not fit"):
        label_consistent.patched(
            np.zeros((1, 5, 9, 3), np.uint8), taught("label-consistent"), rng()
        )
