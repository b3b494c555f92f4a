"""The benchmarks: what they believe, what they refuse, and how their results are kept."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import (
    clustering,
    detection,
    end_to_end,
    gpu_check,
    kill,
    loader,
    long_tail,
    merged,
    misses,
    results_file,
    tables,
    thresholds,
    traffic,
)
from benchmarks import conceal as concealment
from csc_gpu import bench, sources
from csc_gpu.attacks import ATTACKS
from csc_gpu.backend import open_backend
from csc_gpu.backend.doctor import missing_for_gpu
from csc_gpu.cli import cli
from csc_gpu.data import Settings as Reading
from csc_gpu.errors import ConfigError, CorpusError
from csc_gpu.segregate import Settings

CPU = open_backend("cpu", 1)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The folder that results go to, and nowhere else."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def without_gpu():
    if not missing_for_gpu():
        pytest.skip("a GPU is here")


def run(command, *words):
    return CliRunner().invoke(command, list(map(str, words)))


# --- result files ---------------------------------------------------------------------------------


def a_report(**changes):
    machine = {"gpu": "NVIDIA H200", "processor": "A Processor (R) 9"}
    report = {"bench": "traffic", "date": "2026-11-21T10:00:00Z", "commit": "abc"}
    return report | {"backend": "gpu", "machine": machine, "lines": [{"n": 1}]} | changes


def test_results_are_named_after_day_bench_and_device_and_never_replaced(tmp_path):
    paths = [results_file.save(a_report(lines=[number]), tmp_path) for number in range(3)]
    assert [path.name for path in paths] == [
        "2026-11-21-traffic-nvidia-h200.json",
        "2026-11-21-traffic-nvidia-h200-2.json",
        "2026-11-21-traffic-nvidia-h200-3.json",
    ]
    assert [json.loads(path.read_text())["lines"] for path in paths] == [[0], [1], [2]]


def test_results_of_the_processor_bear_its_name(tmp_path):
    path = results_file.save(a_report(backend="cpu"), tmp_path)
    assert path.name == "2026-11-21-traffic-a-processor-r-9.json"


def test_results_go_where_out_says_else_beside_the_others(out, monkeypatch):
    assert results_file.save(a_report()).parent == out
    monkeypatch.delenv("OUT")
    monkeypatch.setattr(results_file, "RESULTS", out / "usual")
    assert results_file.save(a_report()).parent == out / "usual"


def test_a_tree_without_history_is_told_its_commit(out, monkeypatch):
    monkeypatch.setenv(results_file.COMMIT, "told")
    for commit, expected in (("unknown", "told"), ("abc", "abc")):
        path = results_file.save(a_report(commit=commit))
        assert json.loads(path.read_text())["commit"] == expected


# --- clustering -----------------------------------------------------------------------------------

EPS, MIN_SAMPLES = 1.5**0.5, 3  # whole numbers up to 1 apart, and two of them make a core row
POINTS = np.array([[0], [1], [2], [3], [4], [10], [11], [12], [13], [20]], np.float32)
RIGHT = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, -1])
"""Core rows 1 to 3 and 6, 7; border rows 0, 4, 5 and 8; noise 9."""


def test_the_core_rows_are_those_with_enough_neighbours():
    core = clustering.core_rows(POINTS, EPS, MIN_SAMPLES)
    assert np.flatnonzero(core).tolist() == [1, 2, 3, 6, 7]


def test_the_same_clustering_under_other_numbers_is_the_same():
    renumbered = np.array([7, -1, 3])[np.array([0] * 5 + [2] * 4 + [1])]
    clustering.same_clustering(POINTS, EPS, MIN_SAMPLES, RIGHT, renumbered)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({9: 1}, "row 9 .* is noise in one and not in the other"),
        ({0: -1}, "row 0 .* is noise in one and not in the other"),
        ({5: 0, 6: 0, 7: 0, 8: 0}, "cluster 0 of the other is several clusters"),
        ({3: 5, 4: 5}, "cluster 0 of the one is several clusters"),
        ({4: 1}, "row 4 .* touches no core row of its cluster in the other"),
        ({8: 5}, "row 8 .* touches no core row of its cluster in the other"),
    ],
)
def test_a_wrong_clustering_is_refused_with_the_row_that_is_wrong(changes, told):
    wrong = RIGHT.copy()
    wrong[list(changes)] = list(changes.values())
    with pytest.raises(AssertionError, match=told):
        clustering.same_clustering(POINTS, EPS, MIN_SAMPLES, RIGHT, wrong)


@pytest.mark.parametrize(
    ("row", "told"),
    [(2, "row 2 .* is a core row but noise"), (5, "row 5 .* touches a core row but is noise")],
)
def test_two_that_agree_on_wrong_noise_are_refused(row, told):
    wrong = RIGHT.copy()
    wrong[row] = -1
    with pytest.raises(AssertionError, match=told):
        clustering.same_clustering(POINTS, EPS, MIN_SAMPLES, wrong, wrong)


def test_a_border_row_may_join_any_cluster_it_touches():
    """Row 4 lies between two clusters and is core in neither."""
    points = np.array([0, 1, 1, 2, 3, 4, 5, 5, 6], np.float32)[:, None]
    eps, one = 1.5**0.5, np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert np.flatnonzero(clustering.core_rows(points, eps, 4)).tolist() == [1, 2, 3, 5, 6, 7]
    other = one.copy()
    other[4] = 1
    clustering.same_clustering(points, eps, 4, one, other)


def test_blocks_change_nothing(monkeypatch):
    points = bench.drawn(300, 8, seed=2)
    whole = clustering.core_rows(points, 40.0, 8)
    monkeypatch.setattr(clustering, "BLOCK", 7)
    assert (clustering.core_rows(points, 40.0, 8) == whole).all()
    assert 0 < whole.sum() < 300


def test_the_floors_are_those_of_the_design():
    assert clustering.cuml_floor(1_281_167, 2048, 1) == pytest.approx(201, abs=1)
    assert clustering.cuml_floor(1_281_167, 2048, 2) == pytest.approx(401, abs=1)
    assert clustering.cuml_floor(50_000, 512, 1) == pytest.approx(0.076, abs=1e-3)
    assert clustering.half_square_floor(1_281_167, 2048, clustering.BF16) == pytest.approx(
        4.3, 0.02
    )
    assert clustering.half_square_floor(50_000, 512, clustering.TF32) == pytest.approx(3.2e-3, 0.02)


def test_time_is_extrapolated_squarely_in_rows_and_linearly_in_dimensions():
    line = {"rows": 100, "dims": 4, "median_s": 1.0, "setup_s": 0.5, "reference_s": 10.0}
    slow = line | {"median_s": 100.0}
    cell = clustering.Cell(200, 12, has_reference=False)
    took = clustering.expected(cell, [slow, line], repeats=2, floor=False)
    assert took == pytest.approx(3 * 1.0 * 12 + 0.5 * 6)
    checked = clustering.Cell(200, 12, has_reference=True)
    with_reference = clustering.expected(checked, [line], repeats=2, floor=False)
    assert with_reference == pytest.approx(took + 10 * 12)
    assert clustering.expected(cell, [], repeats=2, floor=False) == 0
    largest = clustering.Cell(1_281_167, 2048, has_reference=False)
    assert clustering.expected(largest, [], 2, floor=True) == pytest.approx(602, abs=1)


def test_the_grid_begins_with_the_least_work_and_a_reference_where_it_is_feasible():
    cells = clustering.grid((50_000, 10_000), (512, 16), None)
    assert [(cell.rows, cell.dims, cell.has_reference) for cell in cells] == [
        (10_000, 16, True),
        (50_000, 16, False),
        (10_000, 512, True),
        (50_000, 512, False),
    ]
    assert all(cell.has_reference for cell in clustering.grid((50_000,), (16,), True))


def test_cells_beyond_the_budget_or_the_memory_are_listed_with_the_reason(monkeypatch):
    cells = clustering.grid((64, 30_000), (4,), False)
    first, second = clustering.measure_all(cells, CPU, repeats=1, budget=2.0)
    assert first["rows"] == 64 and first["n"] == 1
    assert second["rows"] == 30_000
    assert "s left of the budget" in second["skipped"]
    monkeypatch.setattr(clustering, "free_memory", lambda: 1000)
    (only,) = clustering.measure_all(cells[:1], CPU, repeats=1, budget=5.0)
    assert "main memory" in only["skipped"]


def test_the_command_writes_what_it_measured(out):
    words = ("--cpu", "--rows", 200, "--rows", 300, "--dims", 8, "--repeats", 2)
    result = run(clustering.main, *words)
    assert result.exit_code == 0, result.output
    (path,) = out.iterdir()
    told = json.loads(path.read_text())
    assert [line["rows"] for line in told["lines"]] == [200, 300]
    assert {line["agrees"] for line in told["lines"]} == {"yes"}
    assert str(path) in result.output


def test_an_answer_that_is_not_the_references_fails_the_command(out, monkeypatch):
    monkeypatch.setattr(
        "csc_gpu.backend.cpu.CpuBackend.dbscan",
        lambda self, points, *, eps, min_samples: np.zeros(len(points), np.int32),
    )
    result = run(clustering.main, "--cpu", "--rows", 200, "--dims", 8, "--repeats", 1)
    assert result.exit_code == 1
    assert "1 of 1 cells" in result.output


# --- traffic --------------------------------------------------------------------------------------


def a_copy(name, size):
    return {
        "ph": "X",
        "cat": "gpu_memcpy",
        "name": name,
        "ts": 1,
        "dur": 2,
        "args": {"bytes": size},
    }


TRACE = {
    "schemaVersion": 1,
    "traceEvents": [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::copy_", "args": {}},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "args": {"bytes": 9999}},
        {"ph": "X", "cat": "kernel", "name": "Memcpy DtoH of mine", "args": {"bytes": 9999}},
        a_copy("Memcpy DtoH (Device -> Pageable)", 100),
        a_copy("Memcpy DtoH (Device -> Pinned)", 700),
        a_copy("Memcpy HtoD (Pageable -> Device)", 5000),
        a_copy("Memcpy DtoD (Device -> Device)", 30),
        a_copy("Memcpy DtoD (Device -> Device)", 12),
        a_copy("Memcpy PtoP (Device -> Device)", 77),
    ],
}


def test_the_copies_of_a_trace_are_added_up_by_direction():
    assert traffic.copied(TRACE) == {"DtoH": 800, "HtoD": 5000, "DtoD": 42, "largest_DtoH": 700}


def test_spells_add_up_but_for_the_largest_copy():
    one, other = traffic.copied(TRACE), traffic.copied(TRACE) | {"largest_DtoH": 900}
    assert traffic.together([one, other]) == {
        "DtoH": 1600,
        "HtoD": 10_000,
        "DtoD": 84,
        "largest_DtoH": 900,
    }


def copies_of(down=1, largest=1, moved=0):
    return {"DtoH": down, "HtoD": 10**9, "DtoD": moved, "largest_DtoH": largest}


SIZES = {"rows": 50_000, "dims": 512, "snapshots": 4}
FEATURES = 4 * 50_000 * 512
ALLOWED = 4 * 2 * 50_000 + 65_536


@pytest.mark.parametrize(
    ("segregation", "concealment", "told"),
    [
        (copies_of(ALLOWED, 200_000, FEATURES // 5), copies_of(65_536, 9, FEATURES // 20), None),
        (copies_of(ALLOWED + 1), copies_of(), "segregation: DtoH"),
        (copies_of(ALLOWED, FEATURES), copies_of(), "segregation: largest_DtoH"),
        (copies_of(moved=FEATURES // 5 + 1), copies_of(), "segregation: DtoD"),
        (copies_of(), copies_of(65_537), "conceal: DtoH"),
        (copies_of(), copies_of(moved=FEATURES // 20 + 1), "conceal: DtoD"),
        (copies_of(down=0, largest=0), copies_of(), "the profiler saw nothing"),
    ],
)
def test_the_limits_pass_what_is_within_and_name_what_is_not(segregation, concealment, told):
    stages = {"train": copies_of(10**9), "segregation": segregation, "conceal": concealment}
    broken = traffic.broken_limits(stages, **SIZES)
    assert len(broken) == (told is not None)
    assert told is None or told in broken[0]


def test_all_stages_run_and_a_machine_without_a_gpu_copies_nothing(without_gpu):
    corpus, stamped = traffic.drawn_images(300, side=8)
    assert 5 < stamped.sum() < 30 and (corpus.labels[stamped] == 0).all()
    stages, dims = traffic.run_stages(corpus, stamped, CPU, model="resnet8", snapshots=1)
    assert list(stages) == ["train", "segregation", "conceal"] and dims == 128
    assert all(set(copies.values()) == {0} for copies in stages.values())
    (told,) = traffic.broken_limits(stages, rows=300, dims=dims, snapshots=1)
    assert "saw nothing" in told
    lines = traffic.table(stages, planted=False, rows=300, dims=dims, snapshots=1)
    assert lines[1]["limit_DtoH"] == 2 * 300 + 65_536 and lines[0]["limit_DtoH"] is None


@pytest.mark.parametrize("main", [traffic.main, gpu_check.main])
def test_without_a_gpu_one_line_says_what_is_missing(main, out, without_gpu):
    result = run(main)
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    assert missing_for_gpu()[0].what in result.output
    assert not out.exists()


# --- loader and concealment -----------------------------------------------------------------------


def test_the_usual_settings_of_the_loader_come_first_and_the_rarest_last():
    every = loader.settings_grid((16, 8), (0.65, 0.9), (2, 3))
    chosen = [(s.decode_threads, s.hw_decoder_load, s.prefetch) for s in every]
    assert len(set(chosen)) == 8
    assert chosen[0] == (16, 0.65, 2)
    assert set(chosen[1:4]) == {(8, 0.65, 2), (16, 0.9, 2), (16, 0.65, 3)}
    assert chosen[-1] == (8, 0.9, 3)


def test_loaders_are_measured_with_the_settings_they_are_told_with(out, monkeypatch):
    def measured(backend, **how):
        return [{"loader": "files", "is": [backend.decoder.threads, backend.decoder.prefetch]}]

    monkeypatch.setattr(bench, "loader", measured)
    words = ("anywhere", "--cpu", "--threads", 2, "--threads", 1, "--prefetch", 2, "--prefetch", 4)
    result = run(loader.main, *words)
    assert result.exit_code == 0, result.output
    (path,) = out.iterdir()
    lines = json.loads(path.read_text())["lines"]
    assert len(lines) == 4
    assert all(line["is"] == [line["threads"], line["prefetch"]] for line in lines)
    (out / "again").mkdir()
    result = run(loader.main, *words, "--budget", 0)
    assert "3 of 4 settings left out" in result.output


def test_concealment_is_measured_over_every_length_of_a_replay(out):
    result = run(
        concealment.main, "--cpu", "--rows", 300, "--epochs", 1, "--repeats", 1, "--replay", 1,
        "--replay", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (path,) = out.iterdir()
    lines = json.loads(path.read_text())["lines"]
    assert [(line["replay"], line["loop"]) for line in lines] == [
        (1, "captured"),
        (1, "eager"),
        ("epoch", "captured"),
        ("epoch", "eager"),
    ]
    assert all((line["rows"], line["dims"], line["outputs"]) == (300, 512, 11) for line in lines)


@pytest.mark.parametrize(("apart", "status"), [(0.9e-5, 0), (1.1e-5, 1), (float("nan"), 1)])
def test_recorded_weights_that_differ_fail_the_command(out, monkeypatch, apart, status):
    monkeypatch.setattr(bench, "conceal", lambda *_, **how: [{"weights_differ_by": apart}])
    assert run(concealment.main, "--cpu").exit_code == status


# --- detection ------------------------------------------------------------------------------------


def a_cell(**changes):
    cell = {"data": "digits", "attack": "badnets", "rate": 0.05, "rate_of": "--rate"}
    cell |= {"target": "0", "seed": 0, "label_noise": 0.0, "flip": False, "set": []}
    return cell | changes


OTHER_CELLS = [
    {"data": "digits-2"},
    {"attack": "blend"},
    {"rate": 0.1},
    {"seed": 1},
    {"label_noise": 0.1},
    {"target": "0,3"},
    {"target": "0,7"},
    {"target": "all"},
    {"options": ["picture=there/cat.png"]},
    {"set": ["train.epochs=2"]},
    {"set": ["train.epochs=2", "train.batch=32"]},
]


def test_cells_that_differ_have_keys_and_folders_of_their_own(tmp_path):
    cells = [a_cell(), *(a_cell(**change) for change in OTHER_CELLS)]
    assert len({detection.key_of(cell) for cell in cells}) == len(cells)
    assert len({detection.folder(cell, tmp_path) for cell in cells}) == len(cells)
    assert all(detection.folder(cell, tmp_path).parent == tmp_path for cell in cells)
    assert detection.key_of(a_cell() | {"rule": "text", "after": {}}) == detection.key_of(a_cell())


@pytest.mark.parametrize("change", [{"target": "5"}, {"flip": True}])
def test_cells_that_differ_in_one_target_or_in_flip_have_folders_of_their_own(tmp_path, change):
    assert detection.key_of(a_cell()) != detection.key_of(a_cell(**change))
    assert detection.folder(a_cell(), tmp_path) != detection.folder(a_cell(**change), tmp_path)


def test_cells_are_poisoned_and_trained_once(tmp_path, monkeypatch):
    calls = []

    def command(*words):
        calls.append([str(word) for word in words])
        if words[0] == "poison":
            Path(words[2]).mkdir(parents=True)

    monkeypatch.setattr(detection, "command", command)
    words = ("train", "digits", "--name", "digits", "--attack", "badnets", "--attack", "sig",
             "--seed", 1, "--flip", "--work", tmp_path, "--jobs", 1)  # fmt: skip
    first = run(detection.cli, *words)
    assert first.exit_code == 0, first.output
    assert "2 cells, 2 to train" in first.output
    assert [words[0] for words in calls] == ["poison", "train", "poison", "train"]
    poisoned, trained = calls[2:]
    assert {"sig", "--rate-of-target", "0.5", "3"} <= set(poisoned)
    assert {"--flip", "--save-features", "segregate.rule=persistence"} <= set(trained)
    cells = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/cell.json"))]
    assert [(cell["attack"], cell["target"]) for cell in cells] == [("badnets", "3"), ("sig", "3")]
    again = run(detection.cli, *words)
    assert "2 cells, 0 to train" in again.output
    assert len(calls) == 4


def test_a_seed_given_alone_takes_the_target_given_alone(tmp_path, monkeypatch):
    cells = []
    monkeypatch.setattr(detection, "train_cell", lambda cell, *_: cells.append(cell) or cell)
    words = ("--name", "d", "--attack", "badnets", "--work", tmp_path)
    result = run(detection.cli, "train", "digits", *words, "--seed", 3, "--target", "7")
    assert result.exit_code == 0, result.output
    assert [(cell["seed"], cell["target"]) for cell in cells] == [(3, "7")]


TRAIN, JUDGE = "train digits --name digits --work here ", "judge --work cells --out out.jsonl "


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (detection.cli, TRAIN + "--attack bogus", "unknown attack 'bogus'"),
        (detection.cli, TRAIN + "--jobs 0", "0 is not in the range x>=1"),
        (detection.cli, TRAIN + "--label-noise 2", "--label-noise must be in [0, 1), got 2.0"),
        (detection.cli, TRAIN + "--rate 0", "--rate must be above 0 and below 1, got 0.0"),
        (detection.cli, TRAIN + "--set train.epoch=1", "did you mean 'train.epochs'"),
        (detection.cli, TRAIN + "--attack blend --option x=1", "unknown setting 'x'"),
        (detection.cli, JUDGE + "--jobs 0", "0 is not in the range x>=1"),
        (detection.cli, JUDGE + "--rule bogus", "unknown rule 'bogus'; there are two-stage,"),
        (detection.cli, JUDGE + "--rule 'bogus segregate.votes=2'", "unknown rule 'bogus seg"),
        (detection.cli, JUDGE + "--rule ''", "unknown rule ''"),
        (detection.cli, JUDGE + "--rule 'text segregate.vote=2'", "mean 'segregate.votes'"),
        (detection.cli, JUDGE + "--only nothing", "cells holds no cell that begins with nothing"),
        (detection.cli, JUDGE, "bare has no run; remove the folder and train it again"),
        (
            detection.cli,
            "judge --work missing --out out.jsonl",
            "missing holds no cell; train makes",
        ),
        (detection.cli, "judge --work cells --rule 'text segregate.votes=2'", "give --out: "),
        (detection.cli, "judge --work cells --rule again", "give --out: lines of 'again'"),
        (detection.cli, "judge --work cells --rule recover", "give --out: lines of 'recover'"),
        (detection.cli, "one cells/bare text", "bare has no run"),
        (detection.cli, "picture cells --out p.png", "cells is no cell"),
        (detection.cli, "picture cells/bare --out p.png", "bare has no run"),
        (detection.cli, "table missing.jsonl", "File 'missing.jsonl' does not exist"),
        (detection.cli, "table empty.jsonl", "empty.jsonl holds no line; judge writes them"),
        (detection.cli, "table lines.jsonl --rule bogus", "no line of the rule bogus; it has text"),
        (detection.cli, "table notes.md", "notes.md is no file of results"),
        (detection.cli, "plot missing.jsonl --out p", "File 'missing.jsonl' does not exist"),
        (detection.cli, "plot empty.jsonl --out p", "empty.jsonl holds no line; judge writes them"),
        (detection.cli, "plot lines.jsonl --out p", "no line of the rule two-stage; it has text"),
        (long_tail.thin, "images.npz p.npz --ratio 0", "0.0 is not in the range x>=1"),
        (long_tail.thin, "half.npz p.npz", "half.npz has no array x_test, y_test"),
        (long_tail.thin, "missing.npz p.npz", "missing.npz"),
        (long_tail.thin, "notes.md p.npz", "notes.md is no .npz of plain arrays"),
        (misses.main, "cells --out p", "cells is no cell"),
        (misses.main, "cells/clean --out p", "clean has no poison"),
        (thresholds.cli, "judge cells --out p", "cells is no cell"),
        (thresholds.cli, "judge cells/bare --out p", "bare has no run"),
        (thresholds.cli, "table missing.jsonl", "File 'missing.jsonl' does not exist"),
        (thresholds.cli, "table empty.jsonl", "empty.jsonl holds no line; judge writes them"),
        (thresholds.cli, "table lines.jsonl", "lines.jsonl holds other lines"),
        (thresholds.cli, "table notes.md", "notes.md is no file of results"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_runs(
    tmp_path, monkeypatch, command, words, told
):
    monkeypatch.chdir(tmp_path)
    for name in ("train_cell", "judged"):
        monkeypatch.setattr(detection, name, lambda *_: pytest.fail("it ran"))
    for name, attack in (("bare", "badnets"), ("clean", "none")):
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "cell.json").write_text(json.dumps(a_cell(attack=attack)))
    (tmp_path / "cells" / "clean" / "run").mkdir()
    (tmp_path / "cells" / "clean" / "run" / "summary.json").write_text("{}")
    (tmp_path / "lines.jsonl").write_text(json.dumps(a_line("text")) + "\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.md").write_text("# notes\n")
    some = {"x_train": np.zeros((4, 2, 2), np.uint8), "y_train": np.array([0, 0, 1, 1])}
    np.savez("half.npz", **some)
    np.savez("images.npz", **some, x_test=some["x_train"], y_test=some["y_train"])
    there = sorted(tmp_path.rglob("*"))
    result = run(command, *shlex.split(words))
    assert result.exit_code == 2, result.output
    *usage, line = result.stderr.splitlines()
    assert line.startswith("Error: ") and told in line
    assert not usage or (usage[0].startswith("Usage: ") and "Invalid value" in line)
    assert sorted(tmp_path.rglob("*")) == there


def test_the_results_of_the_study_are_known_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = os.path.relpath(detection.RESULTS)
    result = run(detection.cli, "judge", "--work", tmp_path, "--rule", "again", "--out", named)
    assert result.exit_code == 2 and "give --out" in result.stderr


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [(2, ConfigError, "nowhere: Error: no corpus$"), (1, click.ClickException, "nowhere: Hm\n")],
)
def test_what_csc_gpu_says_can_be_mended_can_be_mended(monkeypatch, status, kind, said):
    code = f"import sys; print('Hm\\nError: no corpus', file=sys.stderr); sys.exit({status})"
    monkeypatch.setattr(detection, "CSC_GPU", (sys.executable, "-c", code))
    with pytest.raises(kind, match=said):
        detection.command("poison", "nowhere")


def test_a_verdict_on_other_images_is_refused(tmp_path, monkeypatch):
    """Of a cell whose rows are called 0 and 1, and a verdict on 0 alone."""
    verdict = tmp_path / "told.csv"
    verdict.write_text("path,is_poison_issue,poison_score\n0,True,1\n")
    with pytest.raises(CorpusError, match=r"told.csv is of another corpus"):
        detection.verdict_of(verdict, ("0", "1"))
    cell = SimpleNamespace(corpus=SimpleNamespace(paths=("0", "1"), labels=None, n_classes=2))
    for name in ("backend", "key", "poison", "model"):
        setattr(cell, name, None)
    cell.settings = SimpleNamespace(conceal=None)
    monkeypatch.setattr(misses, "open_cell", lambda *_: cell)
    with pytest.raises(CorpusError, match=r"told.csv is of another corpus"):
        misses.Heads(tmp_path, "told.csv")


@pytest.mark.parametrize(("labels", "left"), [([0, 1] * 4, [4, 2]), ([0] * 8, [8])])
def test_the_last_class_of_a_long_tail_is_the_smallest(tmp_path, labels, left):
    parts = {"x_train": np.arange(8), "y_train": np.array(labels)}
    np.savez(tmp_path / "even.npz", **parts, x_test=parts["x_train"], y_test=parts["y_train"])
    thinned = tmp_path / "deep" / "tail.npz"
    done = run(long_tail.thin, tmp_path / "even.npz", thinned, "--ratio", 2)
    assert done.exit_code == 0, done.output
    with np.load(thinned) as file:
        assert np.bincount(file["y_train"]).tolist() == left
        assert (file["y_train"] == np.array(labels)[file["x_train"]]).all()
        assert file["x_test"].tolist() == list(range(8))


def a_line(rule="two-stage", **changes):
    """A line of the results: the cell's seed tells its figures apart."""
    cell = a_cell(**changes)
    rates = {"acc": 0.9, "asr": cell["seed"] / 10, "ra": 0.8, "virtual_clean": 0.0}
    versions = {"processor": "P", "cores": 2, "torch": "2", "scikit-learn": "1"}
    return cell | {
        "rule": rule,
        "before": rates,
        "after": rates,
        "recovered": None,
        "recovered_without": None,
        "clean_net": None,
        "detection": {"tpr": 1 - cell["seed"] / 10, "fpr": 0.0},
        "cpu_seconds": 1.0,
        "versions": versions,
        "trained_at": "abc",
        "commit": "def",
        "date": "2026-11-21",
    }


