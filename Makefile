# Each target sets itself up in .venv and does nothing twice. PYTHON picks the interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export NO_TORCH_COMPILE := 1

# Python 3.10 to 3.13 and make are all that has to be there.
.PHONY: help setup demo test test-slow lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   only install everything in .venv"
	@echo "make demo    the whole way on the embedded model and corpus, on CPU; ends with a results table"
	@echo "make test    the tests"
	@echo "make test-slow   the few that take minutes"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff put the code in shape"

# uv installs the set in a fraction of pip's time; where uv cannot be had, pip does the same.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else "Python 3.10 to 3.13 is needed; name one: make PYTHON=python3.12 test")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install -q --disable-pip-version-check uv; then \
		$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
		echo "uv cannot be installed; pip takes some minutes"; \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

setup: $(READY)

demo: $(READY)
	@$(BIN)/python recipes/demo.py

test: $(READY)
	@$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo
