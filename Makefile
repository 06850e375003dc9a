# `make setup` needs Python 3.11 or later and touches nothing outside this folder.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train test check clean

setup: .venv/.done

.venv/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "oasis_jax needs Python 3.11 or later; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

train: setup  ## OASIS on the Python standard library's source, a few minutes on two cores
	$(BIN)/python -m train pretrain --out runs/first

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy oasis_jax train

test: setup check
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

clean:
	rm -rf .venv build *.egg-info
