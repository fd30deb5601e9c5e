# Two commands are all that a fresh machine with Python >= 3.11 needs: `make train` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Of the 20,000 Python files that are installed, few are ever imported: Python compiles those then, and keeps the result.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE
ARGS ?=

.PHONY: help train smoke test test-all lint types floors unit integration test-lowest format bench bench-cluster profile chaos soak docs docs-serve package clean

help:  ## Show these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.installed  ## Set up, then train the GPT worker with its defaults (ARGS="--num-heads 2 ..." to change them)
	$(BIN)/lte-ray train workers.gpt:GPT $(ARGS)

smoke: $(VENV)/.installed  ## Set up, then train the smallest worker: a few seconds
	$(BIN)/lte-ray train workers.regression:Regression --steps 200 $(ARGS)

test: lint floors  ## Set up, then lint, floors, types and the tests that take minutes
	@$(MAKE) --no-print-directory --jobs 3 types integration unit

test-all: lint floors types docs  ## Everything that can be tested here: all tests, and the documentation's site (about an hour)
	LTE_RAY_LONG=1 $(BIN)/python -m pytest -m "not ray" -n auto --dist loadscope $(ARGS)
	LTE_RAY_LONG=1 $(BIN)/python -m pytest -m ray $(ARGS)

lint: $(VENV)/.installed-dev  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

types: $(VENV)/.installed-dev  ## Check types
	$(BIN)/mypy

floors: $(VENV)/.installed-dev  ## Check that imports go downward only
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/.installed-dev  ## Run the tests that start no Ray, on all cores (ARGS="-k merge" to pick some)
	nice -n 19 $(BIN)/python -m pytest -m "not ray and not slow" -n auto --dist loadscope $(ARGS)

integration: $(VENV)/.installed-dev  ## Run the tests on a real Ray
	$(BIN)/python -m pytest -m "ray and not slow" $(ARGS)

test-lowest: .venv-lowest/.installed  ## Run the tests of `make test` on the lowest versions that pyproject.toml allows, in .venv-lowest
	.venv-lowest/bin/python -m pytest -m "not ray and not slow" -n auto --dist loadscope $(ARGS)
	.venv-lowest/bin/python -m pytest -m "ray and not slow" $(ARGS)

format: $(VENV)/.installed-dev  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## Run the benchmarks and write benchmarks/results (about two hours)
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.check
	$(BIN)/python -m benchmarks.efficiency
	$(BIN)/python -m benchmarks.reporting
	$(BIN)/python -m benchmarks.figures
	$(BIN)/python -m benchmarks.modes
	$(BIN)/python -m benchmarks.optimizers
	$(BIN)/python -m benchmarks.step_cost
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.quantized
	$(BIN)/python -m benchmarks.async
	$(BIN)/python -m benchmarks.bytes
	$(BIN)/python -m benchmarks.merge_scale
	$(BIN)/python -m benchmarks.simulator
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.async_quality
	$(BIN)/python -m benchmarks.async_defaults
	$(BIN)/python -m benchmarks.checkpoints
	$(BIN)/python -m benchmarks.prefetch
	$(BIN)/python -m benchmarks.report_page

bench-cluster: $(VENV)/.installed-dev  ## Measure runs on hosts with networks of their own; as root (ARGS="--part traffic")
	$(BIN)/python -m benchmarks.cluster $(ARGS)

profile: $(VENV)/.installed-dev  ## Show where a step and a merge of the main job spend their time: a table, traces and a flame graph
	$(BIN)/python -m benchmarks.hot_spots

FAULT_TESTS := $(addprefix tests/integration/test_,process_kills.py process_kills_long.py driver_kill.py heads_long.py nodes.py storage.py)

chaos: $(VENV)/.installed-dev  ## Kill every kind of process at every point, cut off nodes, then explore thousands of schedules (about an hour)
	LTE_RAY_LONG=1 $(BIN)/python -m pytest -m ray $(FAULT_TESTS)
	LTE_RAY_LONG=1 $(BIN)/python -m pytest tests/chaos
	$(BIN)/python -m benchmarks.chaos $(ARGS)

soak: $(VENV)/.installed-dev  ## Kill and stop processes of a run for half an hour, and report (ARGS="--minutes 3")
	$(BIN)/python -m benchmarks.soak $(ARGS)

docs: $(VENV)/.installed-docs  ## Build the documentation's site in site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean --quiet

docs-serve: $(VENV)/.installed-docs  ## Show the documentation's site on http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

package: $(VENV)/.installed-package  ## Build the wheel in dist/, check it, and train with it in a new environment
	.ci/package $(BIN)/python

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .venv-lowest dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lte-ray needs Python >= 3.11, found $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip

# The constraints pin every version that these targets install; pyproject.toml keeps the ranges that work.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[plots]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable . --group dev
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable . --group docs
	@touch $@ $(VENV)/.installed

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet --no-compile "pip>=25.1"
	.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints-lowest.txt --editable . --group test
	@touch $@

$(VENV)/.installed-package: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --group package
	@touch $@
