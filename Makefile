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

nightly: .venv/installed  ## run the benchmarks
	$(BIN)/python benchmarks/streaming_memory.py
	$(BIN)/python benchmarks/grid_overhead.py

clean:  ## remove .venv, caches and runs
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup demo test check nightly clean
