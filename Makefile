# Every target does its own set-up: a virtual environment, pinned dependencies, the native build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
CPP_FILES := $(NATIVE_SOURCES)

# Tests of native threads and memory. Where they start other programs, train, or race on purpose, they say so.
SANITIZED_TESTS := tests/update tests/pages tests/io/test_contract.py tests/timeline/test_native.py tests/kernels/test_parity.py

.PHONY: help setup demo test lint types unit sanitize sanitize-thread sanitize-address format bench clean

help:
	@echo "make demo    train a small GPT-2 through all three tiers (about 3 minutes)"
	@echo "make test    lint, types and the whole test suite"
	@echo "make sanitize   the native tests under the thread and the address sanitizer (minutes)"
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

unit: setup $(VENV)/.programs
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Programs that tests look at results with: Chromium shows the report, spin searches the protocol of updates. Tests skip
# where there is none and none can be installed.
$(VENV)/.programs: $(VENV)/.installed
	@for program in chromium spin; do \
		if ! command -v $$program >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing $$program for tests"; export DEBIAN_FRONTEND=noninteractive; \
			{ apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends $$program; } >$(VENV)/$$program.log 2>&1 \
				|| echo "$$program was not installed ($(VENV)/$$program.log); its tests will be skipped"; fi; done
	@touch $@

sanitize: sanitize-thread sanitize-address

# The module in the repository's root stays what it is. Leaks are not looked for: Python's own would hide ours.
build/sanitize-%/.built: $(VENV)/.built setup.py
	@echo "building the native module for the $* sanitizer"
	@ANGELPTM_SANITIZE=$* $(BIN)/python setup.py --quiet build_ext --build-lib $(@D)
	@touch $@

# Reports go to files, since pytest captures what processes print, and one that ends is a failure that says nothing. The
# thread sanitizer does not see what the kernel writes, which is what the other backend is about.
sanitize-thread: SANITIZER_LIBRARY := libtsan.so
sanitize-thread: SANITIZED_TESTS += -k "not uring"
sanitize-address: SANITIZER_LIBRARY := libasan.so
sanitize-thread sanitize-address: sanitize-%: build/sanitize-%/.built
	@rm -f build/sanitize-$*/report.*
	@env LD_PRELOAD="$$(g++ -print-file-name=$(SANITIZER_LIBRARY)) $$(g++ -print-file-name=libstdc++.so)" PYTHONPATH="$(CURDIR)/build/sanitize-$*" \
		TSAN_OPTIONS="log_path=$(CURDIR)/build/sanitize-$*/report:suppressions=$(CURDIR)/tests/thread_sanitizer.supp" \
		ASAN_OPTIONS="log_path=$(CURDIR)/build/sanitize-$*/report:detect_leaks=0" \
		ANGELPTM_SANITIZED=$* ANGELPTM_STRESS_EVENTS=60000 \
		$(BIN)/pytest -n 2 --dist worksteal -m "not unsanitized" -o faulthandler_timeout=120 \
		-o faulthandler_exit_on_timeout=true $(SANITIZED_TESTS); status=$$?; \
	for report in build/sanitize-$*/report.*; do if [ -e "$$report" ]; then cat "$$report"; status=1; fi; done; \
	exit $$status

bench: setup
	$(BIN)/angelptm io bench --path .
	$(BIN)/python tools/bench/kernels.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf $(VENV) build *.egg-info *.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
