"""Imports point down only, and each foreign library stays in its room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "csc_gpu"

LAYERS = (
    {"errors", "files", "cache", "tolerance", "harmless", "memory"},
    {"types"},
    {"config"},
    {"checkpoint"},
    {"data"},
    {"backend"},
    {"models", "borrowed", "train", "features"},
    {"components", "segregate", "conceal", "trigger", "recover"},
    {"witness"},
    {"csc", "attacks", "defenses", "sources"},
    {"watcher"},
    {"answers", "evaluate", "foreign", "pack", "plan"},
    {"run", "board", "progress"},
    {"guarded", "datasets", "api"},
    {"export"},
    {"report", "clean", "review"},
    {"corpora", "pipeline", "scoring", "serving", "bench"},
    {"matrix"},
    {"comparison"},
    {"cli", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

ROOMS = {
    "cupy": {"backend/gpu.py"},
    "cuml": {"backend/gpu.py"},
    "rmm": {"backend/gpu.py"},
    "dask": {"backend/gpu.py"},
    "nvidia.dali": {"backend/loader.py"},
    "sklearn.cluster": {"backend/cpu.py"},
    "sklearn.neighbors": {"backend/cpu.py"},
    "opacus": {"defenses/dp_sgd.py"},
    "click": {"cli.py"},
    "tqdm": {"progress.py"},
    "onnx": {"export.py"},
    "onnxruntime": {"export.py"},
    "timm": {"borrowed.py"},
}

TORCH_FILES = "foreign/torch_files.py"
"""The only file that may read pickles."""

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(file: str) -> set[str]:
    """Every module a file imports, anywhere in it; `from csc_gpu import x` counts as csc_gpu.x."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", [file for file in FILES if room(file) != "__init__"])
def test_a_module_has_a_layer_and_imports_none_above_it(file):
    assert room(file) in LEVEL, f"{file} has no layer: give it one in this test"
    above = {
        module
        for module in imported(file)
        if module.startswith("csc_gpu.") and LEVEL[module.split(".")[1]] > LEVEL[room(file)]
    }
    assert not above, f"{file} imports upwards: {sorted(above)}"


@pytest.mark.parametrize("file", FILES)
def test_a_foreign_library_stays_in_its_room(file):
    for library, rooms in ROOMS.items():
        used = {m for m in imported(file) if m == library or m.startswith(library + ".")}
        assert not used or file in rooms, f"{file} must not import {sorted(used)}"


@pytest.mark.parametrize("file", FILES)
def test_nothing_imports_tests_or_benchmarks_or_loads_pickles(file):
    text = (PACKAGE / file).read_text(encoding="utf-8")
    assert not {m for m in imported(file) if m.split(".")[0] in ("tests", "benchmarks")}
    assert "allow_pickle=True" not in text
    if file != TORCH_FILES:
        assert not {m for m in imported(file) if m.split(".")[0] == "pickle"}
        assert "torch.load" not in text


def test_files_of_torch_are_loaded_as_weights_alone():
    tree = ast.parse((PACKAGE / TORCH_FILES).read_text(encoding="utf-8"))
    loads = [
        {word.arg: ast.unparse(word.value) for word in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [words["weights_only"] for words in loads] == ["True"]
    pickles = {m for m in imported(TORCH_FILES) if m.split(".")[0] == "pickle"}
    assert pickles == {"pickle", "pickle.UnpicklingError"}  # its name alone, to catch it


@pytest.mark.parametrize("file", [f for f in FILES if room(f) not in ("cli", "progress")])
def test_the_library_does_not_print(file):
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")]
    assert "print" not in calls


@pytest.mark.parametrize(
    "file", [f for f in FILES if LEVEL.get(room(f), 0) <= LEVEL["csc"] and room(f) != "attacks"]
)
def test_no_stage_and_no_defense_knows_the_answer_key(file):
    if room(file) == "types":
        return assert_declares_key(file)
    text = (PACKAGE / file).read_text(encoding="utf-8")
    assert "AnswerKey" not in text
    assert not re.search(r"\bis_poison\b", text) and "key.npz" not in text


def assert_declares_key(file: str) -> None:
    assert "class AnswerKey" in (PACKAGE / file).read_text(encoding="utf-8")


def test_the_layer_check_sees_an_upward_import(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("from csc_gpu import cli\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    with pytest.raises(AssertionError, match="imports upwards"):
        test_a_module_has_a_layer_and_imports_none_above_it("train.py")
