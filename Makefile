# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install quickstart smollm2 test lint format clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,modal,optuna,data]'
	@touch $@

install: .venv/.ready  ## set up .venv with the tested versions

quickstart: .venv/.ready  ## prompts to tau in minutes, on a CPU, without any account
	PYTHON=$(BIN)/python bash runs/quickstart.sh

smollm2: .venv/.ready  ## the same six stages with SmolLM2-135M and real prompts, about an hour
	PYTHON=$(BIN)/python bash runs/smollm2.sh

# Two processes; what fails while they share the machine is shown, and has to pass alone.
test: .venv/.ready  ## the test suite
	$(BIN)/python -m pytest -m 'not gpu and not live' -n 2 --dist loadfile || { test $$? = 1 && \
	$(BIN)/python -m pytest -m 'not gpu and not live' --last-failed --last-failed-no-failures none; }

lint: .venv/.ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases hydra_plugins modal_sweep hydra_sweeps tests/modal_local

format: .venv/.ready  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; artifacts stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
