"""Runs that end badly: in one line, with the last checkpoint whole, and resumed to the same end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import Result

from csc_gpu import run
from csc_gpu.backend.cpu import CpuBackend
from csc_gpu.train import Moment
from tests.test_ranks import needs_gloo
from tests.test_tolerance import pictures, same_files, train


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """photos/, read from disk in every epoch, and whole/, an undisturbed run on them."""
    place = tmp_path_factory.mktemp("endings")
    pictures(place / "photos")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patched.setattr(CpuBackend, "free_bytes", lambda self: 10_000)
        assert train(place / "photos", "--out", place / "whole").exit_code == 0
    return place


@pytest.fixture(autouse=True)
def streaming(place: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 10_000)


def assert_ended(done: Result, out: Path, *needles: str) -> None:
    """One line, exit status 2, and checkpoints to go on from."""
    assert done.exit_code == 2, done.output
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and all(needle in last for needle in needles), last
    kept = run.partial_of(out) / run.CHECKPOINTS
    assert list(kept.glob("train-*.safetensors")) and not list(kept.glob("*.partial"))
    assert not out.exists()


def assert_goes_on(place: Path, out: Path) -> None:
    done = train(place / "photos", "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    assert "resumed, start 2" in done.stderr
    assert same_files(out, place / "whole")


@pytest.mark.parametrize("moment", [3, 6, 8])
def test_a_disk_that_fills_up_in_a_checkpoint(
    moment: int, place: Path, tmp_path: Path, monkeypatch
):
    """The start writes one, every step one, and after 5 steps, an epoch, the snapshot."""
    written, real = [0], os.fsync

    def fsync(number: int) -> None:
        written[0] += 1
        if written[0] == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        done = train(place / "photos", "--out", tmp_path / "run")
    assert_ended(done, tmp_path / "run", "No space left on device", "make room")
    assert_goes_on(place, tmp_path / "run")


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_file_that_vanishes_while_it_is_needed(
    step: int, place: Path, tmp_path: Path, monkeypatch
):
    gone, kept = place / "photos/train/b/17.png", tmp_path / "17.png"
    real = Moment.__init__

    def vanishing(self: Moment, *values: object) -> None:
        real(self, *values)
        if self.step == step and gone.exists():
            gone.rename(kept)

    with monkeypatch.context() as patched:
        patched.setattr(Moment, "__init__", vanishing)
        done = train(place / "photos", "--out", tmp_path / "run")
    kept.rename(gone)
    assert_ended(done, tmp_path / "run", "17.png: missing", "replace or remove it")
    assert_goes_on(place, tmp_path / "run")


@needs_gloo
def test_a_rank_that_is_killed_ends_them_all(place: Path, tmp_path: Path):
    """torchrun ends the others; the checkpoints are there to go on from."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "csc_gpu", "train", str(place / "photos"), "--out", str(out), "--cpu"]
    words += ["--threads", "1", "--set", "train.min_steps=1", "--set", "train.epochs=100000"]
    words += ["--set", "train.batch=8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    together = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        states, deadline = run.partial_of(out) / run.CHECKPOINTS, time.monotonic() + 600
        while not list(states.glob("train-*.safetensors")) and time.monotonic() < deadline:
            assert together.poll() is None, together.communicate()[0]
            time.sleep(0.2)
        os.kill(second_rank(together.pid), signal.SIGKILL)
        told, _ = together.communicate(timeout=300)
    finally:
        together.kill()
    assert together.returncode not in (0, None) and "Signal 9 (SIGKILL)" in told
    assert list(states.glob("train-*.safetensors")) and not out.exists()
    with run.fresh_directory(out, run.RUN, force=False, resume=True):
        pass  # nobody is left who holds it


def second_rank(parent: int) -> int:
    """The process that torchrun has told to be rank 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{parent}\n" in (folder / "status").read_text()
            if is_child and b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue  # it has ended
    raise AssertionError("torchrun has started no rank 1")
