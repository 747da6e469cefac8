# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install quickstart modal-smoke smollm2 test engines lint format clean

help:  ## list the targets
	@grep -E '^[a-z0-9%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,modal,optuna,data,ray,mooncake]'
	@touch $@

install: .venv/.ready  ## set up .venv with the tested versions

quickstart: .venv/.ready  ## prompts to tau in minutes, on a CPU, without any account
	PYTHON=$(BIN)/python bash runs/quickstart.sh

modal-smoke: .venv/.ready  ## every stage small on Modal; without an account on a Modal of this machine
	PYTHON=$(BIN)/python bash runs/modal_smoke.sh

smollm2: .venv/.ready  ## the same six stages with SmolLM2-135M and real prompts, about an hour
	PYTHON=$(BIN)/python bash runs/smollm2.sh

# `python tests/tiers.py` lists the tiers, each says what it took beside its budget.
test: .venv/.ready  ## the fast tier: every module, one launch and one kill of each kind
	$(BIN)/python tests/tiers.py fast

test-%: .venv/.ready  ## one tier more: trainer resume modal sweeps end local-modal ray bench; all of them: test-all
	$(BIN)/python tests/tiers.py $*

engines: .venv/.ready  ## a real vLLM on this CPU with our drafts; asks for ENGINES=1 and says why
	PYTHON=$(BIN)/python bash runs/engines.sh

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
