"""Nets of other libraries as ours, weights to start from, and another layer to cluster."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from csc_gpu import borrowed, csc
from csc_gpu.backend import open_backend
from csc_gpu.borrowed import split, start_from
from csc_gpu.config import override
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.features import Settings, features, width
from csc_gpu.models import new_model
from csc_gpu.types import Corpus
from tests.test_cli import QUICK, assert_refused, call, finished, own_cache  # noqa: F401

CPU = open_backend("cpu", 1)
SMALL = "torchvision:shufflenet_v2_x0_5"


def corpus(n: int = 5, size: int = 16) -> Corpus:
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
    return Corpus(np.arange(n) % 2, ("a", "b"), np.arange(n), ("",) * n, pixels)


def weights_of(net: nn.Module, path: Path, drop: tuple[str, ...] = ()) -> Path:
    held = net.state_dict().items()
    save_file({name: v.contiguous() for name, v in held if name not in drop}, path)
    return path


# --- nets ---------------------------------------------------------------------------------------


def test_somebody_s_net_split_answers_as_before():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(4, 2))
    images = torch.rand(3, 3, 8, 8)
    ours = split(net, "4")
    assert (ours.n_features, ours.n_outputs) == (4, 2)
    torch.testing.assert_close(ours((images - 0.5) / 0.25), net(images))
    assert isinstance(net[4], nn.Linear)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    scaled = split(net, "4", (tuple(mean.tolist()), tuple(std.tolist())))
    theirs = net((images - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(scaled((images - 0.5) / 0.25), theirs)


def test_a_net_of_torchvision_is_a_net_of_ours_with_the_library_s_weights():
    from torchvision.models import get_model

    net = new_model(SMALL, 3, 32, seed=0)
    theirs = get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    ours = {name.removeprefix("features.body."): v.shape for name, v in net.state_dict().items()}
    assert {n: v.shape for n, v in theirs.items() if not n.startswith("fc.")} == {
        name: shape for name, shape in ours.items() if not name.startswith("head.")
    }
    assert (net.n_features, net.n_outputs) == (1024, 3)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")
def test_a_net_of_timm_is_a_net_of_ours():
    net = new_model("timm:resnet10t", 3, 16, seed=0).eval()
    again = new_model("timm:resnet10t", 3, 16, seed=0).eval()
    images = torch.rand(2, 3, 16, 16)
    assert net(images).shape == (2, 3)
    assert torch.equal(net(images), again(images))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:nope", "builds no net 'nope'"),
        ("torchvision:squeezenet1_0", "does not end in one linear layer"),
        ("torchvision:vit_b_16", "does not take images of 32x32"),
        (
            "keras:resnet",
            "there are resnet8, resnet18, resnet8-group, resnet18-group, timm:NAME",
        ),
        ("timm", "there are resnet8"),
    ],
)
def test_a_net_that_cannot_be_built_is_refused_in_one_line(name: str, said: str):
    with pytest.raises(ConfigError, match=said), torch.device("meta"):
        new_model(name, 3, 32, seed=0)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(borrowed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install timm"):
        new_model("timm:resnet18", 3, 32, seed=0)


# --- weights to start from ----------------------------------------------------------------------


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_net_starts_from_weights_of_its_kind_head_and_all(tmp_path):
    trained, net = (new_model("resnet8", 3, 8, seed=seed) for seed in (1, 2))
    start_from(net, weights_of(trained, tmp_path / "w"))
    assert equal(net, trained)


def test_a_head_of_other_classes_stays_fresh(tmp_path):
    trained = new_model("resnet8", 7, 8, seed=1)
    net, fresh = (new_model("resnet8", 3, 8, seed=2) for _ in range(2))
    start_from(net, weights_of(trained, tmp_path / "w"))
    assert equal(net.features, trained.features) and equal(net.head, fresh.head)


def test_a_library_s_own_file_serves_and_its_classifier_is_left(tmp_path):
    from torchvision.models import get_model

    theirs = get_model("shufflenet_v2_x0_5", weights=None, num_classes=11)
    net = new_model(SMALL, 3, 32, seed=2)
    start_from(net, weights_of(theirs, tmp_path / "w"))
    assert equal(net.features.body.stage3, theirs.stage3)


def test_weights_of_another_net_are_refused_with_the_first_difference(tmp_path):
    net = new_model("resnet8", 3, 8, seed=0)
    other = weights_of(new_model("resnet18", 3, 8, seed=0), tmp_path / "other")
    with pytest.raises(CorpusError, match=r"lacks features\.\d"):
        start_from(net, other)
    wide = {**net.state_dict(), "features.1.bias": torch.ones(17)}
    save_file({name: value.contiguous() for name, value in wide.items()}, tmp_path / "wide")
    with pytest.raises(CorpusError, match=r"features\.1\.bias has shape \(17,\) there, \(16,\)"):
        start_from(net, tmp_path / "wide")
    lacking = weights_of(net, tmp_path / "lacking", drop=("features.1.weight",))
    with pytest.raises(CorpusError, match=r"lacks features\.1\.weight"):
        start_from(net, lacking)
    more = {**net.state_dict(), "x.a": torch.ones(1), "y.b": torch.ones(1)}
    save_file({name: value.contiguous() for name, value in more.items()}, tmp_path / "more")
    with pytest.raises(CorpusError, match="also holds x, y"):
        start_from(net, tmp_path / "more")
    for path in (tmp_path / "none", Path(__file__)):
        with pytest.raises(CorpusError, match="cannot read the weights"):
            start_from(net, path)


def test_training_starts_there_and_so_does_every_fresh_net(tmp_path):
    trained = new_model("resnet8", 2, 16, seed=1)
    path = weights_of(trained, tmp_path / "w")
    settings = override(csc.Settings(), {"train.model": "resnet8", "train.init": str(path)})
    assert equal(csc.fresh_model(corpus(), settings, CPU, seed=5), trained)


# --- the layer ----------------------------------------------------------------------------------


@torch.inference_mode()
def test_features_of_a_layer_are_the_mean_of_what_it_gives():
    net, there = new_model("resnet8", 2, 16, seed=0), corpus()
    points = features(net, there, CPU, Settings(layer="4"))
    (batch,) = CPU.batches(there, 8)
    maps = net.eval().features[:5](batch.images)
    assert width(net, "4", (16, 16)) == points.shape[1] == maps.shape[1] == 32
    np.testing.assert_allclose(points, maps.mean((2, 3)).numpy(), rtol=1e-5)
    assert not net.features[4]._forward_hooks


def test_without_a_layer_they_are_the_head_s_input():
    net, there = new_model("resnet8", 2, 16, seed=0), corpus()
    assert np.array_equal(features(net, there, CPU, Settings()), features(net, there, CPU))
    assert width(net, "", (16, 16)) == net.n_features == 128


@pytest.mark.parametrize("name", ["nope", "head", "9.conv1.weight"])
def test_a_layer_that_is_not_there_is_refused_with_some_that_are(name: str):
    with pytest.raises(ConfigError, match=f"no layer '{name}'; there are 0, 1, 2"):
        features(new_model("resnet8", 2, 16, seed=0), corpus(), CPU, Settings(layer=name))


# --- the command --------------------------------------------------------------------------------


def test_train_takes_a_borrowed_net_a_start_and_a_layer(finished, tmp_path):  # noqa: F811
    start = weights_of(new_model("resnet8", 10, 8, seed=3), tmp_path / "start.safetensors")
    done = call("train", finished / "p", "--out", tmp_path / "run", "--cpu", "--threads", 1,
                "--init", start, "--set", "features.layer=4", "--save-features", "--quiet",
                *QUICK)  # fmt: skip
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "run" / "features.npz") as held:
        assert held["features"].shape[2] == 32 and str(held["layer"]) == "4"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["model"] == "resnet8"
    refused = call("train", finished / "p", "--out", tmp_path / "no", "--cpu", "--model", SMALL,
                   "--init", start, *QUICK)  # fmt: skip
    assert_refused(refused, "does not fit the net")
