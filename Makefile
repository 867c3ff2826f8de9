VENV       ?= .venv
PYTHON     ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN        := $(VENV)/bin
WORKERS    ?= 2
RESULTS    ?= build/benchmarks
QUICKSTART ?=
QUICK      ?=
DATATROVE_PYTHON ?=

PYTEST    := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
BENCHMARK  = $(BIN)/python tests/benchmarks/$(1).py --results $(RESULTS) $(if $(QUICK),--quick) \
             $(if $(DATATROVE_PYTHON),--datatrove-python $(DATATROVE_PYTHON))

.PHONY: help quickstart test test-fast lint format bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed  ## set up, then everything from raw text to a chat answer (QUICKSTART="--input my.jsonl")
	$(BIN)/llada quickstart $(QUICKSTART)

test: lint  ## set up, then lint, types and all tests on two processes (WORKERS=N)
	$(PYTEST) -m "not slow"

test-fast: lint  ## the same without the tests that start servers, in about three minutes
	$(PYTEST) -m "not slow and not integration"

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## benchmarks, into RESULTS=build/benchmarks (QUICK=1: on little data; DATATROVE_PYTHON=…: beside datatrove)
	$(call BENCHMARK,minhash)
	$(call BENCHMARK,extraction)
	$(if $(DATATROVE_PYTHON),$(call BENCHMARK,filters))
	$(BIN)/python tests/benchmarks/prepare_scale.py --results $(RESULTS) $(if $(QUICK),--quick)

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable ".[dev]"
	touch $@

clean:  ## remove the virtual environment and what was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
