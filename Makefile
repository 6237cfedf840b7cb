# `make train` and `make test` do all the set-up: they need Python 3.10 or later, make and a compiler.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test docs versions lint typecheck format wheel clean

train: .venv/installed
	$(BIN)/revlib train

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal

docs: .venv/installed-docs # the site, in build/site
	$(BIN)/mkdocs build --strict --quiet

versions: # the tests in fresh environments: on the minimums of pyproject.toml, and on the newest releases; gigabytes
	.ci/versions "$(PYTHON)"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/house && mkdir -p build/house && cp -r lightning_revlib build/house
	cp -r recipes conf build/house/lightning_revlib  # as they are installed, for the layers to be seen
	cd build/house && ../../$(BIN)/lint-imports --no-logo ../../pyproject.toml
	$(BIN)/python -m pytest --quiet tests/test_house.py  # private names of torch stand in one file

typecheck: .venv/installed-test
	$(BIN)/mypy

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/installed-test
	rm -rf build dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Stamps, so that a second `make` installs nothing.
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) --editable '.[test]'
	touch $@

.venv/installed-docs: .venv/installed
	$(INSTALL) --editable '.[docs]'
	touch $@
