"""The nets: seeded without touching anyone else's dice, an extractor and a head at any size."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from csc_gpu.backend import open_backend
from csc_gpu.errors import ConfigError
from csc_gpu.models import MODELS, new_model, with_group_norm

open_backend("cpu", 1)

SIZES = (8, 28, 32, 64, 224)
N_FEATURES = {"resnet8": 128, "resnet18": 512, "resnet8-group": 128, "resnet18-group": 512}
# resnet18 does the work of a hundred resnet8: one image where it is large
CASES = [(name, size, 1 if "18" in name else 2) for name in MODELS for size in SIZES]


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=drawn)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_every_net_is_known_here():
    assert set(N_FEATURES) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_weights(name: str):
    assert same_weights(new_model(name, 3, 8, seed=5), new_model(name, 3, 8, seed=5))


@pytest.mark.parametrize("name", MODELS)
def test_another_seed_gives_other_weights(name: str):
    assert not same_weights(new_model(name, 3, 8, seed=5), new_model(name, 3, 8, seed=6))


def test_the_weights_do_not_depend_on_the_global_dice():
    torch.manual_seed(1)
    first = new_model("resnet8", 3, 8, seed=5)
    torch.manual_seed(2)
    assert same_weights(first, new_model("resnet8", 3, 8, seed=5))


def test_building_a_net_leaves_the_global_dice_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    new_model("resnet8", 3, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.parametrize(("name", "size", "count"), CASES)
@torch.inference_mode()
def test_any_size_gives_features_and_the_head_turns_them_into_logits(
    name: str, size: int, count: int
):
    model = new_model(name, 4, size, seed=0).eval()
    batch = images(count, size)
    points = model.features(batch)
    assert points.shape == (count, N_FEATURES[name]) == (count, model.n_features)
    assert points.dtype == torch.float32
    assert torch.equal(model.head(points), model(batch))
    assert model(batch).shape == (count, 4) == (count, model.n_outputs)
    assert model(batch).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_learns(name: str):
    model = new_model(name, 3, 8, seed=0).train()
    model(images(4, 8)).square().sum().backward()
    still = [which for which, weight in model.named_parameters() if not weight.grad.any()]
    assert not still


@torch.inference_mode()
def test_an_image_is_judged_alone_once_the_model_is_in_eval_mode():
    model = new_model("resnet8", 3, 16, seed=0).eval()
    batch = images(5, 16)
    alone = torch.cat([model(batch[row : row + 1]) for row in range(5)])
    torch.testing.assert_close(model(batch), alone, rtol=1e-4, atol=1e-5)


def test_resnet18_is_the_one_of_the_paper():
    # He et al. 2016; torchvision counts 11 689 512 weights with its 1000 outputs
    assert (
        sum(p.numel() for p in new_model("resnet18", 1000, 224, seed=0).parameters()) == 11_689_512
    )


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (64, 3), (65, 7), (224, 7)])
def test_resnet18_takes_the_small_stem_up_to_64_pixels(size: int, kernel: int):
    stem = new_model("resnet18", 2, size, seed=0).features[0]
    assert stem.kernel_size == (kernel, kernel)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_channels_last(name: str):
    wide = [w for w in new_model(name, 2, 8, seed=0).parameters() if w.ndim == 4 and w.shape[2] > 1]
    assert wide
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in wide)


def test_an_unknown_net_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match="unknown model 'resnet9'; there are resnet8, resnet18"):
        new_model("resnet9", 3, 8, seed=0)


@torch.inference_mode()
def test_with_group_norm_an_image_is_judged_alone_in_training_too():
    model = new_model("resnet8-group", 3, 16, seed=0).train()
    batch = images(3, 16)
    torch.testing.assert_close(model(batch)[:1], model(batch[:1]), rtol=1e-4, atol=1e-5)
    assert not [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert with_group_norm("resnet8") == with_group_norm(model.name) == "resnet8-group"


def test_a_net_keeps_its_name():
    assert copy.deepcopy(new_model("resnet8", 3, 8, seed=0)).name == "resnet8"
