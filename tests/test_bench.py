"""The benches of csc-gpu: exact data, honest clocks, figures with all it takes to read them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.cluster import DBSCAN

from csc_gpu import bench, conceal
from csc_gpu.backend import open_backend
from csc_gpu.cli import cli
from csc_gpu.config import override
from csc_gpu.csc import Settings
from csc_gpu.errors import CorpusError

CPU = open_backend("cpu", 1)


def test_drawn_features_lie_on_the_lattice_and_no_distance_is_the_radius():
    points = bench.drawn(400, 24, seed=1)
    assert points.shape == (400, 24) and points.dtype == np.float32
    assert (points == np.rint(points)).all()
    eps = bench.lattice_eps(points, 8, CPU, exact=True)
    whole = points.astype(np.int64)
    squared = ((whole[:, None] - whole[None]) ** 2).sum(axis=2)
    assert np.abs(squared - eps * eps).min() >= 0.499
    assert squared.max() < 2**24  # whole numbers up to here are exact in float32


def test_drawn_features_have_clusters_an_island_and_noise():
    points = bench.drawn(2000, 16, seed=0)
    (line,) = bench.clustering(CPU, rows=2000, dims=16, repeats=1)
    assert line["clusters"] >= 8
    assert 0.01 < line["noise"] / 2000 < 0.6
    found = DBSCAN(eps=line["eps"], min_samples=line["min_samples"]).fit_predict(points)
    assert line["clusters"] == found.max() + 1
    assert line["noise"] == (found < 0).sum()


def test_the_same_seed_draws_the_same_features():
    assert (bench.drawn(50, 8, seed=3) == bench.drawn(50, 8, seed=3)).all()
    assert (bench.drawn(50, 8, seed=3) != bench.drawn(50, 8, seed=4)).any()


def test_a_file_is_clustered_at_its_last_snapshot(tmp_path: Path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 60, 5)).astype(np.float32)
    np.savez(tmp_path / "f.npz", features=features, labels=np.arange(60) % 3)
    (line,) = bench.clustering(CPU, rows=1, dims=1, repeats=2, features=tmp_path / "f.npz")
    assert (line["rows"], line["dims"], line["n"]) == (60, 5, 2)
    assert (bench.given(tmp_path / "f.npz") == features[-1]).all()


def test_runs_are_timed_after_the_warm_up_and_told_by_median_and_spread():
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        time.sleep(1 if len(calls) == 1 else 0.01)

    runs = bench.timed(work, CPU, repeats=3)
    assert len(calls) == 4
    line = runs.line()
    assert line["n"] == 3
    assert 0.01 <= line["min_s"] <= line["median_s"] <= line["max_s"]
    assert line["min_s"] < 1  # the first call took a second, and does not count
    assert runs.rate(10) == pytest.approx(10 / line["median_s"])


def test_concealment_is_compared_with_the_eager_loop():
    plan = conceal.Settings(epochs=2, batch=16)
    captured, eager = bench.conceal(CPU, rows=50, dims=6, classes=3, repeats=1, settings=plan)
    assert (captured["loop"], eager["loop"]) == ("captured", "eager")
    assert captured["steps"] == 2 * 4
    assert captured["weights_differ_by"] == 0.0  # on the CPU both loops are one
    assert eager["times_eager"] == 1.0


def test_a_step_that_is_recorded_wrongly_shows_in_the_weights():
    class Wrong(bench.Eager):
        def captured(self, step):
            return lambda rows, rates: step(rows, rates * 0.5)

    plan = conceal.Settings(epochs=1, batch=16)
    lines = bench.conceal(Wrong(CPU), rows=50, dims=6, classes=3, repeats=1, settings=plan)
    assert lines[0]["weights_differ_by"] > 0.1


def pictures(folder: Path, each: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking DataLoader workers
def test_loaders_are_compared_with_what_training_takes(tmp_path: Path):
    lines = bench.loader(
        CPU, source=str(pictures(tmp_path / "c")), size=0, batch=4, repeats=1, model="resnet8"
    )
    assert [line["loader"] for line in lines] == [
        "files, once",
        "files, every epoch",
        "files, torch DataLoader",
        "resident",
        "training resnet8",
    ]
    assert all(line["images_per_s"] > 0 and line["images"] == 10 for line in lines)


def test_a_corpus_without_files_has_nothing_to_decode():
    with pytest.raises(CorpusError, match="holds arrays"):
        bench.loader(CPU, source="digits", size=0, batch=4, repeats=1, model="resnet8")


def test_what_csc_adds_is_told_with_and_without_verification():
    changes = {"train.epochs": 1, "train.min_steps": 1, "train.batch": 64}
    settings = override(Settings(), changes)
    plain, csc = bench.train(CPU, source="digits", settings=settings, repeats=1)
    assert (plain["defense"], csc["defense"]) == ("plain", "csc")
    assert plain["added"] == 0.0 and plain["features_s"] == 0.0
    assert csc["features_s"] > 0 and csc["cluster_s"] > 0
    total = sum(csc[f"{s}_s"] for s in ("train", "features", "cluster", "segregate", "conceal"))
    assert csc["median_s"] == pytest.approx(total + csc["verify_s"], rel=1e-6)
    assert csc["added_without_verify"] == pytest.approx(total / plain["median_s"] - 1, rel=1e-6)


def test_the_table_has_one_head_and_dashes_where_there_is_nothing():
    text = bench.table([{"a": 1, "b": 0.123456}, {"a": 22, "c": "x"}])
    assert text.splitlines() == [" a       b  c", " 1  0.1235  -", "22       -  x"]


def test_the_json_says_which_machine_commit_and_versions(tmp_path: Path):
    file = tmp_path / "b.json"
    arguments = ["bench", "clustering", "--cpu", "--rows", "200", "--dims", "4", "--repeats", "2"]
    result = CliRunner().invoke(cli, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    told = json.loads(file.read_text())
    assert told["bench"] == "clustering" and told["backend"] == "cpu"
    assert {"torch", "gpu", "processor", "cuml", "cudf"} <= told["machine"].keys()
    assert told["lines"][0]["rows"] == 200 and told["lines"][0]["n"] == 2
    assert "median_s" in result.output


def test_a_setting_that_is_none_is_refused_by_every_bench():
    for name in ("clustering", "conceal", "train", "loader digits"):
        result = CliRunner().invoke(cli, ["bench", *name.split(), "--cpu", "--set", "data.sise=3"])
        assert result.exit_code == 2, name
        assert "unknown setting 'data.sise'" in result.output


def test_bench_without_a_gpu_says_what_is_missing_and_how_to_go_on():
    from csc_gpu.backend.doctor import missing_for_gpu

    if not missing_for_gpu():
        pytest.skip("a GPU is here")
    result = CliRunner().invoke(cli, ["bench", "conceal"])
    assert result.exit_code == 2
    assert result.output.strip().endswith("or pass --cpu")
    assert len(result.output.strip().splitlines()) == 1
