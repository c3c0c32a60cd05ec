# Every target first installs .venv if it is missing or outdated. PYTHON selects the interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export NO_TORCH_COMPILE := 1

# Requires Python 3.10 to 3.13 and make.
.PHONY: help setup demo test test-slow lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make setup       install everything in .venv, nothing else"
	@echo "make demo        the whole workflow with a tiny model and a synthetic corpus, on CPU; ends with a results table"
	@echo "make test        run the tests"
	@echo "make test-slow   run the tests that take minutes"
	@echo "make lint        run ruff and mypy"
	@echo "make format      format the code with ruff"

# uv is much faster than pip, which is the fallback.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else "Python 3.10 to 3.13 is needed; name one: make PYTHON=python3.12 test")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install -q --disable-pip-version-check uv; then \
		$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev,serve,prosody,trackers]'; \
	else \
		echo "uv cannot be installed; falling back to pip, which takes some minutes"; \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,serve,prosody,trackers]'; \
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
