"""Every name and argument that goes to CuPy, cuML and RMM exists there.

Held against a record of cuML 26.10 everywhere, and against the libraries where they are installed,
for which no GPU is needed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import inspect
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from csc_gpu.backend import gpu
from csc_gpu.backend.workspace import Workspace
from tests import fake_gpu

PACKAGE = Path(gpu.__file__).parent.parent
POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
RECORDED = {
    "DBSCAN.__init__": (
        "self * eps min_samples metric algorithm verbose max_mbytes_per_batch output_type "
        "calc_core_sample_indices"
    ),
    "DBSCAN.fit_predict": "self X y sample_weight * out_dtype",
    "KMeans.__init__": (
        "self * n_clusters max_iter tol verbose random_state init n_init oversampling_factor "
        "max_samples_per_batch device_buffer_samples init_size output_type"
    ),
    "KMeans.fit_predict": "self X y sample_weight",
    "NearestNeighbors.__init__": (
        "self * n_neighbors radius algorithm metric p algo_params metric_params n_jobs verbose "
        "output_type"
    ),
    "NearestNeighbors.fit": "self X y",
    "NearestNeighbors.kneighbors": "self X n_neighbors return_distance * two_pass_precision",
}
"""Parameters in cuML 26.10; after * by name alone. Those with a default are not told apart."""


def parameters(name: str) -> inspect.Signature:
    """The recorded signature; everything but self may be left out."""
    before, _, after = RECORDED[name].partition("*")
    names = [(word, POSITIONAL) for word in before.split()]
    names += [(word, KEYWORD) for word in after.split()]
    return inspect.Signature(
        inspect.Parameter(word, kind, default=inspect.Parameter.empty if word == "self" else None)
        for word, kind in names
    )


def our_calls() -> list[tuple[str, tuple[object, ...], dict[str, object]]]:
    """What gpu.Cuda calls in cuML: the name, and its arguments."""
    model, fit = gpu.dbscan_arguments(0.5, 5, Workspace(100, 1, "int64"))
    search, ask = gpu.nearest_arguments(5)
    return [
        ("DBSCAN.__init__", (), model),
        ("DBSCAN.fit_predict", ("points",), fit),
        ("KMeans.__init__", (), gpu.kmeans_arguments(2, 0, 10)),
        ("KMeans.fit_predict", ("points",), {}),
        ("NearestNeighbors.__init__", (), search),
        ("NearestNeighbors.fit", ("points",), {}),
        ("NearestNeighbors.kneighbors", ("queries",), ask),
    ]


@pytest.mark.parametrize(("name", "given", "named"), our_calls())
def test_our_arguments_are_among_those_recorded(name, given, named):
    assert named.items() <= parameters(name).bind("self", *given, **named).arguments.items()


def test_what_matters_for_memory_and_exactness_is_asked_for():
    model, fit = gpu.dbscan_arguments(0.25, 7, Workspace(100, 3, "int64"))
    assert (model["eps"], model["min_samples"], model["max_mbytes_per_batch"]) == (0.25, 7, 3)
    assert model["metric"] == "euclidean"  # cosine changes the caller's rows in place
    assert model["algorithm"] == "brute"
    assert model["calc_core_sample_indices"] is False  # else a copy of the core rows
    assert model["output_type"] == "cupy"
    assert fit == {"out_dtype": "int64"}
    search, ask = gpu.nearest_arguments(9)
    assert (search["n_neighbors"], search["algorithm"]) == (9, "brute")
    assert search["output_type"] == "cupy"
    assert ask == {"return_distance": False}  # its distances are blurred, its second pass is wrong


# ------------------------------------------------------------------------- names of CuPy


def trees() -> list[ast.Module]:
    return [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))]


def is_xp(node: ast.expr) -> bool:
    """Whether an expression is xp, or something's xp."""
    return (isinstance(node, ast.Name) and node.id == "xp") or (
        isinstance(node, ast.Attribute) and node.attr == "xp"
    )


def dotted(node: ast.expr) -> str | None:
    """The name behind xp: linalg.norm; None if the expression does not begin with xp."""
    if not isinstance(node, ast.Attribute):
        return None
    if is_xp(node.value):
        return node.attr
    before = dotted(node.value)
    return before and f"{before}.{node.attr}"


def used_names() -> set[str]:
    """Every xp.name in the package, and xp.linalg.name."""
    found = {dotted(node) for tree in trees() for node in ast.walk(tree)}
    return {name for name in found if name}


