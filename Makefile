# Each target creates what it needs in .venv; the only set-up is python3 (3.11 or newer, with its venv module) and make.
# VERSIONS names a file of tests/constraints: newest (what pip finds), oldest (setup.cfg's lower bounds), torch-2.14.
PYTHON ?= python3
VERSIONS := newest
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := tests/constraints/$(VERSIONS).txt
READY := $(VENV)/.installed-$(VERSIONS)
DOCS_READY := $(VENV)/.installed-docs
LINT := "$(BIN)/ruff" check && "$(BIN)/ruff" format --check && "$(BIN)/mypy"

# The four folders are one package, erase; setup.cfg maps them when it is installed. mypy and editors read sources through these links.
.links: setup.cfg $(wildcard erase)
	rm -rf .links
	mkdir -p .links/erase
	ln -s $(addprefix ../../,$(wildcard erase/*) prompts eval scripts) .links/erase

.PHONY: test demo lint format docs matrix clean

# Workers begin with half of the tests each, so that a file has its fixtures once; what they and the processes of tests compile, they keep.
# Lint runs beside them and is shown last and always: a complaint of ruff or mypy hides no test, a failing test no complaint.
test: $(READY) .links
	@failed=0; \
	{ $(LINT); } > "$(VENV)/lint.txt" 2>&1 & \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n 2 --dist worksteal || failed=1; \
	wait $$! || failed=1; \
	cat "$(VENV)/lint.txt"; \
	exit $$failed

demo: $(READY)
	"$(BIN)/erase-demo"

lint: $(READY) .links
	$(LINT)

format: $(READY)
	"$(BIN)/ruff" check --fix
	"$(BIN)/ruff" format

# site/index.html; the search of the site wants a server: python3 -m http.server -d site
docs: $(DOCS_READY) .links
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --strict

matrix:
	$(MAKE) demo test VERSIONS=oldest
	$(MAKE) demo test VERSIONS=torch-2.14
	$(MAKE) demo test VERSIONS=newest

clean:
	rm -rf "$(VENV)" .links site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made from nothing whenever what is installed would change; with it goes the mark of any other set of versions.
$(READY): setup.cfg pyproject.toml tests/constraints/tools.txt $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" \
	% sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear "$(VENV)"
	"$(BIN)/python" -m pip install --disable-pip-version-check -e '.[dev]' -c $(CONSTRAINTS)
	touch "$(READY)"

$(DOCS_READY): $(READY)
	"$(BIN)/python" -m pip install --disable-pip-version-check -e '.[docs]' -c $(CONSTRAINTS)
	touch "$(DOCS_READY)"
