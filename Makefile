# make test, make demo: both work on a fresh machine with Python 3.11 or newer and pip.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO ?= demo

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-requirements

# More threads than cores slow the small models down; the workers share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help install test demo lint clean

help:
	@echo "make install  virtual environment in $(VENV) with everything needed"
	@echo "make test     all tests"
	@echo "make demo     train, generate and score the tiny model; prints where the report is"
	@echo "make lint     ruff and mypy"
	@echo "make clean    remove caches and the demo's files"
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=path the environment"

install: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, $(PYTHON) is not; try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(STAMP)

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

demo: install
	$(BIN)/python examples/demo.py --out $(DEMO)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache $(DEMO)
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
