"""The GPU backend on a fake driver: the same answers as the CPU, and nothing travels unseen."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from csc_gpu import csc
from csc_gpu.backend import Augment, open_backend, resident
from csc_gpu.backend import Settings as BackendSettings
from csc_gpu.backend import gpu as gpu_module
from csc_gpu.backend.cpu import CpuBackend
from csc_gpu.backend.gpu import MARGIN, Cuda
from csc_gpu.backend.workspace import is_out_of_memory
from csc_gpu.conceal import Settings as Concealment
from csc_gpu.conceal import conceal
from csc_gpu.errors import DeviceTooSmall
from csc_gpu.features import features, predict
from csc_gpu.models import new_model
from csc_gpu.segregate import RULES, Settings, looked_at, observe, segregate
from csc_gpu.segregate.court import candidates
from csc_gpu.train import Settings as Training
from csc_gpu.types import Corpus, DefenderView
from tests.fake_gpu import DeviceArray, FakeDriver, fake_gpu
from tests.worlds import oracle, world

CPU = open_backend("cpu", 1)
SMALL_CHANGE = 64 * 1024
"""Bytes that numbers of clusters, radii and the like may take on their way down."""


class FusedCpu(CpuBackend):
    """The CPU with the optimiser of the GPU, so that not even a rounding differs."""

    fused = True


def fused_cpu() -> FusedCpu:
    return FusedCpu(1, BackendSettings())


# ------------------------------------------------------------------------- the fake itself


def test_the_fake_refuses_what_would_travel_unseen():
    driver = FakeDriver()
    xp, host = driver.xp, np.arange(4.0)
    there = xp.asarray(host)
    for unseen in (
        lambda: np.asarray(there),
        lambda: there + host,
        lambda: host + there,
        lambda: host @ there,
        lambda: there[np.array([0, 1])],
        lambda: there[[0, 1]],
        lambda: there.__setitem__(slice(None), host),
        lambda: there.__iadd__(host),
        lambda: xp.where(host > 0, there, 0),
        lambda: xp.concatenate([there, host]),
        lambda: np.concatenate([there, host]),
        lambda: there + torch.zeros(4),
    ):
        with pytest.raises(TypeError):
            unseen()
    with pytest.raises(AttributeError):
        xp.vecdot  # noqa: B018 - NumPy has it, CuPy does not
    with pytest.raises(AttributeError):
        there.resize  # noqa: B018
    assert driver.traffic.sizes(down=True) == []
    assert driver.traffic.sizes(down=False) == [host.nbytes]


def test_the_fake_counts_what_travels_openly():
    driver = FakeDriver()
    traffic, there = driver.traffic, driver.xp.zeros((3, 2))
    with traffic.during("a number"):
        assert float(there.sum()) == 0
        assert int(there.argmax()) == 0
        assert not there.any()
    with traffic.during("an array"):
        driver.xp.asnumpy(there)
    assert traffic.sizes(down=True, label="a number") == [8, 8, 1]
    assert traffic.sizes(down=True, label="an array") == [48]
    assert traffic.sizes(down=False) == []


def test_the_fake_shares_memory_with_torch():
    backend = fake_gpu()
    tensor = torch.zeros(5)
    array = backend.array(tensor)
    array[2] = 7
    assert tensor.tolist() == [0, 0, 7, 0, 0]
    assert backend.tensor(array).data_ptr() == tensor.data_ptr()
    assert sum(backend._driver.traffic.sizes(down=True)) == 0


# ------------------------------------------------------------------------- segregation

MEASURED = ("eps", "density")
"""Of a cluster: come from distances, which the GPU measures in float32 and scikit-learn in float64.
"""


def snapshots(count: int, rows: int) -> tuple[Any, list[np.ndarray]]:
    """A world, and its features at so many moments."""
    there, rng = world(rows=rows), np.random.default_rng(5)
    noise = rng.normal(0, 0.05, (count, *there.points.shape)).astype(np.float32)
    return there, [there.points + step for step in noise]


def verdict_of(backend, there, moments, settings, checked=False, commands=1.0):
    up = backend.xp.asarray
    witness = oracle(there, commands=commands, xp=backend.xp) if checked else None
    scales = looked_at(range(len(moments)), settings)
    seen = [
        observe(up(points), there.labels, epoch, settings, backend, scales=scales[epoch])
        for epoch, points in enumerate(moments)
    ]
    return seen, segregate(seen, there.labels, settings, backend, witness)


def close(value):
    """The same number but for rounding; none if the other is none."""
    return pytest.approx(value, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("rule", list(RULES))
def test_segregation_says_what_it_says_on_the_cpu(rule, checked):
    there, moments = snapshots(3, rows=100)
    _, here = verdict_of(CPU, there, moments, Settings(rule=rule), checked)
    _, fake = verdict_of(fake_gpu(), there, moments, Settings(rule=rule), checked)
    assert here.suspect.any() or rule == "algorithm1"  # whose cap frees whole labels
    np.testing.assert_array_equal(here.suspect, fake.suspect)
    np.testing.assert_array_equal(here.score, fake.score)
    assert here.notes == fake.notes
    assert len(here.clusters) == len(fake.clusters)
    for one, other in zip(here.clusters, fake.clusters, strict=True):
        assert other == one | {name: close(one[name]) for name in MEASURED}
    assert here.table.keys() == fake.table.keys()
    for name, column in here.table.items():
        assert type(fake.table[name]) is np.ndarray
        if name == "cluster_density":
            np.testing.assert_allclose(column, fake.table[name], rtol=1e-5)
        else:
            np.testing.assert_array_equal(column, fake.table[name])


def test_more_scales_than_eight_give_evidence_too():
    there, moments = snapshots(2, rows=60)
    many = Settings(coarsest=1.0)  # ten scales: a byte has too few bits
    _, here = verdict_of(CPU, there, moments, many)
    _, fake = verdict_of(fake_gpu(), there, moments, many)
    np.testing.assert_array_equal(here.suspect, fake.suspect)


def test_nothing_but_noise_is_no_fault_on_the_device():
    class AllNoise(FakeDriver):
        def dbscan(self, points, eps, min_samples, space):
            return self.xp.full(len(points), -1, dtype=self.xp.int32)

    there, moments = snapshots(2, rows=30)
    for rule in RULES:
        backend = fake_gpu(AllNoise())
        _, told = verdict_of(backend, there, moments, Settings(rule=rule), True, commands=0.0)
        assert not told.suspect.any()


def assert_little_comes_down(driver, n: int, n_features: int, count: int) -> None:
    """At most two bytes a row and snapshot, and never anything as large as the features."""
    down = driver.traffic.sizes(down=True)
    assert sum(down) <= 2 * n * count + SMALL_CHANGE
    assert max(down) < 4 * n * n_features


@pytest.mark.parametrize("checked", [True, False])
def test_of_each_row_and_snapshot_two_bytes_come_down_at_most(checked):
    there, moments = snapshots(10, rows=300)
    driver = FakeDriver()
    verdict_of(fake_gpu(driver), there, moments, Settings(), checked)
    assert len(driver.spaces) == 4 * 7 + 10  # snapshots that count, scales; all at the last
    assert_little_comes_down(driver, *there.points.shape, len(moments))


@pytest.mark.parametrize("checked", [True, False])
def test_a_byte_a_row_and_snapshot_and_one_number_a_row_are_all_that_grows(checked):
    """Verification adds a bit a row for each snapshot's strays and each suspected label's rows away
    from home, and an order of all rows for each probe.
    """
    there, moments = snapshots(4, rows=1000)
    driver = FakeDriver()
    verdict_of(fake_gpu(driver), there, moments, Settings(scales=(0.3, 0.6)), checked)
    n = len(there.labels)
    grows = [size for size in driver.traffic.sizes(down=True) if size >= n / 9]
    assert grows == [n] * 4 + [2 * n] + ([n / 8] * 5 + [8 * n] * 2 if checked else [])


def test_of_snapshots_that_do_not_count_nothing_comes_down():
    there, moments = snapshots(4, rows=1000)
    driver = FakeDriver()
    verdict_of(fake_gpu(driver), there, moments, Settings(scales=(0.3, 0.6), latest=1))
    n = len(there.labels)
    assert [size for size in driver.traffic.sizes(down=True) if size >= n / 9] == [n, 2 * n]


def test_features_that_come_down_would_be_noticed():
    there, moments = snapshots(10, rows=300)
    driver = FakeDriver()
    backend = fake_gpu(driver)
    verdict_of(backend, there, moments, Settings(), True)
    assert_little_comes_down(driver, *there.points.shape, len(moments))
    backend.to_numpy(backend.xp.asarray(moments[0]))  # planted
    with pytest.raises(AssertionError):
        assert_little_comes_down(driver, *there.points.shape, len(moments))


def test_what_comes_down_with_a_snapshot_does_not_grow_with_its_rows():
    sizes = []
    for rows in (30, 300):
        there, moments = snapshots(1, rows=rows)
        driver = FakeDriver()
        backend = fake_gpu(driver)
        with driver.traffic.during("observe"):
            observe(backend.xp.asarray(moments[0]), there.labels, 1.0, Settings(), backend)
        sizes.append(driver.traffic.sizes(down=True, label="observe"))
    assert sizes[0] == sizes[1]
    assert max(sizes[1]) <= 8  # numbers alone: radii, clusters, labels


def test_the_rows_away_from_home_come_down_as_bits():
    there, moments = snapshots(1, rows=100)
    driver = FakeDriver()
    backend = fake_gpu(driver)
    (seen,), _ = verdict_of(backend, there, moments, Settings())
    with driver.traffic.during("candidates"):
        candidates(seen, there.labels, there.poison, 0, backend)
    bits = -(-len(there.labels) // 8)
    assert set(driver.traffic.sizes(down=True, label="candidates")) == {8, bits}


# ------------------------------------------------------------------------- features, conceal


def digits(count: int = 240) -> tuple[Corpus, np.ndarray]:
    """Handwritten digits 0 to 3; every fifth that is not a 0 is stamped and labelled 0."""
    found = load_digits(n_class=4)
    pixels = (found.images[:count] * 15).astype(np.uint8)
    labels = found.target[:count].astype(np.int64)
    poison = (labels > 0) & (np.arange(count) % 5 == 0)
    pixels[poison, -3:, -3:] = 255
    labels[poison] = 0
    rows = np.arange(count)
    colours = np.repeat(pixels[..., None], 3, axis=3)
    return Corpus(labels, tuple("0123"), rows, ("",) * count, colours), poison


def test_features_gather_in_one_array_and_nothing_comes_down():
    corpus, _ = digits(600)  # more than one batch
    model = new_model("resnet8", 4, 8, seed=0)
    driver = FakeDriver()
    backend = fake_gpu(driver)
    points = features(model, corpus, backend)
    assert isinstance(points, DeviceArray)
    assert points.shape == (len(corpus), 128) and points.dtype == np.float32
    assert points.flags.c_contiguous
    answers = predict(model, corpus, backend)
    assert driver.traffic.transfers == []
    np.testing.assert_array_equal(points.get(), features(model, corpus, CPU))
    np.testing.assert_array_equal(answers.get(), predict(model, corpus, CPU))


@pytest.mark.parametrize("graph", [True, False])
def test_concealment_gives_the_same_weights_as_on_the_cpu(graph):
    corpus, poison = digits()
    model = new_model("resnet8", 4, 8, seed=0)
    plan = Concealment(epochs=3, batch=32, replay=5)
    driver = FakeDriver()
    here = conceal(model, corpus, poison, plan, fused_cpu(), seed=1)
    fake = conceal(model, corpus, poison, plan, fake_gpu(driver, graph=graph), seed=1)
    assert driver.recordings == (1 if graph else 0)
    assert driver.replays == (3 if graph else 0)  # of 24 steps 5 run eagerly, 4 at the end as well
    assert driver.traffic.transfers == []
    assert not torch.equal(fake.head.weight[:4], model.head.weight)
    for one, two in zip(here.parameters(), fake.parameters(), strict=True):
        assert torch.equal(one, two)


def plan_of(**changes: Any) -> csc.Settings:
    return csc.Settings(
        train=Training(model="resnet8", epochs=8, min_steps=0, batch=32),
        watch=csc.Watch(epochs=4, keep=True),
        segregate=Settings(check_epochs=2, persistence=2, min_rows=5, **changes),
        conceal=Concealment(epochs=2, batch=32, replay=3),
    )


@pytest.mark.parametrize("rule", ["two-stage", "persistence"])
def test_the_whole_defense_finds_what_it_finds_on_the_cpu(rule):
    corpus, _ = digits()
    driver = FakeDriver()
    backend = fake_gpu(driver, bf16=False)
    settings = plan_of(rule=rule)
    here = csc.defend(DefenderView(corpus), settings, fused_cpu(), seed=1)
    fake = csc.defend(DefenderView(corpus), settings, backend, seed=1)
    assert here.segregation.notes["core_rows"] > 0
    assert here.segregation.suspect.any() or rule == "two-stage"  # whose check may clear all
    np.testing.assert_array_equal(here.segregation.suspect, fake.segregation.suspect)
    np.testing.assert_array_equal(here.segregation.score, fake.segregation.score)
    for one, two in zip(here.model.parameters(), fake.model.parameters(), strict=True):
        assert torch.equal(one, two)
    kept = fake.snapshots["features"]
    assert isinstance(kept, np.ndarray) and kept.shape == (4, len(corpus), 128)
    assert ("final" in fake.snapshots) == bool(fake.segregation.checks) == (rule == "two-stage")
    large = [size for size in driver.traffic.sizes(down=True) if size > 8 * len(corpus)]
    # the features that were to be kept, and no others
    assert large == [kept[0].nbytes] * (4 + ("final" in fake.snapshots))
    assert {"csc train", "csc features", "csc cluster", "csc segregate", "csc conceal"} <= set(
        driver.marks
    )


def test_the_whole_defense_runs_in_bfloat16():
    corpus, _ = digits()
    backend = fake_gpu(bf16=True)
    with backend.precision():
        product = torch.zeros(2, 2) @ torch.zeros(2, 2)
    assert product.dtype == torch.bfloat16
    told = csc.defend(DefenderView(corpus), plan_of(), backend, seed=3)
    assert told.segregation.suspect.shape == (len(corpus),)
    assert all(value.isfinite().all() for value in told.model.parameters())
    assert {value.dtype for value in told.model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------- batches


@pytest.fixture
def gathered(monkeypatch):
    """The pixels from which each pass gathered its batches."""
    seen = []
    real = resident.batches

    def note(pixels, *args, **named):
        seen.append(pixels)
        return real(pixels, *args, **named)

    monkeypatch.setattr(resident, "batches", note)
    return seen


def test_pixels_go_up_once_for_many_epochs_and_make_room_for_another_corpus(gathered, monkeypatch):
    corpus, _ = digits(50)
    backend = fake_gpu()
    for epoch in range(3):
        rng = np.random.default_rng(epoch)
        list(backend.batches(corpus, 16, augment=Augment(shift=1), rng=rng))
    assert gathered[0] is gathered[1] and gathered[1] is gathered[2]
    assert gathered[0].data_ptr() == corpus.pixels.ctypes.data  # the fake's device is the CPU
    first = weakref.ref(gathered[0])
    gathered.clear()
    freed = []
    send_up = torch.from_numpy
    monkeypatch.setattr(
        torch, "from_numpy", lambda array: (freed.append(first() is None), send_up(array))[1]
    )
    other = replace(corpus, pixels=corpus.pixels.copy())
    list(backend.batches(other, 16))
    assert all(freed)  # the last pixels had left before the next ones came
    assert gathered[0].data_ptr() == other.pixels.ctypes.data


def test_batches_are_those_of_the_cpu():
    corpus, _ = digits(50)
    how = {"order": np.random.default_rng(0).permutation(50), "augment": Augment(2, True)}
    there = fake_gpu().batches(corpus, 16, **how, rng=np.random.default_rng(1))
    here = CPU.batches(corpus, 16, **how, rng=np.random.default_rng(1))
    for one, two in zip(here, there, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.rows, two.rows)


def test_pixels_on_the_device_are_taken_as_they_are(gathered):
    corpus, _ = digits(20)
    tensor = torch.from_numpy(corpus.pixels)
    list(fake_gpu().batches(replace(corpus, pixels=tensor), 8))
    assert gathered[0] is tensor


# ------------------------------------------------------------------------- dbscan, neighbors


def blobs(rows: int = 300, dims: int = 3) -> np.ndarray:
    rng = np.random.default_rng(2)
    return (rng.normal(0, 1, (rows, dims)) + 9 * (np.arange(rows) % 3)[:, None]).astype(np.float32)


def test_dbscan_gives_the_clusters_of_the_cpu_as_int32():
    backend, points = fake_gpu(), blobs()
    found = backend.dbscan(backend.xp.asarray(points), eps=1.5, min_samples=5)
    assert found.dtype == np.int32
    assert found.get().max() == 2
    np.testing.assert_array_equal(found.get(), CPU.dbscan(points, eps=1.5, min_samples=5))


def test_clusters_that_cuml_numbers_in_int64_come_back_as_int32():
    class Wide(FakeDriver):
        def dbscan(self, points, eps, min_samples, space):
            return super().dbscan(points, eps, min_samples, space).astype(np.int64)

    backend = fake_gpu(Wide())
    assert backend.dbscan(backend.xp.asarray(blobs()), eps=1.5, min_samples=5).dtype == np.int32


def many_rows(rows: int) -> DeviceArray:
    """Points without clusters, so many that a batch of them all is more than a megabyte."""
    points = np.arange(rows, dtype=np.float32)[:, None]
    return FakeDriver().xp.asarray(points)


def test_out_of_memory_halves_the_batch_until_it_fits():
    driver = FakeDriver(faults=(MemoryError("1"), MemoryError("2")))
    found = fake_gpu(driver).dbscan(many_rows(3000), eps=0.1, min_samples=2)
    assert (found.get() == -1).all()
    batches = [space.batch for space in driver.spaces]
    assert batches[0] == 3000
    assert batches[1] == pytest.approx(1500, rel=0.05) and batches[1] < 1600
    assert batches[2] == pytest.approx(750, rel=0.1)
    megabytes = [space.mbytes for space in driver.spaces]
    assert megabytes == sorted(megabytes, reverse=True)


def test_a_device_without_room_for_one_row_is_told_in_one_line():
    driver = FakeDriver(free=10_000)
    with pytest.raises(DeviceTooSmall) as told:
        fake_gpu(driver).dbscan(many_rows(3000), eps=0.1, min_samples=2)
    assert "\n" not in str(told.value)
    for part in ("3000 rows", "GPU memory", "gpu.memory", "--cpu"):
        assert part in str(told.value)
    assert driver.spaces == []  # not even tried


@pytest.mark.parametrize("rows", [40, 3000])
def test_a_device_that_is_always_full_is_told_and_not_asked_for_ever(rows):
    driver = FakeDriver(faults=(MemoryError("full"),) * 60)
    with pytest.raises(DeviceTooSmall, match=f"{rows} rows.*--cpu") as told:
        fake_gpu(driver).dbscan(many_rows(rows), eps=0.1, min_samples=2)
    assert isinstance(told.value.__cause__, MemoryError)
    assert len(driver.spaces) < 15


def test_other_faults_pass():
    driver = FakeDriver(faults=(RuntimeError("metric not there"),))
    with pytest.raises(RuntimeError, match="metric not there"):
        fake_gpu(driver).dbscan(many_rows(30), eps=0.1, min_samples=2)
    assert len(driver.spaces) == 1


@pytest.mark.parametrize("change", [np.asfortranarray, np.float64, lambda rows: rows[:, ::-1]])
def test_cuml_gets_rows_of_float32_one_after_the_other(change):
    driver, points = FakeDriver(), blobs()
    backend = fake_gpu(driver)
    backend.dbscan(DeviceArray(change(points), driver.traffic), eps=1.5, min_samples=5)
    assert driver.points[0].dtype == np.float32
    assert driver.points[0].flags.c_contiguous


def test_rows_that_are_right_already_are_not_copied():
    driver = FakeDriver()
    points = driver.xp.asarray(blobs())
    fake_gpu(driver).dbscan(points, eps=1.5, min_samples=5)
    assert driver.points[0] is points


@pytest.mark.parametrize("together", [1, 7, 100])
def test_neighbors_asked_a_few_at_a_time_are_the_same(together, monkeypatch):
    monkeypatch.setattr(gpu_module, "ASKED", together * 4 * blobs().shape[1])
    backend, points = fake_gpu(), blobs(100)
    rows = backend.xp.asarray(points)
    found = backend.neighbors(rows, 4, rows[:50])
    assert found.shape == (50,)
    np.testing.assert_allclose(found.get(), CPU.neighbors(points, 4, points[:50]), rtol=1e-5)


# ------------------------------------------------------------------------- Cuda, without a GPU


@pytest.mark.parametrize(
    ("fault", "is_memory"),
    [
        (MemoryError("std::bad_alloc: out_of_memory: RMM failure"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("exception: cudaErrorMemoryAllocation out_of_memory"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_a_lack_of_memory_is_tried_again(fault, is_memory):
    assert is_out_of_memory(fault) is is_memory


@pytest.mark.parametrize(
    ("free", "limit", "room"),
    [
        (50_000, 90_000, 50_000 - 3_000 - 256),  # the device is nearly full
        (80_000, 20_000, 20_000 - 1_000 - 2_000 - 3_000 - 256),  # the limit is nearer
        (200, 90_000, 0),
    ],
)
def test_clustering_gets_what_is_free_less_what_torch_will_want_back(
    free, limit, room, monkeypatch
):
    """In MB: torch had 4,000 in its cache and 1,000 after emptying it; the pool holds 2,000."""
    emptied = []
    cached = lambda device: (1_000 if "torch" in emptied else 4_000) * 10**6  # noqa: E731
    monkeypatch.setattr(torch.cuda, "memory_reserved", cached)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4_000 * 10**6)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: emptied.append("device"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("torch"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 10**6, 0))
    monkeypatch.setattr(
        gpu_module.loader, "release", lambda: emptied.append("loader"), raising=False
    )
    driver = object.__new__(Cuda)
    driver.device = torch.device("cuda")
    driver._limit = limit * 10**6
    driver._pool = SimpleNamespace(get_allocated_bytes=lambda: 2_000_000_000)
    assert MARGIN == 256_000_000
    assert driver.free_bytes() == room * 10**6
    assert emptied == ["device", "torch", "loader"]