def used_keywords() -> set[tuple[str, str]]:
    """Every (name, keyword) of a call xp.name(..., keyword=...)."""
    calls = [n for tree in trees() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return {
        (name, keyword.arg)
        for call in calls
        if (name := dotted(call.func))
        for keyword in call.keywords
        if keyword.arg
    }


DRIVERS_OWN = {"cuda", "cuda.is_available", "cuda.Device"}
"""Used by gpu.Cuda, which the fake replaces."""


def has(module: object, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def test_names_are_found_in_the_source():
    assert {"bincount", "linalg.eigh", "from_dlpack", "asnumpy", "uint64"} <= used_names()
    assert ("argsort", "kind") in used_keywords()


def test_the_fake_has_every_name_in_use():
    xp = fake_gpu.FakeDriver().xp
    assert [name for name in sorted(used_names() - DRIVERS_OWN) if not has(xp, name)] == []


# ------------------------------------------------------------------------- the real libraries


def real(name: str) -> ModuleType:
    """A module of RAPIDS or CuPy; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing them warns of what is not ours
        return pytest.importorskip(name, reason=f"{name} is not installed")


def in_cuml(name: str) -> inspect.Signature:
    owner, _, method = name.partition(".")
    home = real("cuml.cluster") if owner in ("DBSCAN", "KMeans") else real("cuml.neighbors")
    return inspect.signature(getattr(getattr(home, owner), method))


@pytest.mark.parametrize(("name", "given", "named"), our_calls())
def test_our_arguments_are_taken_by_cuml(name, given, named):
    assert named.items() <= in_cuml(name).bind("self", *given, **named).arguments.items()


@pytest.mark.parametrize("name", list(RECORDED))
def test_the_record_is_what_cuml_has(name):
    there = in_cuml(name).parameters.values()
    by_position = [p.name for p in there if p.kind is POSITIONAL]
    by_name = [p.name for p in there if p.kind is KEYWORD]
    words = [*by_position, *(["*", *by_name] if by_name else [])]
    assert " ".join(words) == RECORDED[name]


@pytest.mark.parametrize("name", sorted(used_names()))
def test_cupy_has_the_name(name):
    assert has(real("cupy"), name)


@pytest.mark.parametrize(("name", "keyword"), sorted(used_keywords()))
def test_cupy_takes_the_keyword(name, keyword):
    cupy = found = real("cupy")
    for part in name.split("."):
        found = getattr(found, part)
    if isinstance(found, cupy.ufunc):
        assert keyword in ("out", "dtype", "casting")  # a ufunc has no signature to read
    else:
        assert keyword in inspect.signature(found).parameters


def test_the_fake_offers_nothing_that_cupy_lacks():
    cupy = real("cupy")
    names = fake_gpu.NAMES | fake_gpu.UPLOADS | {"asnumpy", "from_dlpack", "ndarray"}
    assert [name for name in sorted(names) if not hasattr(cupy, name)] == []
    there = {"get", "item", "tolist", "T", "shape", "dtype", "flags", "__dlpack__", "data"}
    operators = {name for name in vars(fake_gpu.DeviceArray) if name.startswith("__")}
    pythons_own = {"__getattr__", "__annotations__", "__dict__", "__weakref__"}
    methods = fake_gpu.METHODS | there | (operators - pythons_own)
    assert [name for name in sorted(methods) if not hasattr(cupy.ndarray, name)] == []


def in_rmm_stub(owner: str) -> list[str]:
    """Arguments of a memory resource; its compiled signature says nothing, its stub does."""
    stub = importlib.resources.files(real("rmm")) / "pylibrmm/memory_resource/_memory_resource.pyi"
    (found,) = (
        method.args
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == owner
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
    )
    return [argument.arg for argument in found.args]


def test_rmm_has_a_pool_that_counts_and_stops():
    mr = real("rmm").mr
    assert callable(mr.LimitingResourceAdaptor.get_allocated_bytes)
    assert callable(mr.set_current_device_resource)
    assert hasattr(mr.StatisticsResourceAdaptor, "allocation_counts")
    assert in_rmm_stub("LimitingResourceAdaptor")[1:] == ["upstream_mr", "allocation_limit"]
    assert "release_threshold" in in_rmm_stub("CudaAsyncMemoryResource")


def test_cupy_takes_its_memory_from_rmm():
    assert callable(real("cupy").cuda.set_allocator)
    real("rmm")
    assert callable(importlib.import_module("rmm.allocators.cupy").rmm_cupy_allocator)
