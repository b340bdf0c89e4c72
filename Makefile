# First thing to type: `make demo` or `make test`. Both make .venv once, then only run.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

# Written only after an install that succeeded, so a failed one is taken up again.
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

CHECK := import sys; sys.version_info >= (3, 10) or sys.exit("g2rpo needs Python 3.10 or newer, \
not $(PYTHON) " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")
# Python 3.10 is too old for a quarter of the pinned releases: there pip chooses.
CONSTRAINT := import sys; print("--constraint constraints.txt" * (sys.version_info >= (3, 11)))

# pip need not compile 14,000 files of which a third is ever imported (32 s of a 46 s install):
# Python writes the bytecode of what it imports, if the user's shell does not forbid it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test dist constraints clean

help:
	@echo "make demo         train the digits model with G2RPO (ARGS='--key value' are passed on)"
	@echo "make test         run the tests (ARGS='-k name' are passed to pytest, WORKERS=$(WORKERS))"
	@echo "make dist         build the sdist and the wheel into dist/"
	@echo "make constraints  resolve the pins of constraints.txt anew"
	@echo "make clean        remove $(VENV) and everything built; training runs stay"
	@echo
	@echo "The first of them creates $(VENV) with PYTHON=$(PYTHON) and installs into it; to change"
	@echo "the interpreter later, make clean first or name another folder with VENV=."

demo: $(STAMP)
	$(BIN)/g2rpo train digits $(ARGS)

# Worksteal, because the slow tests stand together in one file. One thread a worker: two workers of
# two threads each would wait for one another on two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 $(ARGS)

# The wheel is built from the sdist, so that leftovers in the working tree cannot get into it.
dist: $(STAMP)
	$(BIN)/python -m build --no-isolation

constraints: $(STAMP)
	$(BIN)/python .ci/constraints.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .benchmarks
	find g2rpo g2rpo_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c '$(CHECK)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing g2rpo, torch, diffusers and the rest of constraints.txt into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	    --editable '.[train,test,bench]' $$($(BIN)/python -c '$(CONSTRAINT)')
	@touch $@
