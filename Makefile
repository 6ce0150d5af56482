# `make quickstart` and `make test` do all the set-up that they need; everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := .venv-lowest

.PHONY: help quickstart figures test test-slow test-lowest lint bench notebooks clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

quickstart: $(READY)  ## Fine-tune the embedded demo by plain LoRA, MAP and SVI, and compare them (no network)
	$(BIN)/bayeslora compare --base demo --task demo --backends mle,map,svi --seeds 0 --train-size 400 --split test \
		--set epochs=10 --set batch_size=16 --output runs/quickstart

figures: quickstart  ## Make the README's picture and table again
	mkdir -p docs/images
	cp runs/quickstart/report/reliability.png docs/images/reliability.png
	@cat runs/quickstart/report/study.md

test: $(READY)  ## Run the tests (slow ones left out)
	$(BIN)/python -m pytest -n 2

test-slow: $(READY)  ## Run the slow tests
	$(BIN)/python -m pytest -n 2 -m slow

test-lowest:  ## Run the tests with the lowest versions that are allowed; PYTHON=python3.10 for the oldest Python
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip uv
	$(LOWEST)/bin/uv pip compile --quiet pyproject.toml --extra dev --python $(LOWEST)/bin/python --resolution lowest-direct --output-file $(LOWEST)/versions.txt
	$(LOWEST)/bin/pip install --quiet --requirement $(LOWEST)/versions.txt
	$(LOWEST)/bin/pip install --quiet --no-deps --editable .
	$(LOWEST)/bin/python -m pytest -n 2

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## Measure speed and memory against PEFT LoRA and PEFT MonteCLoRA
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/speed.py --families --no-memory

notebooks: $(READY)  ## Execute the notebooks
	$(BIN)/python scripts/run_notebooks.py

clean:  ## Remove the environment and build products
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info
