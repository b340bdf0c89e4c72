# First thing to type: `make demo` or `make test`. Both make .venv once, then only run.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
BASE ?=

# Written only after an install that succeeded, so a failed one is taken up again. What the tests and
# benchmarks need comes with the first of them: triton alone is 200 MB that a demo can do without.
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
BIN := $(VENV)/bin
comma := ,

CHECK := import sys; sys.version_info >= (3, 10) or sys.exit("g2rpo needs Python 3.10 or newer, \
not $(PYTHON) " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")
# Python 3.10 is too old for a quarter of the pinned releases: there pip chooses.
CONSTRAINT := import sys; print("--constraint constraints.txt" * (sys.version_info >= (3, 11)))

# pip hides what the build said: show what it left out.
LEFT_OUT := import json; [print("g2rpo: built without", part["what"] + ":", part["why"]) \
for part in json.load(open("g2rpo_kernels/_build.json"))["left_out"]]

# pip need not compile 14,000 files of which a third is ever imported (32 s of a 46 s install):
# Python writes the bytecode of what it imports, if the user's shell does not forbid it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow bench bench-flux bench-compare bench-instructions gpu-check dist
.PHONY: constraints clean

help:
	@echo "make demo         train the digits model with G2RPO (ARGS='--key value' are passed on)"
	@echo "make test         run the tests (ARGS='-k name' are passed to pytest, WORKERS=$(WORKERS)); those that"
	@echo "                  look at pages in a browser are skipped without one: apt-get install chromium"
	@echo "make test-slow    run the tests that take minutes: twenty kills, the FLUX example"
	@echo "make bench        measure the ops on this machine (ARGS are passed to benchmarks/run.py)"
	@echo "make bench-flux   measure ceilings, FLUX's blocks, forward and update, the optimizer's step and the"
	@echo "                  published loop on a GPU (ARGS='--size toy': anywhere)"
	@echo "make bench-compare BASE=REF: time the ops of a commit and of the working tree in turns; an"
	@echo "                  error if one got slower (ARGS: of benchmarks/compare_versions.py)"
	@echo "make bench-instructions: count the instructions of the native CPU ops anew, with valgrind,"
	@echo "                  into benchmarks/instructions/ (ARGS=--check: compare with those there)"
	@echo "make gpu-check    test and measure on a GPU with PYTHON=$(PYTHON) and the torch it has"
	@echo "                  (ARGS='--only PART', of build tests ceilings ops flux-blocks flux-forward"
	@echo "                  optimizer flux-update reference)"
	@echo "make dist         build the sdist and the wheel into dist/"
	@echo "make constraints  resolve the pins of constraints.txt anew"
	@echo "make clean        remove $(VENV) and everything built; training runs stay"
	@echo
	@echo "The first of them creates $(VENV) with PYTHON=$(PYTHON) and installs into it; to change"
	@echo "the interpreter later, make clean first or name another folder with VENV=."
	@echo "G2RPO_BUILD=cpu leaves the CUDA part out of that, G2RPO_BUILD=off all native code."

demo: $(STAMP)
	$(BIN)/g2rpo train digits $(ARGS)

# Worksteal, because the slow tests stand together in one file. One thread a worker: two workers of
# two threads each would wait for one another on two cores.
test: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 $(ARGS)

# One after the other, so that what is timed or killed is alone.
test-slow: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s $(ARGS)

# Ends with a table; the numbers stay in benchmarks/results/.
bench: $(TEST_STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

# Of the ARGS that all take. Each is measured whatever became of those before it.
bench-flux: $(TEST_STAMP)
	failed=0; for name in ceilings blocks flux_forward adamw8bit flux_update reference; do \
	    $(BIN)/python benchmarks/bench_$$name.py $(ARGS) || failed=$$?; done; exit $$failed

# The working tree's extension is the one that lies there: made anew first if its sources changed.
bench-compare: $(TEST_STAMP)
	@test -n "$(BASE)" || { echo "make bench-compare: name a commit, as in BASE=main" >&2; exit 2; }
	$(BIN)/python benchmarks/compare_versions.py --base '$(BASE)' $(ARGS)

# Of the extension that lies there, by which tests/test_instruction_guard.py holds the next ones.
bench-instructions: $(TEST_STAMP)
	$(BIN)/python benchmarks/callgrind.py $(ARGS)

# Without the virtual environment: a machine with a GPU has its own build of torch.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

# The wheel is built from the sdist, so that leftovers in the working tree cannot get into it.
dist: $(TEST_STAMP)
	$(BIN)/python -m build --no-isolation

constraints: $(TEST_STAMP)
	$(BIN)/python .ci/constraints.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .benchmarks
	rm -f g2rpo_kernels/_C*.so g2rpo_kernels/_build.json
	find g2rpo g2rpo_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,EXTRAS,NAMES)
define install
	@$(PYTHON) -c '$(CHECK)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing g2rpo, $(2) and the rest of constraints.txt into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	    --editable '.[$(1)]' $$($(BIN)/python -c '$(CONSTRAINT)')
	@$(BIN)/python -c '$(LEFT_OUT)'
endef

$(STAMP): $(SOURCES)
	$(call install,train,torch$(comma) diffusers)
	@touch $@

$(TEST_STAMP): $(SOURCES)
	$(call install,train$(comma)test$(comma)bench,torch$(comma) diffusers$(comma) triton$(comma) pytest)
	@touch $(STAMP) $@
