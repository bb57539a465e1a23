# make demo     read the example collection, answer three questions about it, and one of them cold and warm
# make test     everything that CI checks
# make million  read the King James Bible, a million tokens, into pages of KV, and ask it three questions (hours on a CPU)
# All work in .venv/ (RAGKIT_VENV names another folder) and need only make and Python 3.11 or newer.

PYTHON ?= python3
RAGKIT_VENV ?= .venv
VENV := $(abspath $(RAGKIT_VENV))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

# A CPU build of torch brings no Triton, and the kernels' tests need one for its interpreter. A CUDA build brings its own.
TRITON := triton==3.9.0

.PHONY: demo million test lint format types wheel docs pytest clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/ragkit models pull
	RAGKIT=$(BIN)/ragkit PYTHON=$(BIN)/python sh examples/demo.sh

million: $(VENV)/.installed
	$(BIN)/ragkit models pull
	RAGKIT=$(BIN)/ragkit sh examples/million_tokens.sh

test: lint types wheel pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Over an unpacked wheel: mypy does not follow the mapping of the top-level folders into the package.
types: $(VENV)/.installed-dev
	$(BIN)/python .ci/check_wheel.py types

# The wheel holds every module, and its command runs from another folder.
wheel: $(VENV)/.installed-dev
	$(BIN)/python .ci/check_wheel.py install

# Writes what is generated; the tests fail where it is out of date.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/page_tables.py
	$(BIN)/python docs/draft_tables.py

# Last, so that its closing line ends the output. Small tensors are slower with threads that wait for each other.
pytest: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)
pytest: $(VENV)/.installed-dev
	$(BIN)/ragkit models pull
	$(BIN)/pytest

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("ragkit needs Python 3.11 or newer, got %d.%d; make PYTHON=python3.12 names another" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[cpu]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) show --quiet triton 2>/dev/null || $(PIP) install --quiet $(TRITON)
	$(INSTALL) --editable '.[cpu,dev]'
	touch $@
