# `make demo` and `make test` need Python 3.11 or newer, git and make; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: demo test test-slow check ui up down status clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, then take the sample images to a registered prompt (dvc repro)"
	@echo "make test       set up, then lint, type-check and run the tests"
	@echo "make test-slow  the end-to-end checks, some minutes"
	@echo "make ui         MLflow's pages on http://127.0.0.1:5000"
	@echo "make up         Prefect, MLflow and the workers on this machine; again repairs what is missing"
	@echo "make status     how they are"
	@echo "make down       end them all"
	@echo "make clean      remove derived files; data sources and MLflow's records stay"

demo: $(VENV)/ready
	dvc repro

test: check
	pytest -n auto --dist loadfile

test-slow: $(VENV)/ready
	pytest -m slow -n 2 --dist loadfile

check: $(VENV)/ready
	ruff check .
	mypy

ui: $(VENV)/ready
	coop ui

up: $(VENV)/ready
	coop up

down: $(VENV)/ready
	coop down

status: $(VENV)/ready
	@coop status

clean:
	rm -rf artifacts .cache

# torch comes through pip, which knows this machine's wheels and indexes; the rest through uv, which is fast.
# The pins name no build, so a CPU machine and a CUDA machine each keep the torch that fits them.
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
