# Two commands do everything on a fresh machine: `make demo` and `make test`. Both run `make install` first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-fast slurm-up slurm-down lint clean
help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(STAMP)  ## set up .venv with pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version 2>&1); use make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv \
	    && $(PYTHON) -m venv --clear $(VENV); } || \
	  { echo "cannot make a virtual environment; install the package python3-venv"; exit 2; }
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,mpi,test,dev,bench]'
	@touch $@

demo: install    ## the main job end to end, about 5 minutes on 2 cores of any kind
	$(BIN)/hpc-ddpm demo

TWO_AT_ONCE := -n 2 --dist loadfile
test: install    ## lint, types, layers and every test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@failed=; \
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m "not slurm" || failed="the tests without SLURM"; \
	$(BIN)/python -m pytest -m slurm || failed="$${failed:+$$failed and }the tests on SLURM"; \
	test -z "$$failed" || { echo "make test: $$failed failed; each part's own summary is above"; exit 1; }

test-fast: install  ## tests without the marked ones, under two minutes
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m "not slow and not mpi and not slurm and not gpu"

slurm-up: install  ## a real SLURM cluster on this machine (docs/cluster.md)
	slurm/devcluster/up.sh

slurm-down:      ## stop it and remove its folder
	slurm/devcluster/down.sh

clean:           ## remove what was set up and generated
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
