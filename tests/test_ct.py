"""Confusion Training: its test against SciPy, what it distils, and what confusion asks of a net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.nn import functional

from csc_gpu.backend import Batch, open_backend
from csc_gpu.config import override
from csc_gpu.defenses import confusion, ct
from csc_gpu.defenses.course import Course
from csc_gpu.defenses.streams import Stream
from csc_gpu.errors import ConfigError
from csc_gpu.train import cross_entropy
from csc_gpu.types import DefenderView
from tests.fake_gpu import fake_gpu
from tests.test_defenses import clean, ran
from tests.test_gpu_backend import digits
from tests.test_train import corpus
from tests.worlds import World, world

CPU = open_backend("cpu", 1)


def two_groups(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 1, (90, 2)) @ np.array([[2.0, 0.5], [0.0, 0.7]])
    isolated = np.arange(90) % 3 == 0
    points[isolated] = 0.4 * points[isolated] + np.array([3.0, -1.0])
    return points, isolated


def test_the_likelihood_ratio_is_that_of_scipy():
    points, isolated = two_groups()
    of = {
        side: multivariate_normal(
            points[isolated == side].mean(axis=0), np.cov(points[isolated == side].T) + np.eye(2)
        )
        for side in (True, False)
    }
    alone = sum(of[False].logpdf(point) for point in points)
    apart = sum(of[bool(side)].logpdf(x) for x, side in zip(points, isolated, strict=True))
    expected = (apart - alone) / len(points)
    assert expected > 0.3
    assert ct.log_ratio(points, isolated, 1.0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("few", [0, 1, 89, 90])
def test_a_side_of_fewer_rows_than_a_gaussian_needs_tells_nothing(few: int):
    points, _ = two_groups()
    assert ct.log_ratio(points, np.arange(90) < few, 0.001) == 0


def test_a_class_that_varies_in_one_direction_alone_is_tested_along_that():
    points, isolated = two_groups()
    across = points[:, :1]
    flat = np.concatenate([across, np.zeros_like(across)], axis=1)
    expected = ct.log_ratio(across, isolated, 0.5)
    assert ct.log_ratio(flat, isolated, 0.5) == pytest.approx(expected)


def verdict_on(there, told, backend=CPU, **changes):
    settings = override(ct.Settings(), changes)
    points = backend.xp.asarray(there.points)
    losses = np.zeros(len(told), np.float32)
    return ct.judge(points, there.labels, told, losses, settings, backend)


@pytest.mark.parametrize("backend", [CPU, fake_gpu()], ids=["cpu", "fake"])
def test_fitted_rows_apart_from_the_rest_of_their_class_are_suspect(backend):
    there = world(1)
    rng = np.random.default_rng(0)
    fitted = there.poison | (rng.random(len(there.labels)) < 0.05)  # by chance, everywhere
    told = np.where(fitted, there.labels, (there.labels + 1) % 4)
    found = verdict_on(there, told, backend)
    assert found.suspect[there.poison].all()
    assert not found.suspect[~fitted | (there.labels != 0)].any()
    ratios = found.notes["log_likelihood_ratios"]
    assert ratios["0"] > np.log(2) > np.log(1.5) > max(ratios[name] for name in "123")
    assert found.score[found.suspect].min() >= 0.5 > found.score[~found.suspect].max()


def test_only_the_class_of_the_largest_ratio_may_be_below_what_is_sure():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 200)
    fitted = np.arange(600) % 5 == 0
    points = rng.normal(0, 1, (600, 5)).astype(np.float32)
    points[fitted] += np.array([2.5, 2.0, 0.0])[labels[fitted]][:, None]  # class 0 the most
    told = np.where(fitted, labels, (labels + 1) % 3)
    there = World(points, labels, fitted, told)
    ratios = verdict_on(there, told).notes["log_likelihood_ratios"]
    assert ratios["0"] > ratios["1"] > ratios["2"]
    between = float(np.exp((ratios["1"] + ratios["2"]) / 2))
    for surely, named in ((1000.0, {0}), (between, {0, 1})):
        how = {"ct.surely": surely, "ct.likely": between}
        assert set(labels[verdict_on(there, told, **how).suspect]) == named


def test_the_lowest_losses_are_distilled_and_no_class_runs_dry():
    losses = np.array([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0], np.float32)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(ct.distilled(losses, labels, 0.25, 0.01), [0, 1])
    np.testing.assert_array_equal(ct.distilled(losses, labels, 0.25, 0.5), [0, 1, 4, 5])


def test_a_class_weighs_the_less_the_more_rows_it_has():
    weights = confusion.evened(np.array([0] * 75 + [1] * 25), 3, 0.001)
    np.testing.assert_allclose(weights, [0.751**-0.5, 0.251**-0.5, 0.001**-0.5])


class Sure(torch.nn.Module):
    """Says that every image is of class 2 of 4, whatever it shows."""

    n_outputs = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.one_hot(torch.full((len(images),), 2), 4).float()


def test_a_clean_image_never_gets_the_label_that_the_undefended_net_gives_it():
    seen: list[torch.Tensor] = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), 4, requires_grad=True)
        logits.register_hook(lambda slope: seen.append(slope))
        return logits

    stream = Stream(corpus(), 4, CPU, seed=(0,))
    objective = confusion.confusion(Sure(), stream, torch.ones(4), weight=20, every=100)
    batch = Batch(torch.zeros(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    wrong = set()
    for step in range(2, 14):
        objective(forward, batch, step).backward()
        asked = seen.pop().argmin(1)  # the logit that is to grow
        assert (asked == asked[0]).all()
        wrong.add(int(asked[0]))
    assert wrong == {0, 1, 3}


def test_every_round_asks_the_undefended_net_and_not_its_own(monkeypatch):
    asked = []

    def confusion_of(net, *rest, **how):
        asked.append(net)
        return cross_entropy

    monkeypatch.setattr(confusion, "confusion", confusion_of)
    outcome = ran("ct", digits()[0])
    assert len(asked) == 2 and all(net is outcome.undefended for net in asked)
    assert not outcome.undefended.training
    assert {"train", "fit-0", "confuse-0", "fit-1", "confuse-1"} <= set(outcome.seconds)


def test_distilled_rows_join_every_second_step_with_one_part_in_twenty():
    stream = Stream(corpus(), 4, CPU, seed=(0,))
    weights = torch.tensor([1.0, 3.0, 1.0, 1.0])
    objective = confusion.confusion(Sure(), stream, weights, weight=20, every=2)
    images = torch.zeros(5, 3, 8, 8)
    batch = Batch(images, torch.zeros(5, dtype=torch.int64), torch.arange(5))

    def forward(images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, :4, 0]

    joined = Stream(corpus(), 4, CPU, seed=(0,))[1]  # of step 3
    wrong = torch.full((5,), (2 + 1 + 2) % 4)
    confused = functional.cross_entropy(forward(images), wrong)
    told = functional.cross_entropy(forward(joined.images), joined.labels, reduction="none")
    share = weights[joined.labels]
    expected = (19 * confused + (told * share).sum() / share.sum()) / 20
    torch.testing.assert_close(objective(forward, batch, 3), expected)
    assert objective(forward, batch, 4) == functional.cross_entropy(
        forward(images), torch.full((5,), (2 + 1 + 0) % 4)
    )


def test_the_last_round_trains_on_distilled_rows_and_the_reserve_together():
    suspect, trusted = clean(0, 20), clean(300, 330)
    course = Course(DefenderView(suspect, trusted), ct.Settings(), CPU, seed=0)
    both = confusion.with_reserve(course, np.array([3, 7]))
    np.testing.assert_array_equal(both.images[:2], suspect.images[[3, 7]])
    np.testing.assert_array_equal(both.images[2:], trusted.images)
    np.testing.assert_array_equal(both.labels[:2], suspect.labels[[3, 7]])
    np.testing.assert_array_equal(both.labels[2:], trusted.labels)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lr": (0.1,)}, "lr"),
        ({"iterations": (0,) * 6}, "iterations"),
        ({"kept": (0.5, 0.0, 0.1, 0.1, 0.1)}, "kept"),
        ({"least": (0.5,)}, "least"),
        ({"ridge": 0.0}, "ridge"),
        ({"batch": 2}, "batch"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(changes, name):
    with pytest.raises(ConfigError, match=f"ct.{name}"):
        confusion.Confusion(**changes)