def test_the_stages_that_cost_more_than_their_goals_are_named_with_what_they_took():
    took = {"training_seconds": {"train": 10.0, "features": 5.0}}
    cheap = a_line() | took | {"seconds": {"cluster": 2.0, "segregate": 1.0, "verify": 20.0}}
    dear = a_line(seed=1) | took | {"seconds": {"cluster": 2.5, "segregate": 1.0, "verify": 21.0}}
    said = "- digits badnets 0.05 seed 1: clustering and rule 0.35, verification 2.10"
    assert tables.dear([cheap, dear]) == said
    assert tables.cost({"all": [cheap, dear]}).endswith(
        "| 0.32 (0.35) | 2.05 (2.10) | 0.00 (0.00) |"
    )


def test_merged_digits_are_corpora_of_few_labels(tmp_path):
    done = CliRunner().invoke(merged.cli, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = {}
    for path in map(Path, done.stdout.split()):
        corpus = sources.load(str(path), Reading(), backend=open_backend("cpu", 1)).train
        found[path.stem] = np.unique(corpus.labels).tolist()
    few = {"halved": 5, "thirds": 4, "modulo-3": 3, "modulo-4": 4, "modulo-5": 5}
    assert found == {name: list(range(n)) for name, n in few.items()}


def test_cells_that_were_trained_again_are_counted_and_those_that_differ_are_named():
    older = [a_line(seed=seed) for seed in (0, 1, 2)] + [a_line("oracle")]
    anew = [line | {"trained_at": "new", "commit": "new"} for line in older]
    assert tables.anew(older, older) == "None was trained again."  # judged again is not trained
    same = tables.anew(anew, older[:2])
    assert same.startswith("2 cells") and "at new (2): in 2 every figure" in same
    later = [line | {"commit": "later"} for line in anew]  # the same nets, judged once more
    assert "at later (3): in 3 every" in tables.anew(later, [*older, *anew])
    anew[1] |= {"detection": {"tpr": 0.25, "fpr": 0.001}}
    first, differs = tables.anew(anew, older).splitlines()
    assert first.startswith("3 cells") and "in 2 every figure" in first
    assert differs == (
        "- digits badnets 0.05 seed 1: recall 0.900 to 0.250, false alarms 0.0000 to 0.0010"
    )
    anew[2] |= {"after": anew[2]["after"] | {"asr": 0.5}}
    assert "in 1 every figure" in tables.anew(anew, older)


def test_cells_that_an_earlier_rule_judged_are_named():
    now = tables.AS_IT_IS[-1]
    older, newer = a_line() | {"commit": "older6789abc"}, a_line(seed=1) | {"commit": now}
    first, *named = tables.standing([older, newer, older | {"seed": 2}]).splitlines()
    assert first.startswith("1 of 3 cells") and "2 by an earlier" in first
    assert named == ["- digits badnets 0.05 seed 0 (older67), 2 (older67)"]


def test_cells_that_nobody_had_looked_at_are_a_table_of_their_own(monkeypatch):
    monkeypatch.setattr(tables, "HELD_OUT", {("digits", 2), ("digits", 3)})
    monkeypatch.setattr(tables, "MENDED", {("digits", "badnets", 3, 0.0)})
    common = [a_line(seed=seed) for seed in range(4)]
    rare = [a_line(seed=seed, rate=0.01) for seed in range(4)]
    none = a_line(seed=1, attack="none", rate=0.01)  # its rate says nothing
    _, _, *rows = tables.held_out([*common, *rare, none]).splitlines()
    seeds = [row.split(" | ")[1:3] for row in rows]
    assert seeds == [["badnets 0.05", "2, 0"], ["badnets 0.01", "1, 0"], ["badnets 0.01", "2, 0"]]


@pytest.mark.parametrize("commit", tables.AS_IT_IS)
def test_the_rule_has_not_changed_since_the_commits_that_judged_by_it(commit):
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=tables.ROOT)

    if git("cat-file", "-e", commit).returncode:
        pytest.skip(f"git does not know {commit} here")

    def decides(text):
        """Its syntax tree, without docstrings and comments."""
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts = [part for part in node.body if isinstance(part, ast.Expr)]
                texts = [text for text in texts if isinstance(text.value, ast.Constant)]
                node.body = [part for part in node.body if part not in texts]
        return ast.dump(tree)

    code = tables.ROOT / "csc_gpu"
    for path in [*sorted((code / "segregate").glob("*.py")), code / "witness.py"]:
        then = git("show", f"{commit}:{path.relative_to(tables.ROOT)}").stdout
        assert decides(path.read_text()) == decides(then), path


