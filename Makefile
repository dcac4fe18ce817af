# make train: set up and train on the embedded digits.   make test: set up and run the test suite.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup train test test-system test-lowest check format lint types contracts bench bench-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make train   train a gated network on handwritten digits (ten seconds, after a minute or two of set-up)"
	@echo "make test    run the default test suite; make test-system: Slurm, engines, processes killed, stopped, lost (CI runs both)"
	@echo "make test-lowest  the default suite with the oldest versions that pyproject.toml allows"
	@echo "make check   format, lint, types, import contracts, tests"
	@echo "make bench   the CPU benchmarks in one table (20 minutes at most); make bench-gpu: those for one GPU"

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

# accelerate launch, without its other commands, whose imports (timm, transformers) take three seconds of the start.
train: $(STAMP)
	$(BIN)/python -m accelerate.commands.launch --quiet --config_file launch/cpu.yaml greenprune/train.py --config configs/digits.yaml

# One thread: the networks of the tests are too small for more, and waiting threads stall on shared cores (docs/log.md).
# Files side by side, one a core up to four: most of the time goes into starting processes.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# What starts many processes: Slurm, every launch file and engine, kills. It needs tests/slurm/install-slurm.sh.
test-system: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'system and not slow' -n auto --maxprocesses 4 --dist loadfile

# The default tests with the oldest versions that pyproject.toml allows; PYTHON=python3.10 for the oldest Python too. What
# PyTorch 2.11 calls deprecated in itself is no error there.
test-lowest: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) build/lowest
	VIRTUAL_ENV=build/lowest $(BIN)/uv pip install --quiet --resolution lowest-direct --requirement pyproject.toml --extra dev
	VIRTUAL_ENV=build/lowest $(BIN)/uv pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -W default::DeprecationWarning

check: format-check lint types contracts test

.PHONY: format-check
format-check: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

# One thread, for the same reason. Peers are installed below build/peers the first time.
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/bench.py --device gpu

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
