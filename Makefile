# Two commands on a fresh machine: `make compare` and `make test`. Both create .venv where it is missing.

PYTHON ?= python3
# The release that CI uses; any torch >= 2.10 works. On Linux this is the CUDA build unless pip is told otherwise.
TORCH ?= torch==2.13.0
# For builds of torch that bring no triton of their own.
TRITON ?= triton==3.9.0; sys_platform == 'linux'
# Everything else is what these tests last passed with; `make test CONSTRAINTS=` takes what pip finds.
CONSTRAINTS ?= $(shell ls constraints/transformers-*.txt | sort -V | tail -n 1)
BIN := .venv/bin

.PHONY: compare test lint test-versions test-ci-versions test-latest families test-gpu bench-gpu docs clean

# torch is left out of the constraints, so that one that is there already, or TORCH, stays.
.venv/.installed: setup.py pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TRITON)"
	cat /dev/null $(CONSTRAINTS) | sed '/^torch==/d' > .venv/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint .venv/constraints.txt --editable '.[dev,report]'
	touch $@

# Freed memory stays with the process: else page faults are timed, in whichever path follows a large mask.
compare: export MALLOC_TRIM_THRESHOLD_ = 8589934592
compare: export MALLOC_MMAP_THRESHOLD_ = 33554432
compare: .venv/.installed  ## every attention path side by side, on the CPU, with a small checkpoint
	mkdir -p results
	$(BIN)/varlen-vision compare --device cpu --repeats 45 --json results/compare.json --markdown results/compare.md --report results/report

test: lint  ## ruff, mypy, pytest with the newest transformers in constraints/
	$(BIN)/python -m pytest --numprocesses auto

test-versions: .venv/.installed  ## pytest with every release of transformers in constraints/
	$(BIN)/nox

test-ci-versions: .venv/.installed  ## the oldest of them and one from the middle, in part, as CI does after `make test`
	$(BIN)/nox --session ci

test-latest: .venv/.installed  ## pytest with the newest of everything but torch, which may fail without a change here
	$(BIN)/nox --session latest

families: .venv/.installed  ## docs/families.md: every family tried with every release in constraints/
	$(BIN)/nox --session families
	$(BIN)/python -m varlen_vision.testing.coverage write docs/families docs/families.md

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs in the Python at hand, since a GPU machine brings its own torch.
test-gpu:  ## kernels and towers on a CUDA GPU
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m pytest tests/gpu -m gpu

# BENCH takes options: make bench-gpu BENCH='--no-towers --training --first-token --cold-start --window'
bench-gpu:  ## the fast tower of Qwen2.5-VL on a CUDA GPU against its floor and the alternatives, in parity first
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) scripts/bench_gpu.py --json results/bench.json $(or $(BENCH),--tower qwen2_5_vl --window)

# The notice is of the end of mkdocs-material's support in 2027, and no warning of the build.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/.installed  ## the documentation as a site, in site/index.html; any warning is an error
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .nox build dist results site *.egg-info .pytest_cache .mypy_cache .ruff_cache
