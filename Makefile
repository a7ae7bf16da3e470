# make setup     a virtual environment in .venv, every version pinned (constraints.txt)
# make test      lint, format check and all tests
# make test-tpu  compile for TPUs, without one: installs their compiler, takes minutes
# make test-restarts  stop runs at random moments, by signals; takes minutes
# make uptrain   the paper's recipe in miniature: pre-train, convert, uptrain, report
#
# ENGINE=lite (default) installs the stand-in t5x_lite, ENGINE=t5x Google's T5X from
# GitHub, or from local folders: make setup ENGINE=t5x T5X_DIR=... AIRIO_DIR=...
# JESTIMATOR_DIR=... (all three). Either replaces the other.

PYTHON ?= python3
# What is installed stays until ENGINE is given.
ENGINE ?= $(if $(wildcard .venv/engine-t5x),t5x,lite)
BIN := .venv/bin
# Errors alone are shown; compiling all packages at once uses all cores.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
STAMP := .venv/engine-$(ENGINE)

ifneq ($(filter $(ENGINE),lite t5x),$(ENGINE))
  $(error ENGINE=$(ENGINE) is unknown; choose lite or t5x)
endif

.PHONY: setup test test-tpu test-restarts lint uptrain clean

setup: $(STAMP)

.venv/packages: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 12) or sys.exit("Python 3.11 or 3.12 is needed, and $(PYTHON) is %d.%d; run make setup PYTHON=python3.11" % v)'
	@echo 'Installing into .venv (a minute or two) ...'
	@$(PYTHON) -m venv .venv
	@$(PIP) --constraint constraints.txt --editable '.[train,t5x,test]'
	@$(PIP) --constraint constraints.txt --no-deps t5  # It would bring nightlies.
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # Some files are of Python 2.
	@touch $@

.venv/engine-lite: .venv/packages t5x_lite/setup.py
	@$(PIP) --no-deps --editable ./t5x_lite
	@rm -f .venv/engine-* && touch $@

.venv/engine-t5x: .venv/packages requirements-t5x.txt
	@$(PIP) --no-deps --force-reinstall $(if $(T5X_DIR),$(T5X_DIR) $(AIRIO_DIR) $(JESTIMATOR_DIR),--requirement requirements-t5x.txt)
	@rm -f .venv/engine-* && touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: setup lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

.venv/tpu: .venv/packages
	@$(PIP) --constraint constraints.txt 'jax[tpu]'
	@touch $@

test-tpu: setup .venv/tpu
	$(BIN)/python -m pytest -m tpu

test-restarts: setup
	$(BIN)/python -m pytest -m restarts

uptrain: setup
	$(BIN)/python -m gqa_t5x.reproduce run uptrain

clean:
	rm -rf .venv
