# `make demo` and `make test` do all their own setting up on a machine that has Python 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench chaos format

$(VENV)/.perdure-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.perdure-installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.perdure-installed
	$(BIN)/pytest -q tests/unit
	$(BIN)/pytest -q tests/integration

lint: $(VENV)/.perdure-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/unit/test_tidy.py tests/unit/test_layout.py

format: $(VENV)/.perdure-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.perdure-installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m perdure.benchmarks

chaos: $(VENV)/.perdure-installed
	$(BIN)/python -m perdure.runtime.simulate --seeds 1000
