# `make` alone lists the targets. Each target first makes the environment that it needs.
# FLWR=1.41.0 or TORCH=2.6.0 runs any target with that version, in an environment of its own.
PYTHON ?= python3
FLWR ?=
TORCH ?=
VENV := .venv$(if $(FLWR),-flwr-$(FLWR))$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

# What the demo needs: Corymb with its own dependencies.
$(VENV)/runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed $(if $(FLWR),-e 's/^flwr==.*/flwr==$(FLWR)/' -e '/^uv==/d' -e '/^certifi==/d') \
		$(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^sympy==/d') -e '' constraints.txt > $(VENV)/constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

# What developers need on top: tests, checks, documentation.
$(VENV)/installed: $(VENV)/runtime
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps byzfl
	@touch $@

setup: $(VENV)/installed  ## create the environment with the versions in constraints.txt

demo: $(VENV)/runtime  ## run the default experiment and write runs/demo/report.html
	$(BIN)/corymb simulate

test: $(VENV)/installed  ## run all tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/installed  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

coverage: $(VENV)/installed  ## run all tests and report which lines ran
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

wheel: $(VENV)/installed  ## build the wheel and the source archive into dist/
	rm -rf dist
	$(BIN)/python -m build

nightly: $(VENV)/installed  ## run the slow tests, all tests with the oldest Flower, and two benchmarks
	$(BIN)/python -m pytest -m nightly
	$(MAKE) test FLWR=1.41.0
	$(BIN)/python benchmarks/streaming_memory.py
	$(BIN)/python benchmarks/grid_overhead.py

reliability: $(VENV)/installed  ## inject faults and hostile replies, and count what they cost
	$(BIN)/python benchmarks/reliability.py

.peers/installed:
	$(PYTHON) -m venv .peers/pfl
	.peers/pfl/bin/python -m pip install --quiet torch==2.13.0 'pfl[pytorch]==0.6.0'
	$(PYTHON) -m venv .peers/fedjax
	.peers/fedjax/bin/python -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 fedjax==0.0.17
	@touch $@

BENCHMARKS := simulators rules population aggregation codec deployment deployment_round
bench: $(VENV)/installed .peers/installed  ## race the peers, in environments of their own (.peers); fails where a bar is missed
	@missed=; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || missed="$$missed $$name"; done; \
	if [ -n "$$missed" ]; then echo "Missed bars in:$$missed" >&2; exit 1; fi

clean:  ## remove environments, caches, runs and built files
	rm -rf .venv .venv-* .peers runs site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage

.PHONY: help setup demo test check docs coverage wheel nightly reliability bench clean
