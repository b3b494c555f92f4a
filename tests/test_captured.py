"""A recorded step is a step: the same updates, call by call, as the step run as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from csc_gpu.backend.captured import EAGER_CALLS, Captured
from csc_gpu.backend.gpu import GpuBackend
from csc_gpu.conceal import Settings, fine_tune
from tests.fake_gpu import FakeDriver, FakeGraphs, fake_gpu
from tests.test_conceal import head_world, new_head


def a_step(head: nn.Linear):
    """Momentum and an update in place: a step that a single extra call would change."""
    rate = torch.tensor(0.1, device=head.weight.device)
    optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, fused=True)

    def step(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(head(points), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def batches(count: int, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    points, labels = head_world(count * size)
    return list(zip(points.split(size), torch.from_numpy(labels).split(size), strict=True))


@pytest.mark.parametrize("calls", [1, 2, 3, 10])
def test_so_many_calls_move_the_weights_as_so_many_steps(calls):
    eager, recorded, graphs = new_head(), new_head(), FakeGraphs()
    step, captured = a_step(eager), Captured(a_step(recorded), graphs)
    for points, labels in batches(calls):
        one, two = step(points, labels), captured(points, labels)
        assert torch.equal(one, two)
        assert torch.equal(eager.weight, recorded.weight)
        assert torch.equal(eager.bias, recorded.bias)
    assert graphs.recordings == (1 if calls > EAGER_CALLS else 0)
    assert graphs.replays == max(0, calls - EAGER_CALLS)


def test_calls_before_the_recording_are_steps_too():
    head = new_head()
    before = head.weight.clone()
    captured = Captured(a_step(head), FakeGraphs())
    (points, labels), *_ = batches(1)
    captured(points, labels)
    assert not torch.equal(head.weight, before)


def test_the_caller_keeps_its_tensors():
    captured = Captured(a_step(new_head()), FakeGraphs())
    given = batches(4)
    before = [(points.clone(), labels.clone()) for points, labels in given]
    for points, labels in given:
        captured(points, labels)
    for one, two in zip(given, before, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_the_next_call_overwrites_what_the_last_one_returned():
    captured = Captured(a_step(new_head()), FakeGraphs())
    results, copies = [], []
    for points, labels in batches(4):
        results.append(captured(points, labels))
        copies.append(results[-1].clone())
    assert results[1] is results[2] is results[3]
    assert torch.equal(results[1], copies[3])
    assert not torch.equal(copies[1], copies[3])


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize(
    ("points", "labels", "said"),
    [
        ((5, 4), (6,), r"\(6, 4\) torch.float32, called with \(5, 4\) torch.float32"),
        ((1, 4), (6,), r"\(6, 4\) torch.float32, called with \(1, 4\) torch.float32"),
        ((6, 4), (1,), r"\(6,\) torch.int64, called with \(1,\) torch.int64"),
    ],
)
def test_another_shape_is_refused_and_both_are_named(calls, points, labels, said):
    captured = Captured(a_step(new_head()), FakeGraphs())
    for good in batches(calls):
        captured(*good)
    with pytest.raises(ValueError, match=f"recorded with {said}"):
        captured(torch.zeros(points), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize("calls", [1, 3])
def test_another_dtype_is_refused_and_both_are_named(calls):
    captured = Captured(a_step(new_head()), FakeGraphs())
    for good in batches(calls):
        captured(*good)
    points, labels = batches(1)[0]
    with pytest.raises(ValueError, match=r"torch.float32, called with .* torch.float64"):
        captured(points.double(), labels)
    with pytest.raises(ValueError, match=r"torch.int64, called with .* torch.int32"):
        captured(points, labels.int())


# ----------------------------------------------------------------------------- the fake's honesty


def test_recording_changes_nothing():
    head = new_head()
    step = a_step(head)
    points, labels = batches(1)[0]
    step(points, labels)
    before = head.weight.clone()
    result, replay = FakeGraphs().record(lambda: step(points, labels))
    assert torch.equal(head.weight, before)
    assert result.isnan()  # nothing was computed
    replay()
    assert not torch.equal(head.weight, before)
    assert not result.isnan()


def test_a_number_of_python_freezes_into_a_recording():
    """Why the learning rate of concealment is a tensor."""
    rate = 1.0
    result, replay = FakeGraphs().record(lambda: torch.ones(2) * rate)
    rate = 2.0
    replay()
    assert result.tolist() == [1, 1]


def test_reading_a_value_while_recording_is_a_fault_as_on_a_gpu():
    with pytest.raises(RuntimeError, match="stream is capturing"):
        FakeGraphs().record(lambda: torch.ones(1) * float(torch.ones(1).sum()))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.tensor([1, 2])),
    ],
)
def test_a_result_of_unknown_size_is_a_fault_as_on_a_gpu(work):
    with pytest.raises(RuntimeError, match="stream is capturing"):
        FakeGraphs().record(lambda: work(torch.ones(2)))


# ----------------------------------------------------------------------------- concealment


@pytest.mark.parametrize("replay", [1, 2, 5, 7, 100, 0])
def test_concealment_recorded_is_concealment_run_step_by_step(replay):
    points, labels = head_world(22)  # 6 steps an epoch, 24 in all
    told: dict[bool, list[float]] = {True: [], False: []}
    heads, driver = {}, FakeDriver()
    for graph in (True, False):
        heads[graph] = new_head()
        log = lambda event, *, loss, graph=graph, **_: told[graph].append(loss)  # noqa: E731
        backend: GpuBackend = fake_gpu(driver, graph=graph)
        plan = Settings(epochs=4, batch=4, replay=replay)
        fine_tune(heads[graph], points, labels, plan, backend, seed=0, log=log)
    assert not torch.equal(heads[True].weight, new_head().weight)
    assert torch.equal(heads[True].weight, heads[False].weight)
    assert torch.equal(heads[True].bias, heads[False].bias)
    assert told[True] == told[False]
    whole = 24 // min(replay or 6, 24)  # calls of one shape
    assert driver.replays == max(0, whole - EAGER_CALLS)
