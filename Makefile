PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# TORCH_INDEX=<url> adds a package index, for a CPU or a CUDA build of torch that the default index does not have.
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)

.PHONY: help demo test test-all lint bench wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_INDEX) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_INDEX) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## train two models, serve both, check their answers over HTTP
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)  ## what CI runs: one sample of every promise
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(STAMP)  ## everything, the sweeps and matrices included
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff, mypy, import-linter
	$(BIN)/ruff check platform jobs serving tests benchmarks
	$(BIN)/ruff format --check platform jobs serving tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## measure beside the peers, one benchmark after another; prints tables (docs/benchmarks.md)
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/layouts_speed.py
	$(BIN)/python benchmarks/layouts_memory.py
	$(BIN)/python benchmarks/pipeline_bubble.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/serving.py

wheel: $(STAMP)  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove what the build made (not the store)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
