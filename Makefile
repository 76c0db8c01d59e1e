# Every command makes the virtual environment that it needs; `make help` lists the commands.
#   PYTHON  the interpreter, 3.11 or newer:    make demo PYTHON=python3.13
#   TORCH   what pip installs first, before the package. The tests ran with the CPU build of the version in
#           constraints.txt; choose another:   make demo TORCH="torch --index-url ..."
PYTHON = python3
TORCH = torch

VENV = .venv
BIN = $(VENV)/bin
WHEEL_VENV = .venv-wheel
WHEEL_BIN = $(CURDIR)/$(WHEEL_VENV)/bin
PIP_INSTALL = -m pip --disable-pip-version-check install --constraint constraints.txt
# Scripts are not typed as strictly as the package: what is checked are names, attributes and calls.
SCRIPT_TYPES = --config-file= --ignore-missing-imports --check-untyped-defs --follow-imports=silent \
	--disable-error-code=arg-type --disable-error-code=assignment --disable-error-code=call-overload \
	--disable-error-code=misc --disable-error-code=operator --disable-error-code=union-attr \
	--disable-error-code=var-annotated
SITE_PACKAGES = import sysconfig; print(sysconfig.get_path("purelib"))

.DEFAULT_GOAL = help
.PHONY: help demo test lint types unit wheel format benchmarks clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## restore damaged digits with a posterior declared in Pyro
	$(BIN)/python -m smcdiff demo

test: lint types unit wheel  ## everything that CI runs: lint, types, unit, wheel

lint: $(VENV)/installed-test  ## ruff check and ruff format --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/installed-test  ## mypy, strict on the package, on benchmarks and training less so
	$(BIN)/mypy
	for folder in benchmarks training; do MYPYPATH=$$folder $(BIN)/mypy $(SCRIPT_TYPES) $$folder/*.py || exit 1; done

unit: $(VENV)/installed-test  ## pytest on all cores (for one file: .venv/bin/python -m pytest tests/...)
	$(BIN)/python -m pytest -n auto --maxprocesses 8

# The second environment borrows every package of the first but smcdiff, and the tests run outside the checkout.
wheel: $(VENV)/installed-test  ## build the wheel, install it elsewhere and run the smoke tests on it
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_BIN)/python $(PIP_INSTALL) --no-deps dist/*.whl
	$(BIN)/python -c '$(SITE_PACKAGES)' > "$$($(WHEEL_BIN)/python -c '$(SITE_PACKAGES)')/borrowed.pth"
	cd "$$(mktemp -d)" && $(WHEEL_BIN)/python -m pytest "$(CURDIR)/tests" -m smoke -o pythonpath=

format: $(VENV)/installed-test  ## let ruff repair and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

benchmarks: $(VENV)/installed-test  ## print the table of every file in benchmarks/
	@set -e; for file in $(wildcard benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file; done

clean:  ## remove environments, builds and caches
	rm -rf $(VENV) $(WHEEL_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("smcdiff needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || (rm -rf $(VENV); exit 1)

$(VENV)/installed: pyproject.toml setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) $(TORCH)
	$(BIN)/python $(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python $(PIP_INSTALL) --editable '.[test]'
	touch $@
