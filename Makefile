# make demo    the main job, end to end, on a real model and real tasks; another recipe with
#              RECIPE=instruction and the like, from a folder of JSONL files with DATA_DIR=...
# make test    all tests
# make test-deepspeed   those under DeepSpeed, which it installs into .venv
# make test-fast   those to run while editing: all but the ones that are marked slow
# make check   lint, format and types
# make docs    the pages of docs/, into site/
# make wheel-check   the wheel, installed with its declared dependencies alone
# make test-versions   the core tests on the oldest and on the newest dependencies, which are in
#                      tests/versions/; test-oldest and test-newest run one of them
#
# Each sets up a virtual environment in .venv (.venv-oldest, .venv-newest, .venv-wheel) first. On Linux without a
# GPU, a CPU build of torch saves gigabytes:
# make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" demo
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-versions

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Such as --no-compile. wheel-check, which turns warnings of the compiler into errors, leaves them out.
PIP_FLAGS ?=
VENV ?= .venv
BIN := $(VENV)/bin

# glibc gives freed memory back to the kernel and takes it again at every step; on a CPU that makes
# training several times slower.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000

# Tests run side by side, one thread each: threads of NumPy that wait for each other take their time.
test test-fast test-oldest test-newest: export OMP_NUM_THREADS := 1

# Scopes in the order of tests/conftest.py, the longest first.
PARALLEL := --numprocesses auto --dist loadscope --no-loadscope-reorder

# What touches Trainer, PEFT or autograd. Where runs are killed matters to files, how much memory is
# predicted to PyTorch, and estimates to NumPy alone: none depends on versions of those. Of two
# processes one run is enough, which selects what one process does. Options, repeated runs and changed
# resumed runs go through what is here.
CORE_TESTS ?= --deselect tests/test_resume.py::TestKills --deselect tests/test_resume.py::TestResumption \
	$(addprefix --deselect tests/test_callback.py::Test,Preview Options MeetingTheTrainer) \
	$(addprefix tests/,test_versions.py test_callback.py test_resume.py trainer/test_batches.py \
	'test_launch.py::test_they_run_on_a_cpu[two_cpu_processes.yaml-False]' trainer/test_privates.py \
	capture/test_examples.py capture/test_adapters.py capture/test_heads.py)

.PHONY: demo test test-fast test-deepspeed check docs wheel-check clean test-versions test-oldest test-newest

RECIPE ?= demo
CONFIG := $(wildcard recipes/configs/$(RECIPE)_cpu.yaml)

demo: $(VENV)/.installed
	$(BIN)/python -m recipes.$(RECIPE) $(addprefix --config ,$(CONFIG)) $(addprefix --data_dir ,$(DATA_DIR))

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# On a machine with a GPU, too, DeepSpeed is tested on the CPU.
test-deepspeed: export DS_ACCELERATOR := cpu
test-deepspeed: $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[test,deepspeed]'
	$(BIN)/python -m pytest -m deepspeed

test-versions: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest $(PARALLEL) $(CORE_TESTS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

# A new environment with the declared dependencies, so that a missing one is noticed; importing every
# public name needs them. pip takes the wheels that .venv was made of from its cache. Python starts
# outside the repository, whose own hf_auxselect would be imported instead.
wheel-check: $(VENV)/.installed
	rm -rf .venv-wheel build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet $(TORCH)
	.venv-wheel/bin/python -m pip install --quiet build/wheel/hf_auxselect-*.whl
	cd build/wheel && env -u PYTHONPATH ../../.venv-wheel/bin/python -W error::SyntaxWarning -c \
		"import hf_auxselect as h; [getattr(h, name) for name in h.__all__]"
	cd build/wheel && env -u PYTHONPATH ../../.venv-wheel/bin/hf-auxselect --help

# Only what builds the pages: they are made from the sources, without importing the package.
docs: .venv-docs/.installed
	.venv-docs/bin/python docs/tables.py --check
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet $(PIP_FLAGS) --upgrade 'pip>=25.1'
	.venv-docs/bin/python -m pip install --quiet $(PIP_FLAGS) --group docs
	touch $@

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) $(TORCH)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[dev]'
	touch $@

# PIP_CONSTRAINT takes the place of a constraint in pip's own configuration.
.venv-oldest/.installed .venv-newest/.installed: .venv-%/.installed: tests/versions/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(PIP_FLAGS) --upgrade pip
	PIP_CONSTRAINT=$< .venv-$*/bin/python -m pip install --quiet $(PIP_FLAGS) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-docs .venv-wheel site outputs build dist .mypy_cache \
		.ruff_cache .pytest_cache .hypothesis
