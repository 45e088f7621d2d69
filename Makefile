# The commands that a contributor needs; CONTRIBUTING.md says more.
PYTHON ?= .venv/bin/python

.PHONY: install test lint types docs

install:
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[test]'

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m pytest -n 0 tests/test_quality.py -k mypy

docs:
	$(PYTHON) -m mkdocs build --strict --site-dir build/docs