def test_what_has_a_line_is_not_judged_again(tmp_path, monkeypatch):
    for seed in range(2):
        cell = a_cell(seed=seed)
        place = detection.folder(cell, tmp_path)
        (place / "run").mkdir(parents=True)
        (place / "run" / "summary.json").write_text("{}")
        (place / "cell.json").write_text(json.dumps(cell))
    asked, out = [], tmp_path / "deep" / "lines.jsonl"

    def judged(cell, rule, work):
        asked.append((cell["seed"], rule))
        return a_line(rule, **cell)

    monkeypatch.setattr(detection, "judged", judged)
    words = ("judge", "--work", tmp_path, "--out", out, "--jobs", 1)
    assert "2 cells, 2 judgements" in run(detection.cli, *words).output
    assert "2 cells, 0 judgements" in run(detection.cli, *words).output
    result = run(detection.cli, *words, "--rule", "text", "--rule", "two-stage")
    assert "2 cells, 2 judgements" in result.output
    assert "digits badnets 0.05 text seed 1: acc 0.900 -> 0.900" in result.output
    assert asked == [(0, "two-stage"), (1, "two-stage"), (0, "text"), (1, "text")]
    assert [(line["seed"], line["rule"]) for line in detection.read(out)] == asked
    few = run(detection.cli, *words, "--only", "digits-badnets-0.05-1", "--rule", "algorithm1")
    assert "1 cells, 1 judgements" in few.output


