"""Several ranks share one run: what each is given, and that together they end where one does."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from csc_gpu import data, pipeline, run
from csc_gpu.backend import Augment, cpu, open_backend, ranks, resident
from csc_gpu.backend.passes import Portion, even_parts
from csc_gpu.backend.ranks import ALONE, Ranks
from csc_gpu.checkpoint import Record
from csc_gpu.cli import cli
from csc_gpu.errors import ConfigError
from csc_gpu.train import Settings as Training
from csc_gpu.train import budget, require_shared

CPU = open_backend("cpu", 1)
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)


# --- what a rank is given -------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_share_every_batch_of_a_pass(world: int):
    pixels = torch.arange(23 * 4 * 4 * 3, dtype=torch.uint8).reshape(23, 4, 4, 3)
    labels = np.arange(23) % 5
    order = np.random.default_rng(0).permutation(23)

    def given(portion: Portion) -> list[dict[int, bytes]]:
        rng = np.random.default_rng(1)
        how = {"order": order, "augment": Augment(1, True), "rng": rng, "portion": portion}
        return [
            {int(row): image.numpy().tobytes() for row, image in zip(b.rows, b.images, strict=True)}
            for b in resident.batches(pixels, labels, 8, **how)
        ]

    whole = given(Portion())
    shares = [given(Portion(rows=Ranks(rank, world).share)) for rank in range(world)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert sum(map(len, parts)) == len(batch)
        assert {row: image for part in parts for row, image in part.items()} == batch
    halves = [given(Portion(batches=Ranks(rank, world).share)) for rank in range(world)]
    assert sum(map(len, halves)) == len(whole)
    assert [batch for rank in range(world) for batch in halves[rank]] == [
        batch for rank in range(world) for batch in whole[rank::world]
    ]


def test_a_portion_is_of_places_in_the_pass():
    parts = even_parts(np.arange(10), 4)  # 4, 3, 3
    assert Portion().of(parts) == [slice(0, 4, 1), slice(4, 7, 1), slice(7, 10, 1)]
    assert Portion(slice(1, None), slice(1, None, 2)).of(parts) == [slice(5, 7, 2), slice(8, 10, 2)]


def test_alone_nothing_is_sent():
    model = torch.nn.Linear(2, 2)
    assert ALONE.parallel(model) is model
    assert ALONE.is_first and CPU.ranks is ALONE
    told = Record({}, {"x": 1})
    assert ALONE.from_first(lambda: told) is told
    tensor = torch.ones(3)
    ALONE.add_up(tensor)
    ALONE.wait()
    assert tensor.tolist() == [1, 1, 1]


def test_ranks_wait_for_the_first_longer_than_torch_would(monkeypatch):
    began: list[dict[str, timedelta]] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, **how: began.append(how))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    ranks.joined()
    assert began[0]["timeout"] > timedelta(hours=12)


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(cpu, "free_memory", lambda: 4096)
    assert CPU.free_bytes() == 4096
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert CPU.free_bytes() == 1024


@pytest.mark.parametrize(("rows", "fits"), [(32, True), (30, False)])  # batches of 16, or of 15
def test_batches_that_leave_a_rank_too_few_images_are_refused(rows: int, fits: bool):
    settings = Training(model="resnet8", batch=16, min_steps=0, epochs=1)
    plan = budget(rows, settings)
    require_shared(plan, rows, 1)
    with nullcontext() if fits else pytest.raises(ConfigError, match=r"of 15 images .* 8 ranks"):
        require_shared(plan, rows, 8)


def test_of_a_finished_run_the_first_rank_alone_speaks(tmp_path: Path):
    words = ["train", "digits", "--out", tmp_path / "run", "--resume", "--cpu"]
    (tmp_path / "run").mkdir()
    settings = pipeline.settings_of("csc", {"train.model": open_backend("cpu").usual_model})
    there = data.open_source("digits", settings.data)
    asked = pipeline.identity("digits", there, settings, "csc", 0, "")
    done = dict.fromkeys(run.NEEDED, 0) | {"verdict": "nothing", "asked": asked}
    (tmp_path / "run/summary.json").write_text(json.dumps(done))
    told = []
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "joined", lambda rank=rank: Ranks(rank, 2))
            told.append(CliRunner().invoke(cli, list(map(str, words))))
    assert [done.exit_code for done in told] == [0, 0], told
    assert "is finished: nothing" in told[0].output and not told[1].output


# --- two processes --------------------------------------------------------------------------------

QUICK = (
    "train.epochs=6",
    "train.min_steps=1",
    "segregate.check_epochs=3",
    "conceal.epochs=4",
    "watch.keep=true",
)


def train(corpus: Path, out: Path, ranks: int, *more: str) -> None:
    words = ["-m", "csc_gpu", "train", str(corpus), "--out", str(out), "--cpu", "--threads", "1"]
    words += ["--no-report"]
    words += [word for change in QUICK for word in ("--set", change)]
    if ranks > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words = [*run, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, *words, *more], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("summary: ") == 1


def suspects(run: Path) -> set[str]:
    with (run / "suspects.csv").open(newline="") as file:
        return {row["path"] for row in csv.DictReader(file) if row["is_poison_issue"] == "True"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ranks") / "poisoned"
    words = ["-m", "csc_gpu", "poison", "digits", str(place), "--attack", "badnets"]
    subprocess.run([sys.executable, *words, "--rate", "0.1", "--target", "0"], check=True)
    return place


@needs_gloo
def test_two_ranks_find_whom_one_finds(corpus: Path, tmp_path: Path):
    """From one checkpoint at the end of training they agree bit for bit; end to end, almost."""
    left = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(corpus), str(tmp_path / "one"), *QUICK],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert left.returncode == 130
    shutil.copytree(tmp_path / "one.partial", tmp_path / "both.partial")
    train(corpus, tmp_path / "one", 1, "--resume")
    train(corpus, tmp_path / "both", 2, "--resume")
    with (
        np.load(tmp_path / "one" / "features.npz") as one,
        np.load(tmp_path / "both" / "features.npz") as both,
    ):
        assert np.array_equal(one["features"], both["features"])
        assert np.array_equal(one["final"], both["final"])
    found = suspects(tmp_path / "one")
    assert len(found) > 100
    assert suspects(tmp_path / "both") == found

    train(corpus, tmp_path / "two", 2)
    alone, together = found, suspects(tmp_path / "two")
    assert len(alone & together) >= 0.9 * len(alone | together)
    told = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert told["ranks"] == 2 and told["starts"] == 1


INTERRUPTED = """
import sys
from csc_gpu import segregate
from csc_gpu.cli import cli

real = segregate.of_sighting

def stopped(sighting, *rest):
    if sighting.epoch == 6:  # training has ended, its last snapshot is not kept
        raise KeyboardInterrupt
    return real(sighting, *rest)

segregate.of_sighting = stopped
corpus, out, *changes = sys.argv[1:]
sets = [word for change in changes for word in ("--set", change)]
cli(["train", corpus, "--out", out, "--cpu", "--threads", "1", *sets])
"""
