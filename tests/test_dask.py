"""Clustering over several GPUs: what is asked of Dask and cuML, and what is said of their lack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.cluster import DBSCAN

from csc_gpu.backend import Settings, doctor, gpu, open_backend
from csc_gpu.backend.workspace import Workspace
from csc_gpu.cli import cli
from csc_gpu.errors import BackendUnavailable, ConfigError
from tests.fake_gpu import FakeDriver
from tests.test_cuda_signatures import parameters

ADDRESS = "tcp://node7:8786"


class FakeClient:
    """A dask.distributed.Client of a cluster with so many workers, or none to be reached."""

    workers = 2

    def __init__(self, address: str, *, timeout: float) -> None:
        assert (address, timeout) == (ADDRESS, gpu.CONNECT)
        if self.workers < 0:
            raise OSError("Timed out trying to connect to\n tcp://node7:8786 after 10 s")

    def nthreads(self) -> dict[str, int]:
        return {f"tcp://worker{number}": 1 for number in range(self.workers)}


class SpreadDBSCAN:
    """cuml.dask.cluster.DBSCAN: all but client and verbose goes to the workers' own DBSCAN."""

    def __init__(self, *, client: FakeClient, verbose: bool = False, **rest: Any) -> None:
        assert isinstance(client, FakeClient)
        parameters("DBSCAN.__init__").bind("self", **rest)
        assert rest["output_type"] == "numpy" and rest["calc_core_sample_indices"] is False
        self._model = DBSCAN(eps=rest["eps"], min_samples=rest["min_samples"])

    def fit_predict(self, X: np.ndarray, out_dtype: str = "int32") -> np.ndarray:  # noqa: N803
        assert type(X) is np.ndarray and X.dtype == np.float32 and X.flags.c_contiguous
        return self._model.fit_predict(X).astype(out_dtype)


@pytest.fixture
def modules(monkeypatch) -> dict[str, Any]:
    """What is imported, by name."""
    there = {
        "dask.distributed": SimpleNamespace(Client=FakeClient),
        "cuml.dask.cluster": SimpleNamespace(DBSCAN=SpreadDBSCAN),
    }
    monkeypatch.setattr(gpu, "imported", there.__getitem__)
    return there


@pytest.fixture
def driver(modules, monkeypatch) -> gpu.SpreadCuda:
    """The real edge, without the GPU that it would open first."""
    fake = FakeDriver()
    monkeypatch.setattr(gpu.Cuda, "__init__", lambda self, settings: setattr(self, "xp", fake.xp))
    monkeypatch.setattr(gpu.Cuda, "free_bytes", lambda self: 10**9)
    monkeypatch.setattr(gpu.Cuda, "device", fake.device, raising=False)
    monkeypatch.setattr(gpu.Cuda, "card", fake.card, raising=False)
    return gpu.SpreadCuda(Settings(cluster="dask", scheduler=ADDRESS))


def test_the_verb_gives_the_clusters_of_one_gpu(driver):
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 0.1, (90, 4)).astype(np.float32) + np.repeat(np.eye(4)[:3], 30, axis=0)
    rows = rows.astype(np.float32)
    backend = gpu.GpuBackend(driver, 1, Settings())
    found = backend.dbscan(backend.xp.asarray(rows), eps=0.3, min_samples=5)
    assert found.shape == (90,) and found.dtype == np.int32
    wanted = DBSCAN(eps=0.3, min_samples=5).fit_predict(rows)
    assert backend.to_numpy(found).tolist() == wanted.tolist() and wanted.max() == 2


def test_wide_numbers_are_asked_for_where_they_are_needed(driver):
    points = driver.xp.asarray(np.zeros((6, 2), np.float32))
    found = driver.dbscan(points, 0.5, 2, Workspace(6, 1, "int64"))
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("workers", "said"),
    [(-1, r"no Dask scheduler answers at tcp://node7:8786 \(Timed out"), (0, "has no workers")],
)
def test_a_cluster_that_is_not_there_is_one_line(modules, monkeypatch, workers: int, said: str):
    monkeypatch.setattr(FakeClient, "workers", workers)
    with pytest.raises(BackendUnavailable, match=said) as told:
        gpu.connected(ADDRESS)
    assert "\n" not in str(told.value) and "dask cuda worker" in str(told.value)


def test_who_does_not_cluster_does_not_connect(monkeypatch):
    made: list[type] = []

    def driver(kind: type) -> Any:
        return lambda settings: (made.append(kind), FakeDriver())[1]

    for name in ("Cuda", "SpreadCuda"):
        monkeypatch.setattr(gpu, name, driver(getattr(gpu, name)))
    monkeypatch.setattr(gpu, "local_rank", lambda: 0)
    kinds = gpu.Cuda, gpu.SpreadCuda
    settings = Settings(cluster="dask", scheduler=ADDRESS)
    gpu.open_gpu(1, settings)
    gpu.open_gpu(1, Settings())
    assert [kind.__name__ for kind in made] == ["SpreadCuda", "Cuda"] and kinds


def test_what_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "missing_for_gpu", list)
    monkeypatch.setattr(doctor, "_is_there", {"distributed", "cudf"}.__contains__)
    said = (
        r"dask_cuda and raft_dask are not installed \(pip install 'cuml-cu1.\[dask\]' dask-cuda\)"
    )
    with pytest.raises(BackendUnavailable, match=said):
        open_backend("gpu", 1, Settings(cluster="dask", scheduler=ADDRESS))
    assert "dask_cuda and raft_dask are not installed" in doctor.advice()["several gpus"]


@pytest.mark.parametrize("half", [{"cluster": "dask"}, {"scheduler": ADDRESS}])
def test_one_without_the_other_is_refused(half: dict[str, str]):
    with pytest.raises(ConfigError, match="go together"):
        Settings(**half)


@pytest.mark.parametrize("command", ["train", "segregate"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--cluster", "dask", "--scheduler", ADDRESS, "--cpu"],
            "leave it out, or leave out --cpu",
        ),
        (["--cluster", "dask", "--cpu"], "go together"),
        (["--cluster", "spark", "--cpu"], "gpu.cluster must be one of local, dask, got 'spark'"),
    ],
)
def test_the_options_are_settings_and_refused_in_one_line(tmp_path, command, more, said):
    done = CliRunner().invoke(cli, [command, "digits", "--out", str(tmp_path / "out"), *more])
    assert done.exit_code == 2 and said in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
