# The few commands a person types.  `make train` and `make test` need Python >= 3.11 and nothing else.
#
#   make train    create .venv if needed, train the demo recipe on two local processes
#   make test     create .venv if needed, run the test suite
#   make check    format, lint, types, import contracts
#   make bench    the benchmarks (on a GPU)
#
# PLATFORM=cpu or PLATFORM=cuda overrides the detection, PYTHON=... the interpreter, PROCS=... the number of processes
# that train, JOBS=... that test (0: in pytest's own).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
PLATFORM ?= $(if $(filter-out 0,$(GPUS)),cuda,cpu)
# One process a GPU, at most two; two on a CPU.
PROCS ?= $(if $(filter cuda-1,$(PLATFORM)-$(GPUS)),1,2)

JOBS ?= 2

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
REQUIREMENTS := requirements/runtime.txt requirements/$(PLATFORM).txt requirements/dev.txt
# The environment is complete if and only if this file exists: it is made last, and its name changes with the sets.
READY := .venv/.ready-$(PLATFORM)-$(shell cat $(REQUIREMENTS) | cksum | cut -d' ' -f1)

.PHONY: train test check bench env
.DELETE_ON_ERROR:

train: $(READY)
	$(BIN)/python -m launch submit kuairand_sample --scheduler local_cwd --nodes 1 --procs-per-node $(PROCS)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.layer
	$(BIN)/python -m benchmarks.tower

env: $(READY)

# torch brings its own dependencies (on a GPU machine the CUDA libraries); everything else is pinned in full and
# installed without dependencies, so that nothing replaces a version of the tested set.
$(READY):
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one or run make PYTHON=/path/to/python" >&2; exit 1; }
	@test -f requirements/$(PLATFORM).txt || { echo "error: PLATFORM is $(PLATFORM), expected cpu or cuda" >&2; exit 1; }
	@echo "creating .venv for $(PLATFORM) with $$($(PYTHON) --version)"
	ls .venv/.ready-$(PLATFORM)-* >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	rm -f .venv/.ready-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/runtime.txt $$(grep '^torch==' requirements/$(PLATFORM).txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(addprefix --requirement ,$(REQUIREMENTS))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
