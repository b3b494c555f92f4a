"""Opens the GPU for a test, or skips it and says what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from csc_gpu.backend import Settings, doctor, open_backend
from csc_gpu.backend.gpu import GpuBackend


@pytest.fixture
def open_gpu() -> Iterator[Callable[..., GpuBackend]]:
    """Opens the GPU with settings.gpu as given; TensorFloat-32 and bfloat16 are off."""
    lacks = doctor.missing_for_gpu()
    if lacks:
        pytest.skip("; ".join(f"{lack.what} ({lack.remedy})" for lack in lacks))

    def open_it(**settings: object) -> GpuBackend:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing cuML warns of what is not ours
            plain = {"tf32": False, "bf16": False}
            backend = open_backend("gpu", settings=Settings(**(plain | settings)))
        torch.backends.cudnn.benchmark = False
        torch.cuda.reset_peak_memory_stats()
        return backend

    yield open_it
    torch.cuda.synchronize()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True  # as torch has it


@pytest.fixture
def gpu(open_gpu: Callable[..., GpuBackend]) -> GpuBackend:
    """The GPU, with all its memory."""
    return open_gpu()
