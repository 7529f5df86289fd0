# Every target does its whole set-up: a virtual environment in .venv with the pinned versions of constraints.txt.
# PYTHON names another interpreter: make test PYTHON=python3.11

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Much of their time the tests wait. A file stays in one process, which has a cluster of its own; long files come first.
TEST_PROCESSES ?= 3
SPREAD = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
CHAOS_PROCESSES ?= 2
LEAVE_OUT ?= tests/kubernetes
KUBE ?= $(abspath ../shared/kube)
CHAOS_RUNS ?= 20
BENCH_RUNS ?= 5
CHAOS = $(BIN)/pytest tests/chaos -n $(CHAOS_PROCESSES) --dist worksteal

# Only what is said on the command line: a shell's KUBECONFIG may lead to a cluster that nobody wants tests in. Theirs
# has one node; each process starts a control plane of its own.
ifeq ($(origin KUBECONFIG),command line)
KUBERNETES := KFPYTORCH_RAY_TEST_KUBECONFIG=$(abspath $(KUBECONFIG))
KUBERNETES_PROCESSES :=
else
KUBERNETES := KFPYTORCH_RAY_KUBE=$(KUBE)
KUBERNETES_PROCESSES = $(SPREAD)
endif

export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-examples test-flyte test-kubernetes bench chaos check format clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(INSTALLED) ## Train on scikit-learn's handwritten digits, on Ray
	$(BIN)/python examples/digits.py

# Folders are named, because pytest reads their options in the process that reports only then.
test: $(INSTALLED) ## Run all tests, the chaos tests once, but those in LEAVE_OUT: tests/kubernetes, which needs a control plane
	$(KUBERNETES) $(BIN)/pytest $(filter-out $(LEAVE_OUT),$(patsubst %/,%,$(sort $(dir $(wildcard tests/*/test_*.py))))) \
		$(SPREAD) --chaos-runs 1 --durations 25

test-examples: $(INSTALLED) ## Run the examples that need Lightning, Accelerate and transformers, which are installed for it
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[big-examples]'
	$(BIN)/pytest tests/ray/test_examples.py -m big_examples

test-flyte: $(INSTALLED) ## Run the commands that Flyte would run, on a real Ray and as the pods of a PyTorchJob
	$(BIN)/pytest tests/flyte $(SPREAD) --durations 15

test-kubernetes: $(INSTALLED) ## Run the tests that need a Kubernetes cluster: one of their own by the scripts in KUBE, or KUBECONFIG=FILE
	$(KUBERNETES) $(BIN)/pytest tests/kubernetes $(KUBERNETES_PROCESSES) --durations 15

bench: $(INSTALLED) ## Measure beside the peers, each figure BENCH_RUNS times (5); QUICK=1 once, in a few minutes
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick,--runs $(BENCH_RUNS)) --json benchmarks.json

chaos: $(INSTALLED) ## Break every row of the failure table CHAOS_RUNS times (20) and count hangs and leftovers
	$(CHAOS) --chaos-runs $(CHAOS_RUNS)

check: $(INSTALLED) ## Lint, formatting, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove the environment and everything generated
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find adapters cluster kfpytorch_ray examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing. On Debian: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "The pinned versions need Python 3.11 or 3.12. Name one: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing. On Debian: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
