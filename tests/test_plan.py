"""The memory plan: arithmetic that follows the arrays, and one line where it does not fit."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from csc_gpu import csc, pipeline, plan, segregate
from csc_gpu.backend import Settings as Gpu
from csc_gpu.backend.cpu import CpuBackend
from csc_gpu.cli import cli
from csc_gpu.config import override
from csc_gpu.errors import DeviceTooSmall
from csc_gpu.models import new_model
from csc_gpu.plan import Shape
from csc_gpu.progress import Console
from csc_gpu.types import Corpus, Split

GB = 1_000_000_000
CIFAR = Shape(50_000, 32, 32, 10)
IMAGENET = Shape(1_281_167, 224, 224, 1000)


def settings_of(**changes: object) -> csc.Settings:
    chosen = {"train.model": "resnet18"} | {
        name.replace("__", "."): value for name, value in changes.items()
    }
    return override(csc.Settings(), chosen)


def planned(shape: Shape, memory: int, **changes: object) -> plan.Plan:
    return plan.plan(shape, settings_of(**changes), memory)


def test_pixels_and_features_are_counted_to_the_byte():
    found = planned(CIFAR, 24 * GB)
    assert found.held["pixels"] == 50_000 * 32 * 32 * 3
    assert found.stages["cluster"]["features"] == 50_000 * 512 * 4
    assert found.stages["cluster"]["embedded rows"] == 50_000 * 16 * 4
    assert found.fits and not found.streamed


def test_pixels_that_would_take_half_the_memory_are_streamed():
    found = planned(IMAGENET, 24 * GB)
    assert found.streamed and found.held["pixels"] == 0
    assert not planned(IMAGENET, 1000 * GB).streamed


def test_recovery_is_a_stage_of_its_own_where_it_is_asked_for():
    assert "recover" not in planned(CIFAR, 24 * GB).stages
    asked = planned(CIFAR, 24 * GB, recover__on=True).stages
    assert sum(asked["recover"].values()) > sum(asked["verify"].values())


def test_features_that_are_not_reduced_are_in_the_plan_twice():
    whole = planned(CIFAR, 24 * GB, segregate__pca=0)
    assert whole.stages["cluster"]["embedded rows"] == 50_000 * 512 * 4


def test_activations_follow_batch_and_precision():
    one = planned(CIFAR, 24 * GB, train__batch=64).stages["train"]["activations"]
    two = planned(CIFAR, 24 * GB, train__batch=128).stages["train"]["activations"]
    assert two == pytest.approx(2 * one, rel=0.01)
    exact = planned(CIFAR, 24 * GB, gpu__bf16=False).stages["train"]["activations"]
    assert exact == pytest.approx(2 * two, rel=0.01)


def test_what_training_keeps_is_what_autograd_keeps_on_real_tensors():
    settings = override(csc.Settings(), {"train.model": "resnet8", "train.batch": 8})
    shape = Shape(100, 16, 16, 3)
    model = new_model("resnet8", 3, 16, seed=0)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    images = torch.zeros(8, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(images), torch.zeros(8, dtype=torch.int64))
    loss.backward()
    real = sum(kept.values()) + 2 * max(kept.values())
    found = plan.plan(shape, settings, GB).stages["train"]["activations"]
    assert 2 * found == pytest.approx(real, rel=0.02)  # bf16 halves it


def test_clustering_gets_what_the_rest_leaves():
    found = planned(CIFAR, 24 * GB)
    assert found.clustering is not None
    assert found.clustering.mbytes * 1_000_000 < found.memory - found.peak("cluster")
    assert planned(IMAGENET, 24 * GB, segregate__mode="all").clustering.passes > 1.9
    assert planned(CIFAR, 139 * GB).clustering.passes == 1


def test_too_small_a_device_is_refused_with_stage_need_and_remedy():
    plan.refuse_too_small(planned(CIFAR, 24 * GB))
    with pytest.raises(DeviceTooSmall, match=r"needs \d+\.\d{3} GB .* 0\.300 GB .*--cpu") as fault:
        plan.refuse_too_small(planned(CIFAR, 3 * GB // 10))
    assert "\n" not in str(fault.value)


def test_an_estimate_alone_refuses_nothing_but_is_told():
    found = planned(Shape(2000, 224, 224, 10), 3 * GB, train__batch=256)  # 3.7 GB of activations
    assert not found.fits and not found.cannot_fit
    plan.refuse_too_small(found)
    assert plan.told(found, settings_of())[-1].startswith("may not fit")


def test_what_is_refused_for_its_pixels_is_told_about_pixels():
    found = plan.plan(Shape(500_000, 64, 64, 10), settings_of(), GB, streamed=False)
    with pytest.raises(DeviceTooSmall, match=r"most of it for pixels .*data.size"):
        plan.refuse_too_small(found)


def test_arrays_cannot_be_streamed_and_held_out_rows_are_resident_too():
    shape = dataclasses.replace(CIFAR, held_out=10_000)
    found = plan.plan(shape, settings_of(), GB // 10, streamed=False)
    assert found.held["pixels"] == 60_000 * 32 * 32 * 3
    assert plan.plan(shape, settings_of(), GB // 10).streamed


def test_a_device_without_room_for_a_row_of_dbscan_is_too_small():
    found = planned(CIFAR, 24 * GB)
    without = dataclasses.replace(found, clustering=None)
    assert not without.fits
    with pytest.raises(DeviceTooSmall):
        plan.refuse_too_small(without)


@dataclasses.dataclass
class Machine:
    """As much of a backend as the check of its memory asks for."""

    name: str
    room: int | None

    def free_bytes(self) -> int | None:
        return self.room

    def peak_bytes(self) -> int:
        return GB // 2


def checked(machine: Machine, log: Console) -> pipeline.MemoryCheck:
    rows = np.arange(30) % 3
    there = Corpus(rows, ("a", "b", "c"), rows, ("",) * 30, read_at=(64, 64))
    check = pipeline.MemoryCheck(settings_of(), machine, log)
    check(Split(there, there), (64, 64), False)
    return check


def test_a_run_is_planned_and_refused_before_its_pixels_are_read(tmp_path):
    for room, refused in ((GB, False), (1_000_000, True)):
        with Console(tmp_path / f"{room}.jsonl") as log:
            try:
                checked(Machine("gpu", room), log)
                assert not refused
            except DeviceTooSmall:
                assert refused
        assert '"event": "plan"' in (tmp_path / f"{room}.jsonl").read_text()


def test_a_run_on_the_processor_is_planned_and_never_refused(tmp_path):
    with Console(tmp_path / "log.jsonl") as log:
        found = checked(Machine("cpu", 1), log).measured()
        assert found["largest_stage"] == "verify"
        assert found["planned_bytes"] > found["peak_bytes"] == GB // 2
        assert "GB of 0.500 GB" in (tmp_path / "log.jsonl").read_text()  # what it has is its own
        assert checked(Machine("cpu", None), log).measured() == {"peak_bytes": GB // 2}


def test_the_plan_of_a_processor_counts_neighbours_and_no_workspace_of_cuml():
    found = plan.plan(CIFAR, settings_of(), 24 * GB, machine="cpu", libraries=GB)
    assert found.fits and found.clustering is None and found.held["libraries"] == GB
    assert "DBSCAN, at least" not in found.stages["cluster"]
    assert found.stages["cluster"]["lists of neighbours"] == 17 * 50_000 * 8 * 100
    assert found.stages["train"]["activations"] == pytest.approx(
        2 * planned(CIFAR, 24 * GB).stages["train"]["activations"], rel=0.01
    )  # float32 there


def test_what_is_clustered_is_a_sample_where_all_pairs_are_out_of_reach():
    whole = plan.plan(IMAGENET, settings_of(segregate__mode="all"), 24 * GB, machine="cpu")
    some = plan.plan(IMAGENET, settings_of(), 24 * GB, machine="cpu")
    lists = [p.stages["cluster"]["lists of neighbours"] for p in (whole, some)]
    assert lists[1] == 17 * 50_000 * 8 * 10 < lists[0] / 600
    assert "a sample of 50000 rows" in "\n".join(plan.told(some, settings_of()))
    assert planned(IMAGENET, 24 * GB).clustering.n == 50_000


def test_features_take_half_in_float16_and_nothing_on_disk():
    for changes, size in (({}, 4), ({"precision": "float16"}, 2), ({"spill": "/x"}, 0)):
        named = {f"features__{name}": value for name, value in changes.items()}
        stages = planned(CIFAR, 24 * GB, **named).stages
        for stage in ("features", "cluster", "verify", "conceal"):
            assert stages[stage]["features"] == size * 50_000 * 512


def test_the_plan_of_clustering_is_what_numpy_allocates():
    """Lists of neighbours and the like aside: what tracemalloc sees of NumPy."""
    n, d, classes = 20_000, 64, 10
    settings = settings_of(segregate__rule="persistence", segregate__k_rows=1000)
    settings = override(settings, {"segregate.scales": (0.05,), "segregate.coarsest": 0.05})
    rng = np.random.default_rng(0)
    points, labels = rng.random((n, d), np.float32), rng.integers(0, classes, n)
    parts = plan.clustering_parts(n, d, classes, settings, "cpu")
    tracemalloc.start()
    try:
        segregate.observe(points, labels, 1.0, settings.segregate, NoPairs(1, Gpu()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    arrays = sum(parts[name] for name in ("order of its own", "embedded rows", "blocks"))
    assert 0.7 * arrays < peak < 1.3 * arrays


class NoPairs(CpuBackend):
    """A processor on which nothing is near to anything."""

    def dbscan(self, points, *, eps, min_samples):
        return np.full(len(points), -1, np.int32)

    def neighbors(self, points, k, queries):
        return np.ones(len(queries))


# ------------------------------------------------------------------------------- the command line


def told(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["plan", *arguments])
    return result.exit_code, result.output


def test_plan_prints_every_stage_and_a_verdict():
    code, text = told("--gpu-memory", "24GB", "--rows", "50000", "--side", "32", "--classes", "10")
    assert code == 0
    for stage in ("always", "train", "verify", "features", "cluster", "conceal", "DBSCAN gets"):
        assert f"\n{stage}" in text
    assert text.splitlines()[-1].startswith("fits: ")


def test_plan_reads_a_corpus_and_settings():
    code, text = told("digits", "--gpu-memory", "1 GiB", "--set", "train.model=resnet8")
    assert code == 0
    assert text.startswith("1438 rows of 10 classes at 8x8, resnet8")
    assert "of 1.074 GB" in text


@pytest.mark.parametrize("size", ["lots", "-3GB", "0GB", "12PB", "1e9", ".GB"])
def test_a_size_that_is_none_is_refused(size: str):
    code, text = told("--gpu-memory", size, "--rows", "5")
    assert code == 2
    assert "is no size" in text


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * GB), ("1.5 GiB", 3 * 2**29), ("512m", 512 * 10**6), ("7", 7)]
)
def test_sizes_are_read_in_powers_of_1000_or_1024(text: str, size: int):
    from csc_gpu.cli import in_bytes

    assert in_bytes(None, None, text) == size  # type: ignore[arg-type]


def test_plan_wants_a_source_or_rows():
    for arguments in ((), ("digits", "--rows", "5")):
        code, text = told("--gpu-memory", "1GB", *arguments)
        assert code == 2
        assert "give a SOURCE, or --rows" in text


def test_plan_is_for_a_gpu_or_for_this_processor():
    code, text = told("digits", "--cpu")
    assert code == 0
    assert text.startswith("1438 rows of 10 classes at 8x8, resnet8")
    assert "takes most" in text.splitlines()[-1] and "DBSCAN gets" not in text
    for arguments in ((), ("--cpu", "--gpu-memory", "1GB")):
        assert told("digits", *arguments)[0] == 2
