# What a newcomer, an operator and CI do with this checkout. Each target is one program of scripts/.
#   PREFIX=/opt/casemate   where the product goes
#   BASE=main              the commit that make bench-compare compares this checkout with
#   ARGS=...               more arguments for pytest: make test ARGS="-m unit -k codec"

PREFIX ?= /opt/casemate
BASE ?= main
# The system's own Python: Debian's python3-libvirt is built for it.
PYTHON := /usr/bin/python3
SCRIPT := $(PYTHON) -BEs -m scripts
# Tools of the checkout's own environment, which `make dev` brings up to date.
BIN := .venv/bin
# Whose unit tests run more than nine lines of ten.
PROMISED := rpc/*,config/*,shim/journal.py,shim/process.py,shim/container.py,shim/pod.py

.DEFAULT_GOAL := help
.PHONY: help demo test coverage check install uninstall bench bench-compare dev lock format clean bare

$(PYTHON):
	@[ "$$(id -u)" = 0 ] || { echo "$(PYTHON) is missing: run this as root, or install python3" >&2; exit 1; }
	@echo "casemate: installing Debian packages: python3"
	@apt-get -qq update
	@DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install python3 >/dev/null

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(PYTHON) ## as root: install what is missing, and run a container in a virtual machine of its own
	@$(SCRIPT).demo --prefix=$(PREFIX)

test: $(PYTHON) ## as root: install what the tests need, and run them all
	@$(SCRIPT).test $(ARGS)

coverage: $(PYTHON) ## as root: how much of the product the unit tests run, and which lines they do not
	@$(SCRIPT).test -q -m unit --cov --cov-report=term tests/unit
	@echo "What is promised to be above 90 %:"
	@$(BIN)/coverage report --fail-under=90 --include='$(PROMISED)'

check: $(PYTHON) ## what CI checks without running the product: style, types, arrows, locks
	@$(SCRIPT).check

install: $(PYTHON) ## as root: the product in PREFIX, its executables in /usr/local/bin, the guest image
	@$(SCRIPT).install --prefix=$(PREFIX)

uninstall: $(PYTHON) ## as root: take away what install and demo made; Debian packages stay
	@$(SCRIPT).uninstall

bench: $(PYTHON) ## as root: measure against other runtimes and write docs/performance.md
	@$(SCRIPT).bench $(ARGS)

bench-compare: $(PYTHON) ## as root: this checkout and another commit in turns (BASE=main)
	@$(SCRIPT).bench --base $(BASE) $(ARGS)

dev: $(PYTHON) ## the checkout's own environment, .venv
	@$(SCRIPT).dev

lock: dev ## write requirements/*.txt anew from pyproject.toml (UPGRADE=1: newest of everything)
	@$(BIN)/python -B -m scripts.lock $(if $(UPGRADE),--upgrade)

format: dev ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## the checkout as it was cloned
	@rm -rf .venv .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

bare: $(PYTHON) ## as root: prove demo and test on a bare Debian, SUITE=bookworm or trixie
	@$(SCRIPT).bare_machine $(SUITE)
