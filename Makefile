# make test, make demo: both work on a fresh machine with Python 3.11 or newer and pip.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO ?= demo

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-requirements

.PHONY: help install test demo bench lint parity-lavis clean

help:
	@echo "make install  virtual environment in $(VENV) with everything needed"
	@echo "make test     all tests"
	@echo "make demo     train, generate and score the tiny model; prints where the report is"
	@echo "make bench    measure the published way of computing against ours; PRESET=tiny, mid or 7b"
	@echo "make lint     ruff and mypy"
	@echo "make parity-lavis  a second environment with LAVIS, compared with our vision parts"
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

PRESET ?= mid

bench: install
	$(BIN)/python benchmarks/run.py --preset $(PRESET)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

LAVIS_VENV ?= .venv-lavis
LAVIS_OUT ?= outputs/parity-lavis
SEED ?= 0

$(LAVIS_VENV)/.installed: requirements-lavis.txt
	@test -x $(LAVIS_VENV)/bin/python || $(PYTHON) -m venv $(LAVIS_VENV)
	$(LAVIS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-lavis.txt
	$(LAVIS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps salesforce-lavis==1.0.2
	@touch $@

parity-lavis: install $(LAVIS_VENV)/.installed
	$(LAVIS_VENV)/bin/python -W ignore tests/parity/lavis_witness.py $(LAVIS_OUT) --seed $(SEED)
	for size in $(LAVIS_OUT)/*; do $(BIN)/python -m tests.parity $$size || exit 1; done

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache $(DEMO)
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
