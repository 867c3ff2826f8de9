# make quickstart   set up, then everything from raw text to a chat answer
# make test         set up, then lint, types and all tests      make test-fast   without servers, in about a minute
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN    := $(VENV)/bin
QUICKSTART ?=

.PHONY: quickstart test test-fast lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/llada quickstart $(QUICKSTART)

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-fast: lint
	$(BIN)/python -m pytest -m "not slow and not integration"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
