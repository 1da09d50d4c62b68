# Paths are relative, so that a directory with a space in its name works.
PYTHON ?= python3
BIN := .venv/bin
ARCHITECTURES := $(notdir $(patsubst %/__init__.py,%,$(wildcard models/*/__init__.py)))

.PHONY: help setup setup-test demo test campaign check format bench clean

help:
	@echo "make setup   make .venv and install everything into it"
	@echo "make demo    fetch SmolLM2-135M, quantize it, and compare it with the float model (some minutes)"
	@echo "make test    run the tests"
	@echo "make campaign TRIES=10000 SEED=0   damage outputs, sources, files, flags and calls of ops (half an hour)"
	@echo "make check   lint, and check that the code can be bundled"
	@echo "make bench   time ops and models on this machine"

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

setup-test: .venv/.installed-test

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup-test
	smollm2="$$($(BIN)/python examples/fetch_smollm2.py)" && OCTAVO_SMOLLM2="$$smollm2" $(BIN)/python -m pytest -q

TRIES ?= 10000
SEED ?= 0
campaign: setup-test
	$(BIN)/python -m tests.campaign --tries $(TRIES) --seed $(SEED)

check: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for arch in $(ARCHITECTURES); do $(BIN)/python -m octavo.common.bundle --arch $$arch --out .cache/bundle || exit 1; done

format: setup-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/run.py --device cpu

clean:
	rm -rf .venv .cache
