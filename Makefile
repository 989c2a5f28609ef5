# Every target does its own set-up: a virtual environment, pinned dependencies, the native build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
CPP_FILES := $(NATIVE_SOURCES)

.PHONY: help setup demo test lint types unit format bench clean

help:
	@echo "make demo    train a small GPT-2 through all three tiers (about 3 minutes)"
	@echo "make test    lint, types and the whole test suite"
	@echo "make bench   the I/O and kernel benchmarks behind the README's figures"
	@echo "make setup   only the environment and the native build"
	@echo "make format  format all sources"
	@echo "make clean   remove the environment and all build outputs"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is too old; Python 3.10 or newer is needed (PYTHON=... chooses one)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "error: no virtual environment; on Debian: apt-get install python3-venv"; exit 1; }

# Build tools first, since the project is built without isolation, with the pinned versions of them.
$(VENV)/.installed: $(BIN)/python constraints.txt pyproject.toml setup.py
	@command -v g++ >/dev/null || { echo "error: no g++; on Debian: apt-get install g++"; exit 1; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
		|| { echo "error: no Python.h; on Debian: apt-get install python3-dev"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel pybind11
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Installing has built it already; this is for sources that changed since.
$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	@if [ -n "$$(find csrc -newer $(VENV)/.installed)" ]; then \
		echo "building the native module"; $(BIN)/python setup.py --quiet build_ext --inplace; fi
	@touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/angelptm train configs/demo.yaml

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

types: setup
	$(BIN)/mypy

unit: setup $(VENV)/.browser
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The test of the report looks at it in Chromium, and skips where there is none and none can be installed.
$(VENV)/.browser: $(VENV)/.installed
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium for the test of the report"; export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends chromium; } >$(VENV)/browser.log 2>&1 \
			|| echo "chromium was not installed ($(VENV)/browser.log); its tests will be skipped"; fi
	@touch $@

bench: setup
	$(BIN)/angelptm io bench --path .
	$(BIN)/python tools/bench/kernels.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) build *.egg-info *.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
