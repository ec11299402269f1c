# make demo | test | check | bench; each first makes .venv, and again only when pyproject.toml or constraints.txt changed.
# Settings of the demo: BUDGET=0.33 BASELINE=drop SEED=1 OUT=folder STEPS=300. Another interpreter: make PYTHON=python3.12.
PYTHON ?= python3
JOBS ?= 2
export OUT BUDGET BASELINE SEED STEPS

VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed
DEMO := $(VENV)/.demo

.PHONY: help install demo test check format bench clean

help:
	@echo "make demo    compress a real model (BUDGET=0.33, BASELINE=drop, SEED=1, OUT=folder, STEPS=300)"
	@echo "make test    all tests"
	@echo "make check   lint, format and types"
	@echo "make format  let ruff mend what it can"
	@echo "make bench   the demo at both budgets, each beside its layer-drop baseline"

install: $(INSTALLED)

demo: $(DEMO)
	$(RUN) layershare demo $${BUDGET:+--budget "$$BUDGET"} $${BASELINE:+--baseline "$$BASELINE"} \
		$${SEED:+--seed "$$SEED"} $${STEPS:+--steps "$$STEPS"} $${OUT:+-o "$$OUT"}

test: $(DEMO)
	$(RUN) pytest -n $(JOBS) $(ARGS)

check: $(INSTALLED)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

format: $(INSTALLED)
	$(RUN) ruff check --fix
	$(RUN) ruff format

bench: $(DEMO)
	$(RUN) layershare demo --budget 0.5 --baseline drop
	$(RUN) layershare demo --budget 0.33 --baseline drop

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
		"layershare needs Python 3.11 or newer as $(PYTHON). Name another one: make PYTHON=python3.12"; exit 1; }
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo >&2 \
		"$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(DEMO): demo-requirements.txt $(INSTALLED)
	$(RUN) pip install --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r demo-requirements.txt
	@touch $@