def table_of(tmp_path, lines, *words):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(detection.cli, "table", path, *words)
    assert result.exit_code == 0, result.output
    rows = [line.strip("| ").split(" | ") for line in result.output.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in (rows[0], *rows[2:])}) == 1
    return rows[2:], result.output


def test_lines_of_an_earlier_study_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps({"data": "digits", "asr": 1}) + "\n")
    result = run(detection.cli, "table", path)
    assert result.exit_code == 2
    assert "earlier study; give another file" in result.output


def test_settings_that_the_judgement_would_ignore_are_refused(tmp_path):
    words = ("--name", "digits", "--set", "segregate.votes=2", "--work", tmp_path)
    result = run(detection.cli, "train", "digits", *words)
    assert result.exit_code == 2
    assert "data. and train." in result.output


def test_the_table_has_a_row_for_each_kind_of_cell_and_the_median_over_its_seeds(tmp_path):
    lines = [a_line(seed=seed, target=str(seed)) for seed in range(3)]
    lines += [a_line(attack="sig", rate=0.5, rate_of="--rate-of-target"), a_line("text")]
    lines += [a_line(target="0,3", label_noise=0.1), a_line(target="0,7"), a_line(flip=True)]
    columns = ("--column", "recall", "--column", "RA recovered")
    rows, told = table_of(tmp_path, lines, *columns)
    assert rows[0] == ["digits", "badnets 0.05", "two-stage", "3",
                       "**0.900** (1.000, 0.900, 0.800)", "-"]  # fmt: skip
    assert [row[1:4] for row in rows[1:]] == [
        ["sig 0.5 of target", "two-stage", "1"],
        ["badnets 0.05", "text", "1"],
        ["badnets 0.05 to 0,3 + 0.1 label noise", "two-stage", "1"],
        ["badnets 0.05 to 0,7", "two-stage", "1"],
        ["badnets 0.05", "two-stage", "1"],
    ]
    assert "trained at abc, judged at def; 2026-11-21" in told
    only, _ = table_of(tmp_path, lines, "--rule", "text")
    assert [row[2] for row in only] == ["text"]
    assert len(only[0]) == 4 + len(detection.COLUMNS)


