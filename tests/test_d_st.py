"""D-ST: whom a row is drawn to, the contrastive loss against its formula, and the views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from csc_gpu.backend import Batch, open_backend
from csc_gpu.defenses import d_br, d_st, views
from csc_gpu.defenses.views import Views
from csc_gpu.errors import ConfigError
from csc_gpu.models import new_model
from csc_gpu.train import Budget

CPU = open_backend("cpu", 1)
STILL = Views(smallest=1.0, stretch=1.0, jittered=0.0, grey=0.0)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=chance(seed)) * 4 - 2


def test_clean_rows_are_drawn_to_their_label_and_others_to_themselves():
    labels, clean = torch.tensor([0, 0, 0, 1]), torch.tensor([True, False, True, False])
    expected = [[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert d_st.to_each_other(labels, clean).int().tolist() == expected


def test_the_contrastive_loss_is_that_of_its_formula():
    points = functional.normalize(torch.randn(6, 4, generator=chance()), dim=1)
    drawn = d_st.to_each_other(torch.tensor([0, 0, 1]), torch.tensor([True, False, False]))
    drawn = drawn.repeat(2, 2)
    total = 0.0
    for i in range(6):
        others = [k for k in range(6) if k != i]
        scale = sum(math.exp(points[i] @ points[k] / 0.1) for k in others)
        friends = [k for k in others if drawn[i, k]]
        told = [math.log(math.exp(points[i] @ points[k] / 0.1) / scale) for k in friends]
        total -= sum(told) / len(friends)
    assert d_st.contrastive(points, drawn, 0.1).item() == pytest.approx(total / 6, rel=1e-5)


def test_the_head_learns_clean_rows_and_unlearns_poison_a_thousandth_as_strongly():
    poison = torch.tensor([False, True, False])
    net = new_model("resnet8", 2, 8, seed=0)
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]])
    batch = Batch(logits, torch.tensor([0, 0, 1]), torch.arange(3))
    objective = d_st.mixed(poison, lambda batch, step, which: batch.images, net, 0.001)
    plain = functional.cross_entropy(logits, batch.labels, reduction="none")
    expected = (plain[0] + plain[2]) / 2 - 0.001 * plain[1]
    torch.testing.assert_close(objective(lambda images: images, batch, 1), expected)
    assert not net.features.training


def test_the_rate_rises_and_falls_along_a_cosine():
    rate, budget = d_st.cosine(10), Budget(200, 5)
    shares = [rate(step, budget) for step in range(1, 1001)]
    assert max(shares) == pytest.approx(rate(50, budget)) and shares[0] < 0.03
    assert rate(500, budget) == pytest.approx(0.5005)
    assert shares[-1] == pytest.approx(0.001)


def test_views_of_one_step_differ_and_are_the_same_when_asked_again():
    seen = views.seeing(Views(), 1, flip=False)
    batch = Batch(images(), torch.zeros(6), torch.arange(6))
    assert torch.equal(seen(batch, 3, 1), seen(batch, 3, 1))
    assert not torch.equal(seen(batch, 3, 1), seen(batch, 3, 2))
    assert not torch.equal(seen(batch, 3, 1), seen(batch, 4, 1))


# ------------------------------------------------------------------------------------------ views


def test_a_view_without_any_change_is_the_image():
    torch.testing.assert_close(views.view(images(), STILL, chance(), flip=False), images())


def test_half_of_the_views_are_mirrored_if_that_is_allowed():
    many = images(400)
    seen = views.view(many, STILL, chance(), flip=True)
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(seen, many, strict=True)]
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, many, strict=True)]
    assert np.logical_xor(mirrored, same).all() and 150 < sum(mirrored) < 250


def test_a_crop_lies_in_the_image_and_has_the_area_and_shape_it_may_have():
    maps = views.crops(500, Views(), chance(), flip=True).numpy()
    width, height = abs(maps[:, 0, 0]), maps[:, 1, 1]
    assert (abs(maps[:, 0, 2]) + width <= 1 + 1e-6).all()
    assert (abs(maps[:, 1, 2]) + height <= 1 + 1e-6).all()
    assert (width * height).min() > 0.2 * 0.8 and (width * height).max() <= 1
    assert (width / height).max() <= 4 / 3 + 1e-5 and (height / width).max() <= 4 / 3 + 1e-5


def test_a_grey_view_has_the_lightness_of_the_image_in_every_channel():
    how = Views(smallest=1, stretch=1, jittered=0, grey=1)
    seen = views.view(images(), how, chance(), flip=False)
    light = (images() * torch.tensor(views.GREY)[:, None, None]).sum(1)
    for channel in range(3):
        torch.testing.assert_close(seen[:, channel], light, atol=1e-5, rtol=1e-5)


def test_a_grey_image_keeps_no_colour_when_its_hue_is_turned():
    grey = images()[:, :1].expand(-1, 3, -1, -1)
    how = Views(smallest=1, stretch=1, jittered=1, jitter=0, hue=0.5, grey=0)
    torch.testing.assert_close(views.view(grey, how, chance(), flip=False), grey, atol=1e-2, rtol=0)


def test_contrast_is_measured_from_the_mean_of_the_view():
    how = Views(smallest=1, stretch=1, jittered=1, jitter=0.4, hue=0, grey=0)
    dull = 0.2 * images()  # nothing is clipped
    seen = views.view(dull, how, chance(), flip=False)
    again = chance()
    views.crops(len(dull), how, again, flip=False)
    maps, contrast = views.colours(len(dull), how, again)
    mixed = torch.einsum("bij,bjhw->bihw", maps, dull / 4 + 0.5)
    centre = mixed.mean(dim=(1, 2, 3), keepdim=True)
    expected = centre + contrast.view(-1, 1, 1, 1) * (mixed - centre)
    torch.testing.assert_close(seen / 4 + 0.5, expected, atol=1e-5, rtol=1e-5)


def test_brightness_multiplies_light_and_contrast_is_about_1():
    how = Views(smallest=1, stretch=1, jittered=1, jitter=0.4, hue=0, grey=0)
    maps, contrast = views.colours(2000, how, chance())
    bright = maps.sum(dim=2)  # what a grey of 1 becomes
    assert bright.min() >= 0.6 - 1e-5 and bright.max() <= 1.4 + 1e-5
    assert contrast.min() >= 0.6 and contrast.max() <= 1.4
    assert abs(bright.mean() - 1) < 0.02 and abs(contrast.mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        (d_st.Contrast, {"epochs": 0}, "d_st.epochs"),
        (d_st.Contrast, {"temperature": 0.0}, "d_st.temperature"),
        (d_st.Contrast, {"batch": 2}, "d_st.batch"),
        (Views, {"smallest": 0.0}, "views.smallest"),
        (Views, {"stretch": 0.5}, "views.stretch"),
        (Views, {"grey": 2.0}, "views.grey"),
        (d_br.Removal, {"lr": 0.0}, "d_br.lr"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(kind, changes, name):
    with pytest.raises(ConfigError, match=name):
        kind(**changes)
