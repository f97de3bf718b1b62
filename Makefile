# make setup | demo | test | lint | bench | bench-gpu: each sets up what it needs first, and is quick when run again.
# make sanitize | verify-neon | verify-gpu: what is too slow for `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test lint bench sanitize verify-neon verify-gpu bench-gpu clean

setup: $(STAMP)

# torch is pinned: committed results and the reports of compiled code are of this version. README says how to get it
# without the CUDA that PyPI's brings for x86-64.
$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0 numpy setuptools wheel ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/rtl run digits

test: setup
	$(BIN)/python -m pytest

# What can be verified of the CUDA kernels without a GPU; goes on where it was, keeps what passed.
verify-gpu: setup
	$(BIN)/python -m benchmarks.gpu_verify --minutes 20

# For the owner of a GPU, after `pytest -m gpu`: speed against peers, to benchmarks/results/gpu_measured.json.
bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu_bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Less than everything there is to measure, in less than ten minutes.
bench: setup
	$(BIN)/python -m benchmarks --reduced

# tests/cpu/check.py: the CPU kernels against naive loops.
sanitize: setup
	$(BIN)/python tests/cpu/check.py sanitize

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
verify-neon: setup
	$(BIN)/python tests/cpu/check.py neon

clean:
	rm -rf $(VENV) build dist *.egg-info
