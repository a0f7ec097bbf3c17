# Two commands, on a fresh clone and ever after:
#
#     make train    trains a small byte-level transformer with ring attention on $(PROCESSES) processes
#     make test     runs the suite
#
# Both make .venv on first use, and again whenever pyproject.toml, constraints.txt or locked/ changes: what training needs, and
# for the tests what they need beside it. Every package is verified against the SHA-256 in locked/, but for torch: that is
# installed alone and first, at the version in constraints.txt, in whatever build this machine's index has, with the CUDA parts
# that this build asks for. LOCKED=1, for CI, verifies these too: a build without CUDA that locked/ knows, else the release's.
#
#     make train PROCESSES=4 ARGS="--steps 500"        make test ARGS="-k zigzag -x"        make test PYTHON=python3.12

PYTHON    ?= python3
PROCESSES ?= 2
ARGS      ?=
LOCKED    ?=

VENV    := .venv
BIN     := $(VENV)/bin
LEAST   := $(VENV)/.trains
STAMP   := $(VENV)/.installed
PIP     := $(BIN)/python -m pip --disable-pip-version-check
HASHED  := $(PIP) install -qq --no-deps --no-build-isolation --require-hashes
LOCKS   := pyproject.toml constraints.txt $(wildcard locked/*.txt)

ifeq ($(LOCKED),1)
TORCH   := $(HASHED) -r locked/torch_cpu.txt 2>/dev/null || $(HASHED) -r locked/torch.txt
CUDA    := $(HASHED) -r locked/cuda.txt
else
TORCH   := $(PIP) install -qq --no-deps -c constraints.txt torch
CUDA    := $(PIP) install -qq -c constraints.txt torch
endif

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow soak lint clean

help:
	@echo "make train       train on $(PROCESSES) processes (PROCESSES=, ARGS=)"
	@echo "make test        run the test suite (ARGS= goes to pytest)"
	@echo "make test-slow   run the slow tests: faults, planted bugs, long runs"
	@echo "make soak        fuzz and soak for MINUTES=$(MINUTES) each"
	@echo "make lint        ruff and mypy"
	@echo "make install     only make $(VENV) (LOCKED=1: torch by its hash, too)"
	@echo "make clean       remove caches and build products; keeps $(VENV) and runs/"

install: $(STAMP)

$(LEAST): $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer, please: make PYTHON=...")'
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch (the large one: minutes on a slow line)"
	@$(TORCH)
	@echo "Installing what training needs: locked/train.txt"
	@$(HASHED) -r locked/train.txt
	@! $(PIP) check | grep '^torch .* requires' >/dev/null || { echo "Installing what this build of torch asks for"; $(CUDA); }
	@echo "Installing ringflash, editable"
	@$(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@

$(STAMP): $(LEAST)
	@echo "Installing what tests and integrations need: locked/all.txt"
	@$(HASHED) -r locked/all.txt
	@touch $@

# Threads of one training process: the machine's cores shared out, at least 1, at most 8 (the model is small).
train: export OMP_NUM_THREADS ?= $(shell threads=$$(( $$(getconf _NPROCESSORS_ONLN) / $(PROCESSES) )); \
	echo $$(( threads < 1 ? 1 : threads > 8 ? 8 : threads )))
train: $(LEAST)
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) launch/train.py --check --out runs/first $(ARGS)

# Two processes, one thread each. Triton decides at its import whether kernels are interpreted, so those tests have a process of their own. There ARGS may
# well select nothing (pytest's exit status 5).
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels $(ARGS) || test $$? -eq 5

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

# Random programs of public calls, and then thousands of steps that must leave nothing behind: MINUTES each, by hand.
MINUTES ?= 30
soak: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m soak.fuzz --doors
	PYTHONPATH=tests $(BIN)/python -m soak.fuzz --minutes $(MINUTES)
	PYTHONPATH=tests $(BIN)/python -m soak.soak --minutes $(MINUTES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
