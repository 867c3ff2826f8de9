VENV       ?= .venv
PYTHON     ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN        := $(VENV)/bin
WORKERS    ?= 2
RESULTS    ?= build/benchmarks
QUICKSTART ?=
QUICK      ?=
DATATROVE_PYTHON ?=
DLMSERVE_PYTHON ?=
TEXT       ?=
# What the sampler's benchmarks train, and find again.
SMALL_MODEL ?= build/small-model$(if $(QUICK),-quick)

PYTEST    := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
BENCHMARK  = $(BIN)/python tests/benchmarks/$(1).py --results $(RESULTS) $(if $(QUICK),--quick) \
             $(if $(DATATROVE_PYTHON),--datatrove-python $(DATATROVE_PYTHON))

.PHONY: help quickstart test test-fast lint format audit bench bench-sampler bench-training bench-serving clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed  ## set up, then everything from raw text to a chat answer (QUICKSTART="--input my.jsonl")
	$(BIN)/llada quickstart $(QUICKSTART)

test: lint $(VENV)/.installed-browser  ## set up, then lint, types and all tests on two processes (WORKERS=N)
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

audit:  ## known vulnerabilities in the versions of infra/constraints.txt, as PyPI tells them
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet pip-audit==2.10.0
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement infra/constraints.txt

bench: $(VENV)/.installed-dev  ## benchmarks, into RESULTS=build/benchmarks (QUICK=1: on little data; DATATROVE_PYTHON=…: beside datatrove)
	$(call BENCHMARK,minhash)
	$(call BENCHMARK,extraction)
	$(if $(DATATROVE_PYTHON),$(call BENCHMARK,filters))
	$(BIN)/python tests/benchmarks/prepare_scale.py --results $(RESULTS) $(if $(QUICK),--quick)
	$(BIN)/python tests/benchmarks/head_loss.py --results $(RESULTS) $(if $(QUICK),--quick)
	$(BIN)/python tests/benchmarks/plan_memory.py --results $(RESULTS) $(if $(QUICK),--quick)
	$(BIN)/python tests/benchmarks/checkpoint_metadata.py --results $(RESULTS) $(if $(QUICK),--quick)

bench-sampler: $(VENV)/.installed-dev  ## train a small model for half an hour, then the sampler's benchmarks and their plot, two hours in all (TEXT=folder of .txt; DLMSERVE_PYTHON=…: beside dlmserve; QUICK=1)
	test -e $(SMALL_MODEL)/trained || $(BIN)/python tests/benchmarks/sampling_model.py $(SMALL_MODEL) $(if $(TEXT),--text $(TEXT)) $(if $(QUICK),--quick)
	$(BIN)/python tests/benchmarks/sampling.py $(SMALL_MODEL) --results $(RESULTS) $(if $(QUICK),--quick)
	$(BIN)/python tests/benchmarks/sampling.py --plot --results $(RESULTS) --image $(RESULTS)/sampling.svg
	$(BIN)/python tests/benchmarks/engine.py $(SMALL_MODEL) --cache dual+growing --results $(RESULTS) $(if $(QUICK),--quick) \
		$(if $(DLMSERVE_PYTHON),--dlmserve-python $(DLMSERVE_PYTHON))
	$(BIN)/python tests/benchmarks/batch_invariance.py $(SMALL_MODEL) --results $(RESULTS) $(if $(QUICK),--quick)

bench-training: $(VENV)/.installed-dev  ## a training step beside transformers', in CPU time and memory, and beside one under Ray, about half an hour on a quiet machine (QUICK=1)
	$(BIN)/python tests/benchmarks/training.py --results $(RESULTS) $(if $(QUICK),--quick)
	$(BIN)/python tests/benchmarks/ray_overhead.py --results $(RESULTS) $(if $(QUICK),--quick)

bench-serving: $(VENV)/.installed-dev  ## what the endpoint costs around the network, by process, in about ten minutes on a quiet machine (QUICK=1)
	$(BIN)/python tests/benchmarks/serving.py --results $(RESULTS) $(if $(QUICK),--quick)

$(VENV)/.installed: pyproject.toml infra/constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable ".[dev]"
	touch $@

# Of the page's tests: the machine's own Chromium, else one of Playwright's, else, for root on Debian, its package. Without any they
# say that they are skipped.
$(VENV)/.installed-browser: $(VENV)/.installed-dev
	command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| $(BIN)/python -m playwright install chromium-headless-shell \
		|| { test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; } \
		|| echo "NO CHROMIUM here, and none can be installed: the page will not be tested"
	touch $@

clean:  ## remove the virtual environment and what was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
