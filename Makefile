PYTHON ?= python3
# Each other PYTHON gets its own environment.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-all test-lowest test-peers bench bench-gpu docs docs-serve docs-test lint audit dist clean

train: $(STAMP)
	@$(BIN)/python -m examples.train_classifier $(ARGS)

# Tests every rule, loss, file format and page once, in a few minutes.
test: $(STAMP)
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(STAMP)
	@$(BIN)/python -m pytest $(ARGS)

# The tests that need PyTorch, Keras, loggers and other libraries, in a separate environment.
test-peers: $(STAMP)
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[dev,peers]"
	@.venv-peers/bin/python -m pytest tests/test_convert.py tests/test_loggers.py tests/test_works_with.py $(ARGS)

# All tests, with the oldest release of each dependency that pyproject.toml allows.
test-lowest: $(STAMP)
	@$(BIN)/python -m tests.lowest > $(VENV)/lowest.txt
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/lowest.txt --editable ".[dev]"
	@.venv-lowest/bin/python -m pytest $(ARGS)

bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[bench]"
	@$(BIN)/python -m benchmarks.training $(ARGS)

# On a GPU: installs JAX for its driver, runs the tests marked gpu, measures, and writes docs/background/benchmarks-gpu.md.
bench-gpu: $(STAMP)
	@extra=$$($(BIN)/python -m benchmarks.accelerator --extra) && \
	  if [ -n "$$extra" ]; then $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$$extra]"; fi
	@$(BIN)/python -m benchmarks.accelerator $(ARGS)

# Builds the site in docs/_build/html, executes every cell, and treats warnings as errors.
docs: $(VENV)/.docs
	@$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going --jobs 2 docs docs/_build/html
	@echo "The site is docs/_build/html/index.html."

docs-serve: docs
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

# Tests the site in a real browser: Debian's chromium package, or the program named by CHROMIUM.
docs-test: docs
	@$(BIN)/python -m pytest docs/test_site.py $(ARGS)

$(VENV)/.docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/pyright --pythonpath $(BIN)/python

# Looks for known vulnerabilities in what fcfunc needs, if a database can be reached.
audit: $(STAMP)
	@$(BIN)/python -m proofs.audit

# Reproducible: a commit gives the same bytes at any time and on any machine.
dist: $(STAMP)
	@rm -rf dist
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --outdir dist . > /dev/null
	@cd dist && sha256sum *

clean:
	rm -rf .venv .venv-* dist docs/_build runs

# Installs once, and again when pyproject.toml is newer than the stamp.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fcfunc needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (choose another: make PYTHON=python3.12)")'
	@echo "Creating $(VENV) and installing fcfunc with the dependencies of its examples and tests (about a minute, once)."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(STAMP)
