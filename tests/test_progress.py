"""What a run tells while it works: a file, a board, and nothing on stderr if so asked."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from csc_gpu import board, cache, progress
from csc_gpu.backend import open_backend
from csc_gpu.board import Board, table
from csc_gpu.errors import ConfigError
from csc_gpu.features import features, predict
from csc_gpu.models import new_model
from csc_gpu.progress import Console, Pace
from csc_gpu.segregate import Settings, observe
from csc_gpu.train import Budget, Moment
from csc_gpu.types import Corpus
from tests.worlds import world

CPU = open_backend("cpu", 1)
BUDGET = Budget(2, 4)


def moment(step: int, rows: int = 40) -> Moment:
    return Moment(step, step / 4, torch.tensor(0.5), 0.1, BUDGET, rows)


def sighting(epoch: float = 1.5):
    there = world()
    return observe(there.points, there.labels, epoch, Settings(), CPU)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_epoch_tells_its_pace_and_the_memory(tmp_path: Path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Console(tmp_path / "log.jsonl") as log:
        for step in range(1, 9):
            now[0] += 2.0  # ten images in two seconds
            log("step", stage="train", at=moment(step))
            if step == 6:
                now[0] += 1000.0  # clustering is no training
                log("snapshot", sighting=sighting())
    told = [line for line in lines(tmp_path / "log.jsonl") if line["event"] == "train"]
    assert [line["images_per_second"] for line in told] == [5.0, 5.0]
    assert all(1e6 < line["resident_bytes"] < 1e12 for line in told if "resident_bytes" in line)


def test_another_stage_is_another_pace():
    pace = Pace()
    pace.step("train", moment(1))
    pace.step("verify", moment(1))
    assert pace.images_per_second() == 0.0


@pytest.mark.parametrize("silent", [False, True])
def test_silence_is_kept_where_it_is_asked_for(silent: bool, tmp_path: Path, capsys):
    with Console(tmp_path / "log.jsonl", silent=silent, every=0) as log:
        log.say("a line")
        log("step", stage="train", at=moment(4))
        log("decode", done=1, total=2)
    told = capsys.readouterr()
    assert told.out == ""
    assert (told.err == "") == silent
    assert [line["event"] for line in lines(tmp_path / "log.jsonl")] == ["train"]


def test_long_work_is_told_once_a_minute_and_short_work_is_not(tmp_path: Path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Console(tmp_path / "log.jsonl", silent=True) as log:
        for done in range(1, 8):
            now[0] += 25.0
            log("check", done=done, total=7)
        now[0] += 25.0
        log("step", stage="train", at=moment(1))
        now[0] += 70.0
        log("step", stage="train", at=moment(2))
        now[0] += 70.0
        log("step", stage="train", at=moment(4))  # the end of an epoch, which has its own line
        now[0] += 59.0
        log("step", stage="train", at=moment(5))
    told = lines(tmp_path / "log.jsonl")
    of = [(line["event"], line.get("of"), line.get("done"), line["seconds"]) for line in told]
    assert of == [
        ("progress", "check", 3, 75.0),
        ("progress", "check", 6, 150.0),
        ("progress", "train", 2, 270.0),
        ("train", None, None, 340.0),
    ]
    assert told[0]["total"] == 7


def test_a_pass_over_all_rows_says_how_far_it_is():
    pixels = np.zeros((1100, 8, 8, 3), np.uint8)
    names = tuple(map(str, range(1100)))
    there = Corpus(np.arange(1100) % 2, ("a", "b"), np.arange(1100), names, pixels)
    told: list[tuple[str, int, int]] = []

    def log(event: str, **fields: int) -> None:
        told.append((event, fields["done"], fields["total"]))

    model = new_model("resnet8", 2, 8, seed=0)
    features(model, there, CPU, log=log)
    predict(model, there, CPU, log)
    ends = [367, 734, 1100]  # batches are of one size
    assert told == [(what, end, 1100) for what in ("features", "predict") for end in ends]


@pytest.mark.parametrize("silent", [False, True])
def test_a_warning_goes_to_the_log_and_not_around_the_silence(silent, tmp_path: Path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        with Console(tmp_path / "log.jsonl", silent=silent):
            cache.keep(Path("/dev/null/x/y"), b"found")
            logging.getLogger("matplotlib").warning("no place for %s", "fonts")
        assert warnings.showwarning is before
    line, other = lines(tmp_path / "log.jsonl")
    assert line["event"] == "warning" and line["text"].startswith("cannot remember what was found")
    assert (other["kind"], other["text"]) == ("matplotlib", "no place for fonts")
    said = capsys.readouterr().err
    assert said == "" if silent else said.startswith("warning: cannot remember")


def test_the_board_holds_curves_and_the_cluster_table(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Console(board=Board(tmp_path, CPU.to_numpy)) as log:
        for step in range(1, 9):
            log("step", stage="train", at=moment(step))
        log("snapshot", sighting=sighting())
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 0.5), (8, 0.5)]
    assert [e.value for e in events.Scalars("train/lr")] == pytest.approx([0.1, 0.1])
    assert {"train/images_per_second", "train/lr"} <= set(events.Tags()["scalars"])
    counts = [tag for tag in events.Tags()["scalars"] if tag.startswith("snapshot/clusters at")]
    assert len(counts) == len(sighting().clusterings)
    assert [e.step for e in events.Scalars(counts[0])] == [150]
    (text,) = events.Tensors("snapshot/largest clusters/text_summary")
    assert "| cluster | rows |" in text.tensor_proto.string_val[0].decode()


def test_the_table_shows_the_largest_clusters_first(monkeypatch):
    monkeypatch.setattr(board, "ROWS", 2)
    seen = sighting()
    rows = [line.split("|")[1:-1] for line in table(seen, CPU.to_numpy).splitlines()[2:]]
    sizes = sorted(np.asarray(seen.clusterings[-1].size).tolist(), reverse=True)
    assert [int(row[1]) for row in rows] == sizes[:2]
    assert all(0 < float(row[3]) <= 1 for row in rows)


def test_a_missing_tensorboard_is_named_with_its_remedy(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'csc-gpu\[tensorboard\]'"):
        Board(tmp_path, CPU.to_numpy)
