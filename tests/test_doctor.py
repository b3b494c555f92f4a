"""What the doctor says of machines that lack something; every machine here is made up."""

from __future__ import annotations

import warnings

import pytest
import torch

from csc_gpu.backend import doctor, open_backend
from csc_gpu.errors import BackendUnavailable


@pytest.fixture
def machine(monkeypatch):
    """Sets up a machine: torch's CUDA version, its GPU, and the packages that are installed."""

    def set_up(cuda="13.0", capability=(9, 0), packages=("cuml", "cupy"), warned=""):
        def is_available():
            if warned:
                warnings.warn(warned, stacklevel=1)
            return capability is not None

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        monkeypatch.setattr(doctor, "_is_there", packages.__contains__)

    return set_up


def said() -> list[tuple[str, str]]:
    return [(lack.what, lack.remedy) for lack in doctor.missing_for_gpu()]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("cuda", ["12.9", "13.0", "13.2"])
def test_a_machine_that_has_everything_lacks_nothing(machine, capability, cuda):
    machine(cuda=cuda, capability=capability)
    assert said() == []
    assert doctor.advice()["backend gpu"] == "ready"


def test_torch_built_without_cuda_is_what_is_told_first(machine):
    machine(cuda=None, capability=None, packages=())
    (first, remedy), (second, packages) = said()
    assert first == f"torch {torch.__version__} was built without CUDA"
    assert remedy.startswith("pip install --upgrade torch torchvision")
    assert second == "cuml and cupy are not installed"
    assert packages == "pip install cuml-cu13 cupy-cuda13x"


@pytest.mark.parametrize(("cuda", "driver"), [("13.2", "R580"), ("12.9", "R525")])
def test_no_gpu_is_told_with_the_driver_it_takes(machine, cuda, driver):
    machine(cuda=cuda, capability=None)
    ((what, remedy),) = said()
    assert what == "no NVIDIA GPU can be used here"
    assert driver in remedy and f"CUDA {cuda[:2]}" in remedy


def test_what_torch_says_of_a_gpu_it_cannot_use_is_passed_on_in_one_line(machine):
    machine(capability=None, warned="The NVIDIA driver on your system is too old.\nUpdate it.")
    ((what, _),) = said()
    assert what == ("no NVIDIA GPU can be used here (The NVIDIA driver on your system is too old.)")


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (5, 2)])
def test_a_gpu_that_is_too_old_is_named(machine, capability):
    machine(capability=capability)
    ((what, remedy),) = said()
    assert what == f"Tesla V100 has compute capability {capability[0]}.{capability[1]}"
    assert remedy == "use a GPU of capability 7.5 or more, which RAPIDS needs"


@pytest.mark.parametrize(
    ("cuda", "packages", "what", "remedy"),
    [
        ("13.0", (), "cuml and cupy are not installed", "cuml-cu13 cupy-cuda13x"),
        ("12.9", (), "cuml and cupy are not installed", "cuml-cu12 cupy-cuda12x"),
        ("13.0", ("cupy",), "cuml is not installed", "cuml-cu13"),
        ("12.9", ("cuml",), "cupy is not installed", "cupy-cuda12x"),
        ("14.0", ("cuml",), "cupy is not installed", "cupy-cuda13x"),  # the newest we know
    ],
)
def test_packages_are_named_as_torchs_cuda_wants_them(machine, cuda, packages, what, remedy):
    machine(cuda=cuda, packages=packages)
    assert said() == [(what, f"pip install {remedy}")]


def test_advice_puts_what_and_remedy_side_by_side(machine):
    machine(capability=None, packages=("cuml",))
    told = doctor.advice()
    assert told["backend cpu"] == "ready"
    assert told["backend gpu"] == (
        "no NVIDIA GPU can be used here: install a GPU with driver R580 or later, for torch's "
        "CUDA 13; cupy is not installed: pip install cupy-cuda13x"
    )


@pytest.mark.parametrize(
    ("cuda", "package"),
    [("13.0", "nvidia-dali-cuda130"), ("12.9", "nvidia-dali-cuda120"), (None, "cuda130")],
)
def test_without_dali_the_decoder_is_pillow_and_the_package_is_named(machine, cuda, package):
    machine(cuda=cuda)
    assert doctor.advice()["image decoder"].startswith("Pillow")
    assert doctor.advice()["image decoder"].endswith(package)
    machine(cuda=cuda, packages=("cuml", "cupy", "nvidia.dali"))
    assert doctor.advice()["image decoder"] == "DALI"


@pytest.mark.parametrize(
    ("lacking", "part"),
    [
        ({"cuda": None, "capability": None}, "was built without CUDA"),
        ({"capability": None}, "no NVIDIA GPU"),
        ({"capability": (7, 0)}, "capability 7.0"),
        ({"packages": ()}, "pip install cuml-cu13 cupy-cuda13x"),
        ({"capability": None, "packages": ("cuml",)}, "pip install cupy-cuda13x"),
    ],
)
def test_the_gpu_is_refused_with_the_reason_and_never_replaced(machine, lacking, part):
    machine(**lacking)
    with pytest.raises(BackendUnavailable) as told:
        open_backend("gpu")
    assert part in str(told.value)
    assert str(told.value).endswith("or pass --cpu")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("module", "there"),
    [("numpy", True), ("sklearn.cluster", True), ("no_such_thing", False), ("no_such.part", False)],
)
def test_a_module_is_looked_for_without_a_fault(module, there):
    assert doctor._is_there(module) is there


def test_the_description_names_every_version_a_result_depends_on():
    found = doctor.describe()
    assert found["torch"] == doctor.version("torch")
    assert {"python", "cores", "gpu", "numpy", "scikit-learn", "cupy", "cuml", "cudf"} <= set(found)
    assert doctor.version("no-such-package") is None
    assert all(isinstance(value, str) for value in found.values())