def test_a_cell_trained_and_judged_has_every_figure_of_a_line(tmp_path, monkeypatch):
    """The commands run in this process, and the cell has no clean net beside it."""

    def command(*words):
        done = run(cli, *words)
        assert done.exit_code == 0, done.output

    monkeypatch.setattr(detection, "command", command)
    changed = ["train.epochs=2", "train.min_steps=1", "train.batch=32"]
    cell = detection.train_cell(a_cell(rate=0.1, set=changed), "digits", tmp_path)
    place = detection.folder(cell, tmp_path)
    line = json.loads(json.dumps(detection.judge_cell(place, "two-stage")))
    assert detection.key_of(line) == detection.key_of(cell)
    counts = line["detection"]["counts"]
    assert counts["tpr"][1] == line["counts"]["poison"] == 144
    assert line["clean_net"] is None
    assert line["recovered_without"] >= line["detection"]["counts"]["flagged"][0]
    assert line["recovered"]["argmax_over"] == 10
    assert line["segregation"]["verified"] is True
    with (place / "two-stage.csv").open() as file:
        assert sum(",True," in row for row in file) == counts["flagged"][0] > 0
    rows, _ = table_of(tmp_path, [line])
    assert rows[0][3] == "1"
    assert "CPU-s" in detection.said(line)
    drawn = run(detection.cli, "picture", place, "--out", tmp_path / "drawn.png")
    assert drawn.exit_code == 0 and (tmp_path / "drawn.png").exists(), drawn.output

    same = detection.judge_cell(place, detection.AGAIN)
    assert same["changed"] == same["left_out_changed"] == 0 and same["recovered"] is None
    back = json.loads(json.dumps(detection.judge_cell(place, detection.RECOVER)))
    assert back["recovered"] == line["recovered"] and back["detection"] is None
    bold = detection.judge_cell(place, f"{detection.RECOVER} recover.most=0")
    assert bold["recovered_without"] == line["detection"]["counts"]["flagged"][0]

    tried = detection.judge_cell(place, "persistence segregate.persistence=99 segregate.latest=1")
    assert line["segregation"]["core_rows"] > tried["segregation"]["core_rows"] == 0
    assert tried["rule"].endswith(" segregate.latest=1") and tried["recovered"] is None

    truth = json.loads(json.dumps(detection.judge_cell(place, detection.ORACLE)))
    assert truth["detection"]["counts"]["tpr"] == [144, 144]
    assert truth["detection"]["counts"]["fpr"][0] == 0
    assert truth["recovered_without"] == 144 and truth["recovered"]["argmax_over"] == 10
    assert truth["after"]["argmax_over"] == 11

    bare = json.loads(json.dumps(detection.judge_cell(place, detection.PLAIN)))
    assert bare["before"] == line["before"]
    assert bare["after"] is bare["detection"] is bare["recovered"] is None
    assert "undefended" in detection.said(bare)
    assert detection.said(bare).count("->") == 0
    rows, _ = table_of(tmp_path, [bare], "--rule", "plain")
    assert rows[0][4:6] == ["-", "-"]


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_a_clean_label_attack_takes_half_of_its_target_class(attack):
    clean = ATTACKS[attack].labels == "clean"
    assert detection.usual(attack) == (("--rate-of-target", 0.5) if clean else ("--rate", 0.05))


