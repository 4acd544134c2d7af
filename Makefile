# Every target is complete on a machine with Python (3.10 or newer, with venv) and make only:
# the first one creates .venv and installs the project there with the tested versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
# The extra `docs` of pyproject.toml.
DOCS_PACKAGES := 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.29' ruff
# Twice quiet: errors only, no hints that newer versions exist.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

# The tests start hundreds of processes. Without cached bytecode each of them compiles the package again.
export PYTHONDONTWRITEBYTECODE :=

# One process for each core, each with whole files of tests. Figures of memory are taken in processes of their own.
# In the order of their names, which spreads the longest ones best.
IN_PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Two jobs at once: the checker of types uses one core only.
.PHONY: check
check: $(INSTALLED) ## Check style, types and the unit tests of every room, in less than a minute
	@$(MAKE) --no-print-directory --jobs 2 lint typecheck unit

# Every tenth case: the first one of each test among them. `make test` runs all.
.PHONY: unit
unit: $(INSTALLED) ## Run the tests that start neither a process nor a Trainer
	@$(BIN)/python -m pytest -q --unit --every 10

.PHONY: test
test: $(INSTALLED) ## Run the test suite (tests that need a GPU are skipped without one)
	@$(BIN)/python -m pytest $(IN_PARALLEL)

.PHONY: test-all
test-all: $(INSTALLED) ## Run the test suite with whole products of options, where `make test` takes one row per axis
	@$(BIN)/python -m pytest $(IN_PARALLEL) --all
	@TEST_LIGHTNING=pytorch_lightning $(BIN)/python -m pytest $(IN_PARALLEL) --all tests/plugins --ignore=tests/plugins/test_packages.py

# Every tenth case only, to save minutes; without --every all of them pass too. Twice quiet: the last line is the suite's.
.PHONY: test-names
test-names: $(INSTALLED) ## Run the tests that enter Lightning with its other name, pytorch_lightning
	@echo "With pytorch_lightning:"
	@TEST_LIGHTNING=pytorch_lightning $(BIN)/python -m pytest -qq $(IN_PARALLEL) --every 10 -m "not lightning_only" tests/plugins --ignore=tests/plugins/test_packages.py

# VERSIONS="3.12:2.8.0:2.5.5" chooses others: python:torch:lightning. Needs these Pythons and some GB of disk.
.PHONY: test-versions
test-versions: ## Run tests with the oldest and the newest Python, torch and Lightning, and record what passed
	@$(PYTHON) tests/versions.py $(VERSIONS)

.PHONY: test-gpu
test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu tests/gpu

.PHONY: demo
demo: $(INSTALLED) ## Train, save and resume a small GPT, stock and with the callback, side by side
	@$(BIN)/python examples/resume_pretraining.py

.PHONY: finetune
finetune: $(INSTALLED) ## Finetune a model larger than the memory that the process may use (needs root for the limit)
	@$(BIN)/python examples/finetune_low_ram.py

.PHONY: figures
figures: $(INSTALLED) ## Draw the pictures of README and the documentation from the measured results
	@$(BIN)/python examples/benchmarks/draw.py

# Strict: a broken link or reference is an error. The variable silences a notice of the theme about other programs.
.PHONY: docs
docs: $(DOCS_INSTALLED) ## Build the documentation into build/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Built build/docs/index.html"

.PHONY: lint
lint: $(INSTALLED) ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: typecheck
typecheck: $(INSTALLED) ## Check types (mypy, strict) of the package, the examples and the tests
	@$(BIN)/mypy

.PHONY: clean
clean: ## Remove the environment, the caches and what the examples wrote
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs lightning_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts there, so a creation that failed half-way is tried again.
$(BIN)/pip:
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV)

# The stamp is written last, so that an installation that failed is repeated and not taken for done.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing the tested versions into $(VENV) ..."
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

# Without the project and so without torch: pages are made from the sources, which are read and not imported.
$(DOCS_INSTALLED): Makefile constraints.txt | $(BIN)/pip
	@echo "Installing what builds the documentation into $(VENV) ..."
	@$(PIP_INSTALL) -c constraints.txt $(DOCS_PACKAGES)
	@touch $@
