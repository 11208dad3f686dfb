# The commands of this project; `make help` lists them.

PYTHON ?= python3
PY := .venv/bin/python
DEMO := data/demo

.DEFAULT_GOAL := help
.PHONY: help .venv demo test lint bench figures clean

help: ## list the commands
	@grep -hE '^[a-zA-Z0-9_.-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

.venv: .venv/installed ## make the environment: Python 3.11 or newer, pinned packages, about 5.5 GB

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d is too old; give PYTHON=python3.11 or newer" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

test: .venv/installed-dev ## run all tests
	$(PY) -m pytest

lint: .venv/installed-dev ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: .venv/installed-dev ## measure speed, as ratios, into benchmarks/results
	@for bench in benchmarks/bench_*.py; do \
		module=benchmarks.$$(basename $$bench .py); \
		echo "$(PY) -m $$module"; $(PY) -m $$module || exit 1; \
	done

figures: .venv/installed ## draw the pictures of the README again
	$(PY) images/idea.py

clean: ## remove what the demo and the tests made, not the environment
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
