"""NONE: its gap and its natural break against direct computations, and what a reset silences."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from csc_gpu.backend import Batch, open_backend
from csc_gpu.defenses import none_defense as none
from csc_gpu.models import Block, new_model
from csc_gpu.types import Corpus

CPU = open_backend("cpu", 1)


def test_the_break_is_the_split_in_two_that_leaves_the_least_variance():
    rng = np.random.default_rng(0)
    values = rng.permutation(np.concatenate([rng.normal(0, 1, 30), rng.normal(7, 2, 5)]))
    ordered = np.sort(values)
    within = [ordered[:cut].var() * cut + ordered[cut:].var() * (35 - cut) for cut in range(1, 35)]
    assert none.jenks(values) == ordered[int(np.argmin(within))]


def test_rows_that_are_all_alike_are_not_parted():
    assert not (np.ones(5) > none.jenks(np.ones(5))).any()
    assert none.jenks(np.ones(1)) == 1.0


def test_a_channel_is_compromised_by_its_largest_value_beyond_what_other_classes_do():
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (60, 3)).astype(np.float32)
    share = np.full((60, 3), 0.05, np.float32)
    share[np.arange(60), np.arange(60) % 2] = 0.9001  # nobody is sure of class 2
    share[0] = (0.5, 0.4, 0.1)  # this row is of no class, nor outside class 0 or 1
    values[0, 1], values[3, 2] = 50.0, 9.0
    found = none.compromise(values, share, none.Neurons(), np)
    wanted = []
    for channel in range(3):
        zero, one = values[2::2, channel], values[1::2, channel]
        gaps = (zero.max() - one.mean() - 3 * one.std(), one.max() - zero.mean() - 3 * zero.std())
        wanted.append(max(0, *gaps))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found.argmax() == 2


def test_layers_are_the_convolutions_of_all_but_the_narrowest_blocks():
    small = none.layers(new_model("resnet8", 4, 8, seed=0))
    widths = [layer.convolution.out_channels for layer in small]
    assert widths == [64, 64, 64, 128, 128, 128]
    deep = list(none.layers(new_model("resnet18", 4, 8, seed=0)))
    assert len(deep) == 15  # as many as the authors watch
    assert all(layer.norm.num_features == layer.convolution.out_channels for layer in deep)


def test_activations_are_the_largest_values_of_each_convolution_row_by_row():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    corpus = Corpus(np.arange(5) % 4, tuple("abcd"), np.arange(5), ("",) * 5, pixels)
    model = new_model("resnet8", 4, 8, seed=0)
    fired, share = none.activations(model, corpus, CPU)
    assert [values.shape for values in fired] == [(5, 64)] * 3 + [(5, 128)] * 3
    with torch.inference_mode():
        images = next(CPU.batches(corpus, 5)).images
        np.testing.assert_allclose(share, model(images).softmax(1).numpy(), rtol=1e-5)
        blocks = [part for part in model.features if isinstance(part, Block)]
        for part in list(model.features)[:4]:
            images = part(images)
        images = blocks[0](images)
        wanted = blocks[1].conv1(images).amax((2, 3)).numpy()
        shortcut = blocks[1].shortcut(images).amax((2, 3)).numpy()
    np.testing.assert_allclose(fired[0], wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fired[2], shortcut, rtol=1e-4, atol=1e-6)
    assert not any(part._forward_hooks for part in model.modules())


def test_a_reset_channel_is_silent_and_the_others_are_as_before():
    model = new_model("resnet8", 4, 8, seed=0).eval()
    layer = next(iter(none.layers(model)))
    images = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))

    def given() -> torch.Tensor:
        return layer.norm(layer.convolution(images)).detach()

    nn.init.constant_(layer.norm.bias, 0.3)
    before = given()
    none.reset(layer, np.array([5, 9]))
    after = given()
    assert (after[:, [5, 9]] == 0).all() and (before[:, [5, 9]] != 0).all()
    others = np.setdiff1d(np.arange(64), [5, 9])
    torch.testing.assert_close(after[:, others], before[:, others])


def test_batch_norm_stays_fixed_while_the_rest_learns():
    model = new_model("resnet8", 4, 8, seed=0).train()
    objective = none.fixed_norms(model)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = model.state_dict()["features.1.running_mean"].clone()
    objective(model, Batch(images, torch.arange(4), torch.arange(4)), 1)
    assert torch.equal(model.state_dict()["features.1.running_mean"], before)
    assert model.training
