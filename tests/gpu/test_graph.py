"""Concealment replayed from a CUDA graph is concealment run step by step; streams wait."""

from __future__ import annotations

import pytest
import torch

from csc_gpu.conceal import Settings, fine_tune
from tests.test_captured import a_step, batches
from tests.test_conceal import head_world, new_head

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

LONG = 200_000_000
"""Clock ticks for which a stream is kept busy: about a tenth of a second."""


@pytest.mark.parametrize("calls", [1, 2, 3, 10])
def test_so_many_calls_move_the_weights_as_so_many_steps(gpu, calls):
    eager, recorded = new_head().to(gpu.device), new_head().to(gpu.device)
    step, captured = a_step(eager), gpu.captured(a_step(recorded))
    assert captured is not step
    for points, labels in batches(calls):
        given = points.to(gpu.device), labels.to(gpu.device)
        one, two = step(*given), captured(*given)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(recorded.weight, eager.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("replay", [1, 5, 0])
def test_concealment_recorded_is_concealment_run_step_by_step(open_gpu, replay):
    points, labels = head_world(220)
    heads = {}
    for graph in (True, False):
        gpu = open_gpu(graph=graph)
        heads[graph] = new_head().to(gpu.device)
        plan = Settings(epochs=4, batch=32, replay=replay)
        fine_tune(heads[graph], points.to(gpu.device), labels, plan, gpu, seed=0)
    start = new_head().to(points.device)
    assert not torch.equal(heads[True].weight.cpu(), start.weight)
    torch.testing.assert_close(heads[True].weight, heads[False].weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heads[True].bias, heads[False].bias, rtol=1e-5, atol=1e-6)


def test_another_shape_is_refused(gpu):
    head = new_head().to(gpu.device)
    captured = gpu.captured(a_step(head))
    for points, labels in batches(3):
        captured(points.to(gpu.device), labels.to(gpu.device))
    with pytest.raises(ValueError, match=r"recorded with \(6, 4\)"):
        captured(torch.zeros(1, 4, device=gpu.device), labels.to(gpu.device))


def test_torch_and_cupy_speak_of_the_same_memory(gpu):
    tensor = torch.arange(10.0, device=gpu.device)
    array = gpu.array(tensor)
    assert array.data.ptr == tensor.data_ptr()
    assert gpu.tensor(array).data_ptr() == tensor.data_ptr()
    array += 1
    assert tensor.tolist() == list(range(1, 11))


def test_cupy_waits_for_the_stream_on_which_torch_still_works(gpu):
    tensor = torch.zeros(1_000_000, device=gpu.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        tensor.fill_(7)
        array = gpu.array(tensor)
    assert bool((array == 7).all())


def test_torch_waits_for_the_stream_on_which_cupy_still_works(gpu):
    array = gpu.xp.zeros(1_000_000, gpu.xp.float32)
    torch.cuda.synchronize()
    stream = gpu.xp.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(LONG)
    with stream:
        array.fill(7)
        tensor = gpu.tensor(array)
    assert bool((tensor == 7).all())
