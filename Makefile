# From nothing: `make demo` and `make test` each create an environment of their own, install exact versions and run.

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
DEMO_ARGS ?=
SECONDS ?= 60

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null)
LOCKED := constraints/py$(VERSION).txt
DEMO := .venv
TEST := .venv-test
LATEST := .venv-latest
OLDEST := .venv-oldest
DOCS := .venv-docs
comma := ,
INPUTS := pyproject.toml constraints/files-demo.txt constraints/files-test.txt

.PHONY: help demo test lint docs bench fuzz lock test-latest test-oldest clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         compress a real language model to 4 bits and show the table (12 minutes on 2 cores, all in)"
	@echo "make test         run the tests"
	@echo "make lint         ruff, its formatter, mypy"
	@echo "make docs         the documentation site, in site/"
	@echo "make bench        measure the figures in results/ (make bench SYSTEM=slug: of one system)"
	@echo "make fuzz         20,000 damaged files for every reader (the tests try as many as fit into a minute)"
	@echo "make test-latest  run the tests on the newest versions of all dependencies"
	@echo "make test-oldest  run the tests on the oldest versions that pyproject.toml allows"
	@echo "make lock         write constraints/py3X.txt, the exact versions that demo, test and CI install"
	@echo "make clean        remove the environments and caches; runs/ and results/ stay"

demo: $(DEMO)/.ready
	$(DEMO)/bin/edgewright compress smollm2-135m --bits 4 --output runs/demo $(DEMO_ARGS)

test: $(TEST)/.ready
	$(TEST)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(TEST)/.ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

docs: $(DOCS)/.ready
	$(DOCS)/bin/mkdocs build --strict

bench: $(TEST)/.ready
	$(TEST)/bin/python benchmarks/$(if $(SYSTEM),recipes.py $(SYSTEM),run_all.py)

test-latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lock:
	$(PYTHON) constraints/lock.py

# A command, with a line every eight seconds: pip is silent while it unpacks.
define talking
@echo $(1)
@(while sleep 8; do echo "still installing into $(@D)"; done) & talker=$$!; $(1); status=$$?; kill $$talker; exit $$status
endef

# What an environment is made of: pip and setuptools in known versions (they build the source-only packages too), torch
# alone, for left to the resolver it may bring gigabytes of CUDA packages to a machine without a GPU, then the rest.
# $(1): options that choose versions; $(2): extras; $(3): list of packages that are installed without dependencies.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "edgewright needs Python 3.10 or newer as $(PYTHON); choose one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@rm -f $@  # an interrupt while the old environment is being cleared must not leave it "ready"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet $(1) --upgrade pip setuptools wheel
	$(call talking,$(@D)/bin/python -m pip install --disable-pip-version-check $(1) torch)
	$(call talking,$(@D)/bin/python -m pip install --disable-pip-version-check $(1) --no-build-isolation -e '.[$(2)]')
	$(@D)/bin/python -m pip install --disable-pip-version-check $(1) --no-deps -r $(3)
	@touch $@
endef

$(DEMO)/.ready: $(INPUTS) $(LOCKED)
	$(call environment,-c $(LOCKED),llamacpp,constraints/files-demo.txt)

$(TEST)/.ready: $(INPUTS) $(LOCKED)
	$(call environment,-c $(LOCKED),llamacpp$(comma)executorch$(comma)onnx$(comma)vision$(comma)test$(comma)lint$(comma)peers,constraints/files-test.txt)

# Newest versions, resolved anew after `make clean`; torch stays at the pin that ExecuTorch was built against.
.newest.txt: $(INPUTS) constraints/pins.txt
	$(PYTHON) constraints/lock.py --newest $@

$(LATEST)/.ready: .newest.txt
	$(call environment,-c .newest.txt,llamacpp$(comma)executorch$(comma)onnx$(comma)vision$(comma)test$(comma)peers,constraints/files-test.txt)

# The site is made from the source as text: neither torch nor the package itself is installed.
$(DOCS)/.ready: $(INPUTS) $(LOCKED)
	@rm -f $@  # an interrupt while the old environment is being cleared must not leave it "ready"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -c $(LOCKED) mkdocs-material mkdocstrings-python ruff
	@touch $@

# Every dependency exactly at its lower bound.
$(OLDEST)/.ready: $(INPUTS) constraints/oldest.txt
	$(call environment,-c constraints/oldest.txt,llamacpp$(comma)executorch$(comma)onnx$(comma)vision$(comma)test$(comma)peers,constraints/files-test.txt)

fuzz: $(TEST)/.ready
	$(TEST)/bin/python benchmarks/fuzz.py --jobs 2 --table results/fuzz.csv

clean:
	rm -rf $(DEMO) $(TEST) $(LATEST) $(OLDEST) $(DOCS) .newest.txt site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks constraints -name __pycache__ -type d -prune -exec rm -rf {} +
