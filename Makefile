PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# There is one of these at a time: a finished installation, or one that was cut off.
INSTALLED := $(VENV)/.installed
INSTALLING := $(VENV)/.installing
PLUGINS := plugins/memlong-usearch/pyproject.toml plugins/memlong-milvus/pyproject.toml
# Python compiles what it imports, and keeps it; to compile all that there is takes longer than to test with it.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# The workers share the cores, so each has one thread; they take tests from each other's ends, where a fixture is not shared.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses logical --dist worksteal

.PHONY: help install demo test test-all test-versions torture lint docs dist bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with memlong, every backend, the tools and the demo's models

$(INSTALLED): pyproject.toml constraints.txt demo-requirements.txt $(PLUGINS)
	@echo "Installing into $(VENV): some minutes the first time"
	@if [ -e $(INSTALLING) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@rm -f $(INSTALLED) && touch $(INSTALLING)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --no-build-isolation $(addprefix --editable ,$(dir $(PLUGINS))) --requirement demo-requirements.txt
	@mv $(INSTALLING) $(INSTALLED)

demo: $(INSTALLED) ## Compare recall and perplexity of the backends on a small model
	$(BIN)/python examples/recall_vs_perplexity.py $(ARGS)

test: $(INSTALLED) ## Run the tests that are not slow, of models one case for each value; ARGS="-k name" picks some
	$(PYTEST) -m 'not slow' --brief $(ARGS)

test-all: $(INSTALLED) ## Run all tests: the slow ones, too, and every two values together (20 minutes)
	$(PYTEST) $(ARGS)

test-versions: $(INSTALLED) ## Test the core on other Pythons, and with the lowest versions of what it needs
	$(BIN)/python tests/versions.py $(ARGS)

torture: $(INSTALLED) ## Corrupt, mutate, kill and crowd snapshots, adapters and banks thousands of times (20 minutes)
	MEMLONG_TORTURE=1 $(BIN)/pytest -q tests/bank/snapshot/test_corpus.py tests/bank/snapshot/test_killed.py \
		tests/cli/test_killed.py tests/torture tests/backends/test_threads.py $(ARGS)

lint: $(INSTALLED) ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED) ## Build the documentation into out/docs, without the network, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(INSTALLED) ## Build the wheel and the source archive into dist/, and check them as PyPI does
	rm -rf dist
	$(BIN)/uv build
	$(BIN)/uvx twine check --strict dist/*

bench: $(INSTALLED) ## Measure speed and memory, each next to a baseline (under 15 minutes)
	mkdir -p out
	$(BIN)/python bench/bank.py --json out/bank.json
	$(BIN)/python bench/kv.py --json out/kv.json
	$(BIN)/python bench/peers.py --json out/peers.json
	$(BIN)/python bench/decoder.py --json out/decoder.json
	$(BIN)/python bench/profile_stream.py --json out/profile_stream.json
	$(BIN)/python bench/long_context.py --lengths 2048,8192
	$(BIN)/python bench/long_stream.py --tokens 20000 --places 5000 --points 20
	$(BIN)/python bench/snapshots.py --json out/snapshots.json
	$(BIN)/python bench/shared_memory.py --json out/shared_memory.json
	$(BIN)/python bench/results.py out/bank.json out/kv.json out/peers.json out/decoder.json out/profile_stream.json

clean: ## Remove caches and build outputs; .venv stays
	rm -rf build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find memlong backends plugins tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} +
