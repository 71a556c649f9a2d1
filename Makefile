# make demo    the main job, end to end, on a real model and real tasks
# make test    all tests
# make check   lint, format and types
# make test-versions   the core tests on the oldest and on the newest dependencies, which are in
#                      tests/versions/; test-oldest and test-newest run one of them
#
# Each sets up a virtual environment in .venv (.venv-oldest, .venv-newest) first. On Linux without a
# GPU, a CPU build of torch saves gigabytes:
# make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" demo
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-versions

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# glibc gives freed memory back to the kernel and takes it again at every step; on a CPU that makes
# training several times slower.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000

# Where runs are killed matters to files, and not to versions.
CORE_TESTS ?= --deselect tests/test_resume.py::TestKills $(addprefix tests/,test_versions.py \
	test_callback.py test_tasks.py test_resume.py test_launch.py trainer/test_batches.py \
	trainer/test_options.py capture/test_examples.py capture/test_adapters.py \
	estimators/test_estimators.py)

.PHONY: demo test check clean test-versions test-oldest test-newest

demo: $(VENV)/.installed
	$(BIN)/python recipes/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope

test-versions: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest --numprocesses auto --dist loadscope $(CORE_TESTS)

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

# PIP_CONSTRAINT takes the place of a constraint in pip's own configuration.
.venv-oldest/.installed .venv-newest/.installed: .venv-%/.installed: tests/versions/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	PIP_CONSTRAINT=$< .venv-$*/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest outputs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
