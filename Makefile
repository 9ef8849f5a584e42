# Each target creates what it needs in .venv; the only set-up is python3 (3.10 or newer, with its venv module) and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo lint format clean

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

demo: .venv/.installed
	$(BIN)/erase-demo

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy prompts erase eval

format: .venv/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $@
