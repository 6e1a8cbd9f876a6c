# Two commands set everything up by themselves: `make test` and `make demo`.

VENV ?= .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install lint types docs test demo demo-elastic soak bench clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## Make the virtual environment and install what is needed

# torch first, by itself and under the constraints: pulled in by another package it would be another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,hf]'
	touch $@

lint: $(INSTALLED)  ## Lint and check the format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## Check the types of the package, strictly
	$(BIN)/mypy

# Fresh each time: what the commands and docstrings on its pages say is not among the files that Sphinx looks at.
docs: $(INSTALLED)  ## Build the documentation to site/; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -d build/doctrees docs site

test: lint types docs  ## Lint, types, documentation, and every test
	$(BIN)/python -m pytest

demo: $(INSTALLED)  ## Train, lose a worker, go on with 3, stop, resume on 1; draws demo.png
	$(BIN)/python examples/demo.py

demo-elastic: $(INSTALLED)  ## Machines come and go while a model trains; no step is lost; draws elastic.png
	$(BIN)/python examples/elastic.py

soak: $(INSTALLED)  ## The long forms of the fault tests: kill points, storage faults, damage, many ranks, random states (some 40 minutes)
	$(BIN)/python -m tests.soak.kill_points
	$(BIN)/python -m tests.soak.storage_faults
	$(BIN)/python -m tests.soak.damage
	$(BIN)/python -m tests.soak.many_ranks
	$(BIN)/python -m tests.soak.worlds

bench: $(INSTALLED) build/peers  ## Ours against the peers; writes benchmarks/results (PARTS="restore save" for some of it)
	$(BIN)/python -m benchmarks $(PARTS)

# Beside the environment and not in it: some of them want other versions of what it has.
build/peers: constraints.txt
	$(BIN)/pip install --quiet --target $@ s3fs==2026.9.0
	$(BIN)/pip install --quiet --no-deps --target $@ s3torchconnector s3torchconnectorclient torchsnapshot \
		tenacity aiofiles nest-asyncio zipp 'importlib-metadata<8.8'
	touch $@

clean:  ## Remove what the commands above made
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
