# Two commands on a fresh machine with Python 3.11 to 3.13 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# A lent GPU machine has a Python of its own, and reaches no registry for ours.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: setup demo test lint gpu-check clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "csc-gpu needs Python 3.11 to 3.13; set PYTHON=... for make"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $(READY)

# The main job on the embedded data set, with the ordinary commands: make prints them.
demo: $(READY)
	$(BIN)/csc-gpu poison digits demo/poisoned --attack badnets --rate 0.1 --target 0 --seed 0 --force
	$(BIN)/csc-gpu train demo/poisoned --out demo/run --cpu --seed 0 --force
	$(BIN)/csc-gpu score demo/run --key demo/poisoned/key.npz

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Eight minutes; CSC_GPU_CORPUS=FOLDER adds the loaders. Nothing is installed.
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache
