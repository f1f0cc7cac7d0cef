# SPDX-License-Identifier: Apache-2.0
# Everything a newcomer needs: `make demo`, `make test`. Run as root on Debian 12; each target does its own set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: again help setup try demo bench test test-unit test-bpf test-lab test-cluster lint format unload clean

PYTHON := .venv/bin/python
PYTEST := .venv/bin/pytest
PACKAGES := python3-bpfcc python3-venv gcc libc6-dev linux-libc-dev iproute2 nftables iptables \
	iputils-ping procps kmod util-linux bpftool openssl ca-certificates git
KEEP ?=
QUICK ?=
export HOSTINT_BPF_DIR := $(CURDIR)/bpf

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: .venv/setup.stamp ## install what is missing and prepare .venv (all commands are in .venv/bin)

# The stamp goes with .venv. Without a Python that runs, as after an upgrade of the system's, it counts for nothing.
.venv/setup.stamp: pyproject.toml Makefile $(if $(shell test -x $(PYTHON) && echo yes),,again)
	@test "$$(id -u)" = 0 || { echo "make: run as root: packages are installed, programs loaded into the kernel, namespaces made" >&2; exit 1; }
	@missing="$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done)"; \
	if [ -n "$$missing" ]; then \
		echo "installing Debian packages:" $$missing; \
		apt-get update -qq </dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing </dev/null >/dev/null; \
	fi
	@test -x $(PYTHON) || { echo "making .venv"; /usr/bin/python3 -m venv --clear --system-site-packages .venv; }
	@echo "installing Python packages into .venv"
	@# without build isolation: that would ask the index again, and not with this machine's trust and settings
	@.venv/bin/pip install -q --disable-pip-version-check 'setuptools>=77' wheel </dev/null
	@.venv/bin/pip install -q --disable-pip-version-check --no-build-isolation -e '.[operator,dev]' </dev/null
	@touch $@

try: setup ## a taste in half a minute: one node and its pods as namespaces, real traffic, reports as they arrive
	@$(PYTHON) -m tests.lab.try_it

demo: setup ## the whole thing on a real two-node Kubernetes (KEEP=1 leaves it running)
	@$(PYTHON) -m tests.e2e.demo $(if $(KEEP),--keep)

bench: setup ## what it costs on this machine: a table, build/bench.json, plots (QUICK=1: within a minute; KEEP=1: keep the table in docs/)
	@$(PYTHON) -m tests.bench $(if $(QUICK),--quick) $(if $(KEEP),--keep)

test: setup lint ## all tests: what needs no cluster first, then those on a real Kubernetes
	@$(PYTEST) -m "not cluster"
	@$(PYTHON) -m tests.testcluster build
	@$(PYTEST) -m cluster

test-unit: setup ## tests that need neither root nor a cluster
	@$(PYTEST) -m "not bpf and not lab and not cluster"

test-bpf: setup ## tests that load programs into the kernel
	@$(PYTEST) -m bpf

test-lab: setup ## tests with traffic between network namespaces
	@$(PYTEST) -m lab

test-cluster: setup ## tests on a real Kubernetes
	@$(PYTHON) -m tests.testcluster build
	@$(PYTEST) -m cluster

lint: setup ## ruff, mypy, import contracts, yamllint
	@.venv/bin/ruff check -q .
	@.venv/bin/ruff format -q --check .
	@.venv/bin/mypy --no-error-summary
	@mkdir -p build
	@.venv/bin/lint-imports --no-cache >build/imports.log || { cat build/imports.log; exit 1; }
	@.venv/bin/yamllint -s .
	@echo "lint: clean"

format: setup ## format the Python sources
	@.venv/bin/ruff format .

unload: setup ## remove programs, maps and links of an agent that ran here
	@.venv/bin/hostint-agent unload

clean: ## stop the test cluster and remove .venv and build (the cache of built binaries stays)
	@if [ -x $(PYTHON) ]; then $(PYTHON) -m tests.testcluster down; fi
	@rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
