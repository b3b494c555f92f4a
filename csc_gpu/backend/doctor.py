"""What this machine is, what it lacks, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from csc_gpu.backend import usable_cores

LEAST_CAPABILITY = (7, 5)
"""Of a GPU, for RAPIDS 26.10."""
PACKAGES = {
    "13": {"cuml": "cuml-cu13", "cupy": "cupy-cuda13x", "nvidia.dali": "nvidia-dali-cuda130"},
    "12": {"cuml": "cuml-cu12", "cupy": "cupy-cuda12x", "nvidia.dali": "nvidia-dali-cuda120"},
}
"""What to install, by torch's CUDA version and the module's name."""
DASK = ("distributed", "dask_cuda", "raft_dask", "cudf")
"""Modules that clustering over several GPUs takes besides cuML."""
DRIVER = {"13": "R580", "12": "R525"}
"""The oldest NVIDIA driver for each CUDA version."""


@dataclass(frozen=True)
class Lack:
    """One thing that is missing."""

    what: str
    remedy: str


def missing_for_gpu() -> list[Lack]:
    """What the GPU backend lacks here, the most fundamental first; empty if nothing."""
    if torch.version.cuda is None:
        return [
            Lack(
                f"torch {torch.__version__} was built without CUDA",
                "pip install --upgrade torch torchvision (builds with CUDA)",
            ),
            *_absent("13"),
        ]
    cuda = torch.version.cuda.split(".")[0]
    lacks = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        why = f" ({str(told[0].message).splitlines()[0]})" if told else ""
        driver = DRIVER.get(cuda, DRIVER["13"])
        lacks.append(
            Lack(
                f"no NVIDIA GPU can be used here{why}",
                f"install a GPU with driver {driver} or later, for torch's CUDA {cuda}",
            )
        )
    elif (found := torch.cuda.get_device_capability(0)) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        lacks.append(
            Lack(
                f"{torch.cuda.get_device_name(0)} has compute capability {found[0]}.{found[1]}",
                f"use a GPU of capability {least} or more, which RAPIDS needs",
            )
        )
    return lacks + _absent(cuda)


def missing_for_dask() -> list[Lack]:
    """What clustering over several GPUs lacks besides; empty if nothing."""
    cuda = (torch.version.cuda or "13").split(".")[0]
    cuml = PACKAGES.get(cuda, PACKAGES["13"])["cuml"]
    return _lacking(DASK, f"pip install '{cuml}[dask]' dask-cuda")


def _absent(cuda: str) -> list[Lack]:
    """The packages that are not installed, as one lack."""
    wanted = PACKAGES.get(cuda, PACKAGES["13"])
    absent = [module for module in ("cuml", "cupy") if not _is_there(module)]
    return _lacking(absent, f"pip install {' '.join(wanted[module] for module in absent)}")


def _lacking(modules: Sequence[str], command: str) -> list[Lack]:
    """Those of the modules that are not installed, as one lack with its command."""
    absent = [module for module in modules if not _is_there(module)]
    are = "are" if len(absent) > 1 else "is"
    return [Lack(f"{' and '.join(absent)} {are} not installed", command)] if absent else []


def _is_there(module: str) -> bool:
    """Whether a module is installed, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def advice() -> dict[str, str]:
    """For each backend and for DALI: ready, or what is missing and the command that adds it."""
    lacks = missing_for_gpu()
    cuda = (torch.version.cuda or "13").split(".")[0]
    dali = PACKAGES.get(cuda, PACKAGES["13"])["nvidia.dali"]
    told = {
        "backend cpu": "ready",
        "backend gpu": "; ".join(f"{lack.what}: {lack.remedy}" for lack in lacks) or "ready",
        "several gpus": "; ".join(f"{lack.what}: {lack.remedy}" for lack in missing_for_dask())
        or "ready to cluster with --cluster dask",
        "image decoder": "DALI",
    }
    if not _is_there("nvidia.dali"):
        told["image decoder"] = f"Pillow, on the processor; for DALI (Linux): pip install {dali}"
    return told


def describe() -> dict[str, str]:
    """Which machine this is and which versions are installed, for the summary and `doctor`."""
    gpu = torch.cuda.is_available()
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(usable_cores()),
        "gpu": torch.cuda.get_device_name(0) if gpu else "none",
    }
    if gpu:
        found["gpu memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB"
    for package in ("csc-gpu", "torch", "torchvision", "numpy", "scikit-learn", *_OPTIONAL):
        found[package] = version(package) or "not installed"
    found["torch cuda"] = torch.version.cuda or "none"
    for module, package in (("nvidia.dali", "nvidia-dali"), ("cupy", "cupy"), ("cuml", "cuml")):
        names = [*(of_cuda[module] for of_cuda in PACKAGES.values()), module]
        found[package] = next((v for v in map(version, names) if v), "not installed")
    found["cudf"] = _cudf()
    return found


def _cudf() -> str:
    """cuML imports cuDF; where a stand-in took its place, results must say so."""
    names = ("cudf-cu13", "cudf-cu12", "cudf")
    known = next((v for v in map(version, names) if v), None)
    return known or ("a stand-in" if _is_there("cudf") else "not installed")


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


_OPTIONAL = ("pillow", "safetensors")


def version(package: str) -> str | None:
    """The installed version of a package, by its registry name; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
