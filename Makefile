# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV_FLAGS ?=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# the root folder must stay off sys.path: `kernels` and `passes` are names of other packages too
export PYTHONSAFEPATH := 1

.PHONY: help setup demo test lint typed bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a small CNN on real digits, compress it, show what came of it"
	@echo "make test    run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make bench   run every benchmark case, quick versions"
	@echo "make setup   create .venv with everything the above need"
	@echo "make clean   remove .venv and build/"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) torch numpy
	$(BIN)/pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@.ci/browser
	touch $@

.venv/.bench-ready: .venv/.ready
	$(BIN)/pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[bench]'
	touch $@

demo: .venv/.ready
	@$(BIN)/python bench/demo.py

# one thread each: two workers that both use two threads get in each other's way
test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

lint: .venv/.ready typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typed: .venv/.ready
	@mkdir -p build/typed/compress && rm -f build/typed/compress/*
	@ln -s $(CURDIR)/compress/* $(CURDIR)/kernels $(CURDIR)/passes $(CURDIR)/exporters $(CURDIR)/cli.py build/typed/compress/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml

bench: .venv/.bench-ready
	$(BIN)/python bench/run.py --quick --jobs 2

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis
