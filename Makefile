# The Python that .venv is made with, 3.10 or later: make install PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test faults check format bench bits

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create .venv and install what constraints.txt pins (skipped when up to date)

# Setuptools comes first, and the build uses it: an isolated build would fetch one that nothing pins.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: Colonnade needs Python 3.10 or later, and '$(PYTHON)' is $$({ $(PYTHON) -V; } 2>/dev/null || echo missing): make install PYTHON=/path/to/python3.10" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

SAMPLE := data/sample
QUICKSTART := runs/quickstart

quickstart: install ## train the tiny preset on two CPU processes and generate a continuation
	$(BIN)/python -m colonnade.data.sample_corpus --output $(SAMPLE)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=2 training.py --preset tiny \
	  --data-glob '$(SAMPLE)/train-*.parquet' --validation-glob '$(SAMPLE)/validation-*.parquet' \
	  --tokenizer-path $(SAMPLE)/tokenizer --checkpoint-dir $(QUICKSTART)
	$(BIN)/python generate.py --checkpoint-path $(QUICKSTART) --prompt 'def ' --max-new-tokens 80

# Most tests wait for ranks that start or for each other: two at a time take half the time on two cores.
TEST_PROCESSES := 2

test: install ## run the tests
	$(BIN)/python -m pytest -q -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

faults: install ## run every fault of docs/reliability.md, those that take minutes too
	$(BIN)/python -m pytest -q tests/faults tests/test_checkpoint_safety.py tests/distributed/test_elastic.py \
	  tests/distributed/test_one_run.py tests/distributed/test_run.py tests/distributed/test_tracked_run.py \
	  tests/distributed/test_evaluate.py

check: install ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install ## put the code into the common format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bits: install ## train a short reference run at tp 1, 2, 4 and dp 2 and print its fingerprint at each: all the same
	$(BIN)/python check_bits.py --data $(SAMPLE) --output runs/bits

bench: install ## run every benchmark that needs no GPU
	@set -e; for benchmark in $(filter-out benchmarks/gpu_step.py benchmarks/flag_checks.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$benchmark"; $(BIN)/python "$$benchmark"; done
