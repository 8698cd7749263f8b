# `make` alone lists the targets. Every target first makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps byzfl
	@touch $@

setup: .venv/installed  ## create .venv and install what constraints.txt pins

demo: .venv/installed  ## run the default experiment and write runs/demo/report.html
	$(BIN)/corymb simulate

test: .venv/installed  ## run all tests
	$(BIN)/python -m pytest

check: .venv/installed  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

nightly: .venv/installed  ## run the slow tests and the older benchmarks
	$(BIN)/python -m pytest -m nightly
	$(BIN)/python benchmarks/streaming_memory.py
	$(BIN)/python benchmarks/grid_overhead.py

.peers/installed:
	$(PYTHON) -m venv .peers/pfl
	.peers/pfl/bin/python -m pip install --quiet torch==2.13.0 'pfl[pytorch]==0.6.0'
	$(PYTHON) -m venv .peers/fedjax
	.peers/fedjax/bin/python -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 fedjax==0.0.17
	@touch $@

bench: .venv/installed .peers/installed  ## race the peers, in environments of their own (.peers), and measure the rest
	-$(BIN)/python benchmarks/simulators.py
	-$(BIN)/python benchmarks/rules.py
	-$(BIN)/python benchmarks/population.py
	-$(BIN)/python benchmarks/aggregation.py
	-$(BIN)/python benchmarks/codec.py

clean:  ## remove .venv, caches and runs
	rm -rf .venv .peers runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup demo test check nightly bench clean
