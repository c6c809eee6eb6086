# One command per wish; `make` alone lists them.
#
#   PYTHON        the interpreter for .venv (default: the first of python3.12, python3.11, python3 that fits)
#   PIP_ARGS      passed on to pip, e.g. an index of CPU wheels:
#                 make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   PYTEST_ARGS   passed on to pytest, e.g. make test PYTEST_ARGS="-k noise"

PYTHON ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 3

VENV := .venv
STAMP := $(VENV)/.setup-stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv with all that use and tests need; nothing happens when nothing changed

demo: setup  ## render configs/demo.yaml to out/demo.mp4 with the built-in model
	@mkdir -p out
	$(VENV)/bin/vidgen render --config configs/demo.yaml --output out/demo.mp4 --overwrite

test: setup  ## run the tests (without a GPU, those marked gpu are skipped)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

soak: setup  ## run the long tests that `make test` leaves out
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

check: setup  ## lint, types, sizes, import directions
	$(VENV)/bin/python tools/check.py

bench: setup  ## measure rendering on this machine
	$(VENV)/bin/python tools/bench.py render

clean:  ## remove build outputs and caches; renders, jobs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./.git -o -path ./out -o -path ./runs -o -name '*.job' \) -prune \
	    -o -type d -name __pycache__ -exec rm -rf {} +

# The first interpreter in range that can make a venv, else the first in range, ends up in $$python.
# Candidates are run, not looked up: version managers leave stubs on PATH that only fail.
define find_python
python=; venv_works=; \
for candidate in $(if $(PYTHON),$(PYTHON),python3.12 python3.11 python3); do \
    "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 || continue; \
    : "$${python:=$$candidate}"; \
    if "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
        python=$$candidate; venv_works=yes; break; \
    fi; \
done
endef

$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	    $(find_python); \
	    if [ -z "$$python" ]; then \
	        echo "error: no Python 3.11 or 3.12 among: $(or $(PYTHON),python3.12 python3.11 python3)." \
	            "Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    if [ -z "$$venv_works" ] && [ "$$(id -u)" = 0 ] && [ -f /etc/debian_version ]; then \
	        { apt-get install -y python3-venv || { apt-get update && apt-get install -y python3-venv; }; } || true; \
	        $(find_python); \
	    fi; \
	    if [ -z "$$venv_works" ]; then \
	        echo "error: $$python has no venv or ensurepip." \
	            "Install them (Debian, Ubuntu: apt-get install python3-venv) and run make again" >&2; \
	        exit 1; \
	    fi; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@
