# What a newcomer, an operator and CI do with this checkout. Each target is one program of scripts/.
#   PREFIX=/opt/casemate   where the product goes
#   BASE=main              the commit that make bench-compare compares this checkout with
#   ARGS=...               more arguments for pytest: make test ARGS="-m unit -k codec"
#   SUITE=...              a checkout of github.com/containerd/shimtest, for make shimtest; for make bare, a release
#   SCRIPT=... SHARE=...   for testbed-run: what runs in the bed, with ARGS; a directory that it sees as /share
#   DEVICES=gpu-host       for testbed-run and testbed-shell: the devices that the host in the bed has

PREFIX ?= /opt/casemate
BASE ?= main
# The system's own Python: Debian's python3-libvirt is built for it.
PYTHON := /usr/bin/python3
SCRIPTS := $(PYTHON) -BEs -m scripts
TESTBED := $(PYTHON) -BEs -m tests.testbed
# Tools of the checkout's own environment, which `make dev` brings up to date.
BIN := .venv/bin
# Whose unit tests run more than nine lines of ten.
PROMISED := rpc/*,config/*,shim/journal.py,shim/process.py,shim/container.py,shim/pod.py

.DEFAULT_GOAL := help
.PHONY: help demo test posix shimtest kubernetes coverage check install uninstall bench bench-testbed bench-page bench-compare dev lock format clean bare testbed testbed-run testbed-shell test-testbed

$(PYTHON):
	@[ "$$(id -u)" = 0 ] || { echo "$(PYTHON) is missing: run this as root, or install python3" >&2; exit 1; }
	@echo "casemate: installing Debian packages: python3"
	@apt-get -qq update
	@DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install python3 >/dev/null

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(PYTHON) ## as root: install what is missing, and run a container in a virtual machine of its own
	@$(SCRIPTS).demo --prefix=$(PREFIX)

test: $(PYTHON) ## as root: install what the tests need, and run them all
	@$(SCRIPTS).test $(ARGS)

posix: $(PYTHON) ## as root: public tests of file systems beside runc, and write docs/filesystems.md
	@$(SCRIPTS).posix $(ARGS)

shimtest: $(PYTHON) ## as root: containerd's tests of shims, of the checkout SUITE, and write docs/shimtest.md
	@$(SCRIPTS).shimtest '$(SUITE)' $(ARGS)

kubernetes: $(PYTHON) ## as root: pods of a real kubelet, by kubectl; not part of `make test`, as building Kubernetes takes long
	@$(SCRIPTS).test -m kubernetes $(ARGS)

coverage: $(PYTHON) ## as root: that unit tests run nine lines of ten where that is promised, and which they do not
	@$(SCRIPTS).test -q -m unit --cov --cov-report= $(addprefix tests/unit/,rpc config shim)
	@$(BIN)/coverage report --fail-under=90 --include='$(PROMISED)'

check: $(PYTHON) ## what CI checks without running the product: style, types, arrows, locks
	@$(SCRIPTS).check

install: $(PYTHON) ## as root: the product in PREFIX, its executables in /usr/local/bin, the guest image
	@$(SCRIPTS).install --prefix=$(PREFIX)

uninstall: $(PYTHON) ## as root: take away what install and demo made; Debian packages stay
	@$(SCRIPTS).uninstall

bench: $(PYTHON) ## as root: measure against other runtimes on this machine and write docs/performance.md
	@$(SCRIPTS).bench $(ARGS)

bench-testbed: $(PYTHON) ## as root: the same in the test bed, under KVM; the page has both machines
	@$(TESTBED) bench $(ARGS)

bench-page: $(PYTHON) ## docs/performance.md anew, of the runs that are kept beside it
	@$(TESTBED) page

bench-compare: $(PYTHON) ## as root: this checkout and another commit in turns (BASE=main)
	@$(SCRIPTS).bench --base $(BASE) $(ARGS)

dev: $(PYTHON) ## the checkout's own environment, .venv
	@$(SCRIPTS).dev

lock: dev ## write requirements/*.txt anew from pyproject.toml (UPGRADE=1: newest of everything)
	@$(BIN)/python -B -m scripts.lock $(if $(UPGRADE),--upgrade)

format: dev ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## the checkout as it was cloned
	@rm -rf .venv .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

bare: $(PYTHON) ## as root: prove demo and test on a bare Debian, SUITE=bookworm or trixie
	@$(SCRIPTS).bare_machine $(SUITE)

testbed: $(PYTHON) ## as root: build an emulated host whose KVM works, with this checkout in it (docs/testbed.md)
	@$(TESTBED) build

testbed-run: $(PYTHON) ## as root: run SCRIPT with ARGS in a throw-away instance of it
	@$(TESTBED) run --share='$(SHARE)' --devices='$(DEVICES)' '$(SCRIPT)' $(ARGS)

testbed-shell: $(PYTHON) ## as root: a prompt in a throw-away instance of it
	@$(TESTBED) shell --share='$(SHARE)' --devices='$(DEVICES)'

test-testbed: $(PYTHON) ## as root: the tests that run in it; not part of `make test`, as building it takes long
	@$(SCRIPTS).test -m testbed $(ARGS)