# --- end to end -----------------------------------------------------------------------------------


def test_what_csc_adds_is_told_with_and_without_verification():
    plain = {"total_s": 10.0, "train_s": 10.0}
    csc = {"total_s": 16.0, "train_s": 10.5, "verify_s": 4.0}
    assert end_to_end.added(csc, plain) == pytest.approx(0.6)
    assert end_to_end.added(csc, plain, without="verify") == pytest.approx(0.2)


def test_a_corpus_is_poisoned_once_and_trained_on_twice(out, tmp_path, monkeypatch):
    calls = []

    def command(*words):
        words = list(map(str, words))
        calls.append(words)
        if words[0] == "train":
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir()
            defense = words[words.index("--defense") + 1]
            stages = {"train": 10.0} | ({"verify": 4.0, "cluster": 1.0} if defense == "csc" else {})
            summary = {"defense": defense, "model": "resnet18", "rows": 90, "epochs": 12}
            summary |= {"optimiser_steps": 600, "stage_seconds": stages}
            (folder / "summary.json").write_text(json.dumps(summary))
        if words[0] == "score":
            folder, is_csc = Path(words[1]), words[1].endswith("csc")
            score = {"before": {"asr": 0.9, "acc": 0.8}, "after": {"asr": 0.1, "acc": 0.7}}
            score["detection"] = {"tpr": 0.5, "fpr": 0.25} if is_csc else None
            (folder / "score.json").write_text(json.dumps(score))
        return 1.0

    monkeypatch.setattr(end_to_end, "command", command)
    words = ("c", "--cpu", "--attack", "blend", "--epochs", 12, "--flip", "--work", tmp_path / "w")
    result = run(end_to_end.main, *words)
    assert result.exit_code == 0, result.output
    assert [words[0] for words in calls] == ["poison", "train", "score", "train", "score"]
    trained = [words for words in calls if words[0] == "train"]
    assert all({"--cpu", "--flip", "train.epochs=12"} <= set(words) for words in trained)
    (path,) = out.iterdir()
    plain, csc = json.loads(path.read_text())["lines"]
    assert (plain["recall"], csc["recall"], csc["false_alarms"]) == (None, 0.5, 0.25)
    assert (csc["asr_before"], csc["asr_after"]) == (0.9, 0.1)
    assert (plain["added"], csc["added"]) == (0.0, pytest.approx(0.5))
    assert csc["added_without_verify"] == pytest.approx(0.1)


# --- the check of a GPU ---------------------------------------------------------------------------


