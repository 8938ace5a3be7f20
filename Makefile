# Everything happens in .venv, in this folder; nothing is installed system-wide.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& { echo $$python; break; }; done)
BIN := .venv/bin
OLDER_VLLM := 0.29.0 0.31.0
VLLM_MATRIX := 0.26.0 0.27.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0
TESTS ?=

.DEFAULT_GOAL := help
.PHONY: help venv venv-older test test-vllm-older test-vllm-matrix test-models check lint demo bench chaos clean

help:  ## show this list
	@echo "kvbm-service: a distributed KV-block cache for LLM engines"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv:  ## set up .venv (the first time takes a few minutes)
	@$(if $(PYTHON),,$(error Python 3.11 to 3.14 is needed, and none was found: install one, or name it with PYTHON=))
	@$(PYTHON) deploy/dev/environment.py

venv-older:  ## set up the older vLLM releases beside it
	@$(if $(PYTHON),,$(error Python 3.11 to 3.14 is needed, and none was found: install one, or name it with PYTHON=))
	@$(PYTHON) deploy/dev/environment.py --older $(OLDER_VLLM)

test: venv programs  ## run every test that needs no GPU, on all vLLM releases (TESTS=path: only those)
	@$(BIN)/python $(if $(TESTS),-m pytest $(TESTS),deploy/dev/lanes.py --older $(OLDER_VLLM))

test-vllm-older: venv  ## run the connector's tests on older vLLM releases
	@$(BIN)/python deploy/dev/lanes.py --older $(OLDER_VLLM) --only-older

test-vllm-matrix: venv  ## the same on every release that is supported, and a table of what came of it
	@$(BIN)/python -m deploy.dev.vllm_matrix $(VLLM_MATRIX)

test-models: venv  ## ask models of many kinds with and without the connector, and print a table
	@$(BIN)/python -m tests.models $(ROWS)

.PHONY: programs
programs:
	@$(PYTHON) deploy/dev/programs.py || true

lint: venv  ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

check: lint test  ## lint, then test: what has to pass before a commit

demo: venv  ## two vLLM engines share a prompt's KV blocks
	@$(BIN)/kvbm demo

chaos: venv programs  ## faults at random under load (SECONDS=120 SEED=1; `python -m tests.chaos --help` says more)
	@$(BIN)/python -m tests.chaos --seconds $(or $(SECONDS),120) --seed $(or $(SEED),1)

bench: venv  ## every figure beside its yardstick; writes build/bench.json
	@$(BIN)/kvbm bench

clean:  ## remove the virtual environments, caches and build outputs
	rm -rf .venv .venvs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
