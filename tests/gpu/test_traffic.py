"""What travels between host and device, as CUPTI saw it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from csc_gpu.backend.gpu import GpuBackend
from csc_gpu.features import features
from csc_gpu.models import new_model
from csc_gpu.segregate import Settings, observe, segregate
from csc_gpu.types import Corpus

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ROWS = 50_000
SNAPSHOTS = 3
SMALL_CHANGE = 64 * 1024
"""Bytes that radii, counts and the like may take on their way down."""


@dataclass
class Copies:
    """Bytes of each copy, by direction: DtoH, HtoD, DtoD."""

    sizes: dict[str, list[int]] = field(default_factory=dict)

    def read(self, trace: Path) -> None:
        """Add the copies of a Chrome trace."""
        for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]:
            if event.get("cat") != "gpu_memcpy":
                continue
            for direction in ("DtoH", "HtoD", "DtoD"):
                if direction in event["name"]:
                    size = int(event["args"]["bytes"])
                    self.sizes.setdefault(direction, []).append(size)


@pytest.fixture
def profiled(tmp_path: Path) -> Callable[[], object]:
    """A context in which every copy is noted."""

    @contextmanager
    def watch() -> Iterator[Copies]:
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        copies, trace = Copies(), tmp_path / "trace.json"
        with torch.profiler.profile(activities=kinds) as profile:
            yield copies
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(trace))
        copies.read(trace)

    return watch


def a_snapshot(gpu: GpuBackend) -> Callable[[], object]:
    """Takes and clusters snapshots, and judges; all pixels and libraries are in place already."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (ROWS, 8, 8, 3), np.uint8)
    rows = np.arange(ROWS)
    corpus = Corpus(rows % 4, tuple("abcd"), rows, ("",) * ROWS, pixels)
    model = new_model("resnet8", 4, 8, seed=0).to(gpu.device)
    settings, seen = Settings(rule="persistence"), []

    def take() -> object:
        taken = []
        for moment in range(SNAPSHOTS):
            taken.append(features(model, corpus, gpu))
            seen.append(observe(taken[-1], corpus.labels, float(moment), settings, gpu))
        segregate(seen[-SNAPSHOTS:], corpus.labels, settings, gpu)
        return taken[-1]

    take()
    return take


def assert_seen(copies: Copies) -> None:
    """The profiler saw copies at all."""
    assert copies.sizes.get("DtoH"), "not even a radius came down: the profiler saw nothing"


def assert_little_comes_down(copies: Copies, n_features: int) -> None:
    """At most two bytes a row, and nothing as large as the features."""
    down = copies.sizes.get("DtoH", [])
    assert down, "not even a radius came down: the profiler saw nothing"
    assert sum(down) <= 2 * ROWS * SNAPSHOTS + SMALL_CHANGE
    assert max(down) < 4 * ROWS * n_features


def test_of_a_snapshot_two_bytes_a_row_come_down_at_most(gpu, profiled):
    take = a_snapshot(gpu)
    with profiled() as copies:
        take()
    assert_little_comes_down(copies, 128)
    assert max(copies.sizes.get("HtoD", [0])) <= 8 * ROWS  # rows and labels; pixels are there


def test_a_number_a_row_more_than_allowed_is_caught(gpu, profiled):
    take = a_snapshot(gpu)
    with profiled() as copies:
        gpu.to_numpy(gpu.xp.asarray(take())[:, 0].astype(gpu.xp.float64))  # planted
    assert_seen(copies)
    with pytest.raises(AssertionError):
        assert_little_comes_down(copies, 128)


def test_features_that_come_down_are_caught(gpu, profiled):
    take = a_snapshot(gpu)
    with profiled() as copies:
        gpu.tensor(take()).cpu()  # planted
    assert_seen(copies)
    with pytest.raises(AssertionError):
        assert_little_comes_down(copies, 128)
