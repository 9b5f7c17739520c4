# make help lists the targets. Everything is installed into .venv, at the versions of constraints.txt, and only when those change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Byte-compiling all of torch would be half of the installation; without it each module is compiled on its first import.
PIP_INSTALL = $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test smoke lint docs bench
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## userllm into .venv

demo: $(VENV)/.installed  ## MovieLens-1M end to end, in minutes: see runs/demo/report.html
	$(BIN)/userllm run configs/demo.yaml

test: $(VENV)/.test  ## the default test suite
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

smoke: $(VENV)/.installed  ## every experiment with tiny models, two cells at a time, and the page of them all: minutes
	rm -rf runs/smoke
	echo first second | xargs -n 1 -P 2 sh -c '$(BIN)/userllm experiments run all --scale smoke --out runs/smoke --set threads=1'
	$(BIN)/userllm experiments report --scale smoke --out runs/smoke

lint: $(VENV)/.lint  ## style, types, and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.docs  ## the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed .venv-bench/.installed  ## both sides of the comparisons in docs/performance.md
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip

# pip's newest resolver and installer take half the time of the one that venv brings.
# The constraint torch==2.13.0 also takes a CPU-only build (2.13.0+cpu) wherever pip is configured to find one.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[$*]'
	@touch $@ $(VENV)/.installed

# Its own environment, without userllm: RecTools still needs numpy 1.
.venv-bench/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --upgrade --no-compile pip
	.venv-bench/bin/pip install --quiet --no-compile 'rectools[torch]==0.19.0' pyarrow $$(grep -E '^(torch|polars)==' constraints.txt)
	@touch $@