def a_step(tmp_path, monkeypatch, code, limit=20.0, **more):
    (tmp_path / "a_step.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return gpu_check.Step("a step", ("a_step",), limit, **more)


def test_a_step_that_succeeds_is_ok_and_its_last_line_is_told(tmp_path, monkeypatch):
    step = a_step(tmp_path, monkeypatch, "print('3 passed')", must_say=r"\d+ passed")
    ended = gpu_check.run_step(step, 99)
    assert (ended.outcome, ended.why, ended.output) == ("ok", "3 passed", "")


def test_tests_that_were_all_skipped_are_no_success(tmp_path, monkeypatch):
    step = a_step(tmp_path, monkeypatch, "print('9 skipped')", must_say=r"\d+ passed")
    ended = gpu_check.run_step(step, 99)
    assert ended.outcome == "failed" and "9 skipped" in ended.why


def test_a_step_that_fails_is_told_by_its_status_and_last_line(tmp_path, monkeypatch):
    ended = gpu_check.run_step(a_step(tmp_path, monkeypatch, "raise OSError('why')"), 99)
    assert (ended.outcome, ended.why) == ("failed", "exit status 1: OSError: why")
    assert "Traceback" in ended.output


def test_a_step_that_overruns_is_stopped_with_its_children(tmp_path, monkeypatch):
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    start = time.perf_counter()
    ended = gpu_check.run_step(a_step(tmp_path, monkeypatch, code, limit=0.7), 99)
    assert time.perf_counter() - start < 10
    assert (ended.outcome, ended.why) == ("failed", "stopped after its limit of 1 s")
    child = Path(f"/proc/{int(ended.output)}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the child lives on")


def test_the_check_goes_on_after_a_failure_and_skips_what_cannot_run(tmp_path, monkeypatch):
    bad = a_step(tmp_path, monkeypatch, "raise SystemExit(3)")
    (tmp_path / "good.py").write_text("print('done')")
    good = gpu_check.Step("good", ("good",), 20)
    no_corpus = gpu_check.Step("none", ("good",), 20, skip="no corpus")
    lines = list(gpu_check.run_all([bad, no_corpus, good], 60))
    assert [line["outcome"] for line in lines] == ["failed", "skipped", "ok"]
    assert [line["why"] for line in lines] == ["exit status 3: no output", "no corpus", "done"]
    (late,) = gpu_check.run_all([good], 5)
    assert late["outcome"] == "skipped" and "of 450 s" in late["why"]


def test_the_check_fits_into_eight_minutes_and_takes_a_corpus_if_there_is_one(tmp_path):
    named = {step.name.split(",")[0]: step for step in gpu_check.steps(str(tmp_path), "w")}
    assert list(named) == ["tests", "traffic", "conceal", "clustering", "loader", "end to end"]
    assert sum(step.limit for step in list(named.values())[:-1]) < gpu_check.ALL == 450
    assert not named["loader"].skip and str(tmp_path) in named["end to end"].words
    without = {step.name.split(",")[0]: step for step in gpu_check.steps("", "w")}
    assert "CSC_GPU_CORPUS" in without["loader"].skip
    assert (
        "digits" in without["end to end"].words and "12 epochs" in gpu_check.steps("", "w")[-1].name
    )


def test_the_check_saves_every_step_and_fails_if_one_did(out, monkeypatch):
    monkeypatch.setattr(gpu_check, "require_gpu", lambda: None)
    outcomes = iter(
        [gpu_check.Ended("failed", "broke", 1.0, "tail"), *[gpu_check.Ended("ok", "")] * 5]
    )
    monkeypatch.setattr(gpu_check, "run_step", lambda step, left: next(outcomes))
    result = run(gpu_check.main)
    assert result.exit_code == 1
    assert "tests: failed, 1 s, broke" in result.output
    (path,) = out.iterdir()
    assert len(json.loads(path.read_text())["lines"]) == 6
    monkeypatch.setattr(gpu_check, "run_step", lambda step, left: gpu_check.Ended("ok", ""))
    assert run(gpu_check.main).exit_code == 0


def test_an_attack_that_took_hold_and_was_not_found_is_missed():
    line = {"defense": "csc", "asr_before": 0.9, "recall": 0.0}
    assert end_to_end.is_missed(line)
    assert not end_to_end.is_missed(line | {"recall": 0.01})
    assert not end_to_end.is_missed(line | {"asr_before": 0.1})
    assert not end_to_end.is_missed(line | {"defense": "plain", "recall": None})


def test_features_that_came_down_show_in_the_largest_copy():
    copies = {"DtoH": 10**9, "HtoD": 0, "DtoD": 0, traffic.LARGEST: 4 * 50 * 8}
    assert traffic.shows_features(copies, rows=50, dims=8)
    assert not traffic.shows_features(copies, rows=50, dims=9)


def test_make_gpu_check_installs_nothing():
    plan = subprocess.run(
        ["make", "--no-print-directory", "-n", "-B", "gpu-check", "GPU_PYTHON=some-python"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert plan.stdout.split() == ["some-python", "-m", "benchmarks.gpu_check"]


def test_small_steps_do_not_wait_with_spinning_threads():
    """Torch reads the policy once, when it loads: nothing of ours may load it before."""
    code = (
        "import benchmarks, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["passive", "False"]


# --- misses ---------------------------------------------------------------------------------------


def test_suspects_that_are_wrong_on_purpose_are_wrong_by_as_much():
    class Told:
        labels = np.zeros(1000, np.int64)
        poison = np.arange(1000) < 100
        found = poison
        score = np.linspace(1, 0, 1000)  # believed in most first

    trials = misses.wrong_on_purpose(Told())
    assert trials[0][0] == "the verdict" and (trials[0][2] == Told.found).all()
    by = {(kind, amount): suspect for kind, amount, suspect in trials[1:]}
    assert len(by) == 2 * (len(misses.RECALLS) + len(misses.FALSE_ALARMS))
    for order in ("own", "random"):
        for recall in misses.RECALLS:
            suspect = by[f"{order} misses", recall]
            assert suspect.sum() == suspect[Told.poison].sum() == round(100 * recall)
        for share in misses.FALSE_ALARMS:
            suspect = by[f"{order} false alarms", share]
            assert suspect[Told.poison].all() and suspect[~Told.poison].sum() == round(900 * share)
    assert by["own misses", 0.4][:40].all()
    assert not by["random misses", 0.4][:40].all()
    assert by["own false alarms", 0.01][100:109].all()


def test_misses_of_a_judged_cell_are_scored_round_by_round(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "command", lambda *words: run(cli, *words))
    monkeypatch.setattr(misses, "RECALLS", (1.0, 0.4))
    monkeypatch.setattr(misses, "FALSE_ALARMS", (0.05,))
    changed = ["train.epochs=2", "train.min_steps=1", "train.batch=32"]
    cell = detection.train_cell(a_cell(rate=0.1, set=changed), "digits", tmp_path)
    place, out = detection.folder(cell, tmp_path), tmp_path / "misses.jsonl"
    done = run(misses.main, place, "--verdict", "run/suspects.csv", "--out", out)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    of = {(line["kind"], line["amount"]): line["rounds"] for line in lines}
    assert len(lines) == len(of) == 7
    assert of["own misses", 1.0][0]["tpr"] == 1.0 and of["own misses", 1.0][0]["fpr"] == 0.0
    assert of["own misses", 0.4][0]["tpr"] == pytest.approx(0.4, abs=0.01)
    assert len(of["own false alarms", 0.05]) == 1
    assert all(0 <= r["asr"] <= 1 and 0 <= r["acc"] <= 1 for line in lines for r in line["rounds"])
    recall = [r["tpr"] for r in of["random misses", 0.4]]
    assert recall == sorted(recall)  # growing loses nobody


# --- thresholds -----------------------------------------------------------------------------------


def test_every_constant_of_the_rule_is_moved_and_moved_back():
    usual = Settings()
    seen = set()
    for module, name, factor in thresholds.variants():
        where = usual if module == "settings" else None
        where = where or (importlib.import_module(f"csc_gpu.segregate.{module}") if module else 0)
        was = getattr(where, name) if module else None
        with thresholds.changed(module, name, factor, usual) as (settings, value):
            now = getattr(settings if module == "settings" else where, name) if module else None
            if module:
                assert value == now and (now < was if factor < 1 else now > was), name
                assert name in thresholds.NOT_SHARES or now <= 1.0
        assert module in ("", "settings") or getattr(where, name) == was
        seen.add(name)
    assert len(seen) == 1 + sum(map(len, thresholds.CONSTANTS.values()))
    assert [thresholds.moved("persistence", 3, factor) for factor in (0.75, 1.25)] == [2, 4]
    assert thresholds.moved("SURELY", 0.9, 1.25) == 1.0
    assert thresholds.moved("APART", 6.0, 1.25) == 7.5


def test_a_cell_is_judged_with_constants_moved_and_a_check_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "command", lambda *words: run(cli, *words))
    monkeypatch.setattr(thresholds, "CONSTANTS", {"court": ("ALONE", "SURELY")})
    monkeypatch.setattr(thresholds, "moved", lambda name, value, factor: 1.01 if factor > 1 else 0)
    changed = ["train.epochs=2", "train.min_steps=1", "train.batch=32"]
    cell = detection.train_cell(a_cell(rate=0.1, set=changed), "digits", tmp_path)
    place, out = detection.folder(cell, tmp_path), tmp_path / "thresholds.jsonl"
    done = run(thresholds.cli, "judge", place, "--out", out)
    assert done.exit_code == 0, done.output
    lines = thresholds.read(out)
    told = [(line["constant"], line["factor"]) for line in lines]
    assert told == [(name, factor) for _, name, factor in thresholds.variants()]
    trained = sum(line["checks_trained"] for line in lines)
    assert trained == len(list((place / "checks").glob("*/*.npz")))
    assert run(thresholds.cli, "judge", place, "--out", out).output == ""  # all has a line
    assert thresholds.read(out) == lines
    again = run(thresholds.cli, "judge", place, "--out", tmp_path / "again.jsonl")
    assert again.exit_code == 0, again.output
    same = ("constant", "factor", "tpr", "fpr", "suspects")
    for one, other in zip(lines, thresholds.read(tmp_path / "again.jsonl"), strict=True):
        assert [one[name] for name in same] == [other[name] for name in same]
        assert other["checks_trained"] == 0
    assert "| constant |" in run(thresholds.cli, "table", out).output


def test_the_table_of_thresholds_names_the_cell_that_moves_most():
    def line(cell, constant, factor, tpr, fpr=0.0, suspects=""):
        told = {"tpr": tpr, "fpr": fpr, "value": 0.5 * factor, "suspects": suspects}
        return {"cell": cell, "constant": constant, "factor": factor, **told}

    lines = [line(cell, thresholds.AS_IT_IS, 1.0, 0.9) for cell in "abc"]
    lines += [line("a", "MARGIN", 0.75, 0.95, 0.001, "x"), line("b", "MARGIN", 0.75, 0.2, 0, "y")]
    lines += [line("c", "MARGIN", 0.75, 0.9), line("a", "APART", 1.25, 0.9)]
    said = thresholds.markdown(lines)
    moved = "| `MARGIN` | 0.375 | 2 of 3 | 0.900 to 0.200 (b) | 0.0000 to 0.0010 (a) |"
    assert moved in said and "In none of 3 cells: `APART` 0.625." in said


def test_the_tables_of_the_readme_say_what_the_committed_lines_say(tmp_path):
    assert run(tables.cli, "--check").exit_code == 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- clean -->\nsomething typed\n<!-- /clean -->\nafter\n")
    assert run(tables.cli, page, "--check").exit_code == 1
    assert run(tables.cli, page).exit_code == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- clean -->\n| data |") and "typed" not in text
    assert text.endswith("<!-- /clean -->\nafter\n")
    assert run(tables.cli, page, "--check").exit_code == 0


# --- killed and resumed ---------------------------------------------------------------------------


class Start:
    """A start of csc-gpu train: what it tells, and how often it is asked before it does."""

    def __init__(self, log: Path, told: str = "", after: int = 0) -> None:
        self.log, self.told, self.after, self.asked = log, told, after, 0

    def poll(self) -> int | None:
        self.asked += 1
        if self.asked > self.after and self.told:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(self.told)
            self.told = ""
        return None

    def wait(self, seconds: float | None = None) -> int:
        if seconds is not None:
            raise subprocess.TimeoutExpired("train", seconds)
        self.poll()
        return 0

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGKILL


def test_every_start_of_a_killed_run_is_known_by_what_it_told_itself(tmp_path, monkeypatch):
    """The second start gets no further than the first, and is killed in the stage nevertheless."""
    there = tmp_path / "killed-0.partial" / "log.jsonl"
    line = '{"event": "conceal", "seconds": %d, "epoch": %d}\n'
    starts = [
        Start(tmp_path / "whole" / "log.jsonl", line % (1, 1) + line % (2, 9)),
        Start(there, line % (1, 7) + '{"event": "conc'),
        second := Start(there, line % (1, 3), after=3),
        Start(there),
    ]
    given = iter(starts)
    monkeypatch.setattr(kill, "started", lambda *words: next(given))
    monkeypatch.setattr(kill, "hashes", lambda folder: {})
    words = ("c", "--work", tmp_path, "--kills", 2, "--each", 2, "--stage", "conceal")
    done = run(kill.main, *words, "--out", tmp_path / "kill.jsonl")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "kill.jsonl").read_text())["in"] == ["conceal 7", "conceal 3"]
    assert second.asked > 3


def test_what_an_earlier_start_told_is_not_where_this_one_was(tmp_path):
    log = tmp_path / "log.jsonl"
    assert kill.furthest(log, 0) == "before training"
    log.write_text('{"event": "train", "epoch": 4, "seconds": 1}\n')
    assert kill.furthest(log, 0) == "train 4"
    assert kill.furthest(log, log.stat().st_size) == "before training"
