"""Features kept smaller or elsewhere: the same verdict to the bit, or within a known bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from csc_gpu import csc
from csc_gpu.backend import open_backend
from csc_gpu.conceal import Settings as Concealment
from csc_gpu.conceal import fine_tune
from csc_gpu.errors import ConfigError
from csc_gpu.features import Settings, Spilled, are_finite, features
from csc_gpu.models import new_model
from csc_gpu.segregate import Settings as Segregation
from csc_gpu.segregate import observe, segregate
from csc_gpu.segregate.clusters import embed
from csc_gpu.segregate.kin import coherent, kin
from csc_gpu.types import Corpus, DefenderView
from tests.fake_gpu import fake_gpu
from tests.worlds import world

CPU = open_backend("cpu", 1)


def spilled(points, folder, backend=CPU, precision="float32"):
    held = Spilled(points.shape, Settings(spill=str(folder), precision=precision), backend)
    rows = np.random.default_rng(0).permutation(len(points))
    for some in np.array_split(rows, 3):
        held[backend.xp.asarray(some)] = backend.xp.asarray(points[some])
    return held


def pictures(n=120):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    pixels = (rng.integers(0, 60, (n, 8, 8, 3)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    return Corpus(labels, ("a", "b", "c"), np.arange(n), tuple(map(str, range(n))), pixels)


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_spilled_rows_come_back_bit_by_bit(tmp_path, machine, monkeypatch):
    monkeypatch.setattr("csc_gpu.features.READ", 50)
    backend = CPU if machine == "cpu" else fake_gpu()
    points = world().points
    held, rows = spilled(points, tmp_path, backend), np.random.default_rng(1).integers(0, 440, 130)
    assert len(held) == len(points)
    np.testing.assert_array_equal(backend.to_numpy(held[backend.xp.asarray(rows)]), points[rows])
    np.testing.assert_array_equal(backend.to_numpy(held[30:200]), points[30:200])
    np.testing.assert_array_equal(backend.to_numpy(held[:]), points)
    assert isinstance(held[3:5], backend.xp.ndarray)
    assert list(tmp_path.iterdir()) == []  # a file without a name leaves nothing behind


def test_spilled_features_give_the_same_sighting_and_kin(tmp_path):
    there = world()
    held = spilled(there.points, tmp_path)
    core = there.poison & (np.cumsum(there.poison) < 20)
    seen, again = (
        observe(points, there.labels, 1.0, Segregation(mode="sample", sample=200), CPU)
        for points in (there.points, held)
    )
    np.testing.assert_array_equal(seen.stray, again.stray)
    for one, two in zip(seen.clusterings, again.clusterings, strict=True):
        np.testing.assert_array_equal(one.of_row, two.of_row)
        assert one.eps == two.eps
    ask = there.labels, 0, core
    np.testing.assert_array_equal(kin(there.points, *ask, 0.75, CPU), kin(held, *ask, 0.75, CPU))
    one, two = (coherent(points, *ask, CPU) for points in (there.points, held))
    np.testing.assert_array_equal(one.belief, two.belief)


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_the_head_is_tuned_on_spilled_features_as_on_resident_ones(tmp_path, machine):
    backend = CPU if machine == "cpu" else fake_gpu()
    there, heads = world(), []
    for points in (torch.from_numpy(there.points), spilled(there.points, tmp_path, backend)):
        torch.manual_seed(0)
        heads.append(torch.nn.Linear(20, 4))
        how = Concealment(epochs=2, batch=64)
        fine_tune(heads[-1], points, there.labels, how, backend, seed=0)
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_a_run_whose_features_are_spilled_ends_as_one_whose_are_resident(tmp_path):
    settings = csc.Settings()
    settings = replace(
        settings,
        train=replace(settings.train, model="resnet8", epochs=2, min_steps=0, batch=32),
        segregate=Segregation(rule="algorithm1", max_share=0.5),
        watch=csc.Watch(keep=True),
        conceal=Concealment(epochs=1),
    )
    view = DefenderView(pictures())
    one = csc.defend(view, settings, CPU, seed=0)
    there = replace(settings, features=Settings(spill=str(tmp_path)))
    two = csc.defend(view, there, CPU, seed=0)
    np.testing.assert_array_equal(one.segregation.score, two.segregation.score)
    np.testing.assert_array_equal(one.snapshots["features"], two.snapshots["features"])
    for here, elsewhere in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(here, elsewhere)


def test_float16_moves_no_embedded_row_by_more_than_a_thousandth():
    """Rows are of length 1 before they are centred; each number is rounded to 2^-11 of it."""
    points = world().points
    order = np.arange(len(points))
    whole, half = (embed(kept, order, 0, np) for kept in (points, points.astype(np.float16)))
    assert half.dtype == np.float32
    moved = np.linalg.norm(whole - half, axis=1).max()
    assert 0 < moved < 2**-10


def test_float16_finds_the_same_island():
    there, chosen = world(), Segregation(rule="persistence")
    for backend in (CPU, fake_gpu()):
        half = backend.xp.asarray(there.points.astype(np.float16))
        seen = observe(half, there.labels, 1.0, chosen, backend)
        told = segregate([seen], there.labels, chosen, backend)
        assert told.suspect[there.poison].mean() >= 0.9
        assert told.suspect[~there.poison].mean() <= 0.02


def test_features_are_kept_as_told(tmp_path):
    corpus, model = pictures(), new_model("resnet8", 3, 8, seed=0)
    whole = features(model, corpus, CPU)
    half = features(model, corpus, CPU, Settings(precision="float16"))
    both = features(model, corpus, CPU, Settings(precision="float16", spill=str(tmp_path)))
    assert whole.dtype == np.float32
    assert half.dtype == np.float16 and isinstance(both, Spilled)
    np.testing.assert_array_equal(half, whole.astype(np.float16))
    np.testing.assert_array_equal(half, both[:])


@pytest.mark.parametrize("row", [0, 437])
def test_a_number_that_is_not_finite_is_found_in_any_block(row, tmp_path, monkeypatch):
    monkeypatch.setattr("csc_gpu.features.CHECKED", 100)
    points = world().points
    assert are_finite(points, np) and are_finite(spilled(points, tmp_path), np)
    points[row, 3] = np.inf
    assert not are_finite(points, np) and not are_finite(spilled(points, tmp_path), np)


def test_what_cannot_be_kept_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"features.precision must be one of float32, float16"):
        Settings(precision="int8")
    points = world().points
    with pytest.raises(ConfigError, match=r"features.spill: cannot write to .*name a folder"):
        spilled(points, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"features.spill: \d+ bytes are needed .* are free"):
        Spilled((10**9, 10**6), Settings(spill=str(tmp_path)), CPU)
