# make demo    the main job, end to end, on a real model and real tasks
# make test    all tests
# make check   lint, format and types
#
# Each sets up a virtual environment in .venv first. On Linux without a GPU, a CPU build of torch
# saves gigabytes: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" demo

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# glibc gives freed memory back to the kernel and takes it again at every step; on a CPU that makes
# training several times slower.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(BIN)/python recipes/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
