# Targets for people and for CI; `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

##@ Versions
# One home each: Python packages in pyproject.toml (all of them, with hashes, in requirements*.lock), uv in .ci/uv.in,
# Go tools in .ci/tools/NAME/go.mod, the Go compiler for machines without one in .ci/tools/go.in, what the chart's objects
# are checked against in .ci/kubernetes_schemas.py.
PYTHON_MIN := 3.11

##@ Settings
# Each can be given on the command line: `make pytest WORKERS=4 PYTEST_ARGS='-k resume'`.
WORKERS ?= 2        # pytest workers; one thread each, so about one a core
PLANES ?= 4         # workers of test-cluster, each with a control plane of 1 GiB
PYTEST_ARGS ?=      # of everything but the cluster's tests, whose are CLUSTER_ARGS
CLUSTER_ARGS ?=
FAULTS_ARGS ?=      # `make faults FAULTS_ARGS='--seed 7 --case kill:17'`
DATA ?=             # traces for the demo: a folder or s3://…; empty: the ones in the package
ENDPOINT_URL ?=     # S3 endpoint of DATA, where it is not AWS's own
UPGRADE ?=          # `make lock UPGRADE=1` moves every pin that pyproject.toml leaves open

PYTHON := .venv/bin/python
SCHEMA := docs/run.schema.json
CHART_SCHEMA := chart/values.schema.json
TOOLS := $(filter-out plane,$(notdir $(patsubst %/,%,$(dir $(wildcard .ci/tools/*/go.mod))))) # the plane's programs are built by what starts them
COMPILE := pip compile --quiet --universal --python-version $(PYTHON_MIN) --generate-hashes --no-emit-index-url --no-header $(if $(strip $(UPGRADE)),--upgrade)

##@ General

.PHONY: help
help: ## List the targets.
	@awk 'BEGIN { FS = ":.*## " } \
		/^[a-z-]+:.*## / { printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2 } \
		/^##@ (General|Use|Check|Build)/ { printf "\n%s\n", substr($$0, 5) }' $(MAKEFILE_LIST)

##@ Use

.PHONY: setup
setup: ## Create .venv from the lock (Python >= 3.11 and nothing else is needed); does nothing when it is up to date.
	@.ci/setup

.PHONY: demo
demo: setup ## GRPO and DPO on real traces, with a table before/after; DATA=s3://… takes your own.
	@$(PYTHON) -m entrypoint.demo $(if $(strip $(DATA)),--data "$(strip $(DATA))") $(if $(strip $(ENDPOINT_URL)),--endpoint-url "$(strip $(ENDPOINT_URL))")

.PHONY: bench
bench: setup ## Measure preparation at scale, the time to the first step, what a checkpoint and the reference cost; see docs/benchmarks.md.
	$(PYTHON) -m tests.bench.bench_prepare
	$(PYTHON) -m tests.bench.bench_start
	$(PYTHON) -m tests.bench.bench_signals
	$(PYTHON) -m tests.bench.bench_save
	$(PYTHON) -m tests.bench.bench_reference

.PHONY: bench-step
bench-step: setup ## Measure an optimiser step against stock TRL's, some 40 minutes; CHECK=1 fails where a bar is missed.
	$(PYTHON) -m tests.bench.bench_step

.PHONY: cluster-up
cluster-up: setup ## A control plane with Volcano and Karpenter on this machine (root); prints its KUBECONFIG line.
	@$(PYTHON) -m tests.cluster up

.PHONY: cluster-down
cluster-down: setup ## End it.
	@$(PYTHON) -m tests.cluster down

##@ Check

.PHONY: test
test: lint typecheck schema-check tools chart-units pytest test-cluster ## Everything that CI runs.

.PHONY: lint
lint: setup ## Style and format.
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

.PHONY: format
format: setup ## Mend what the linter can mend, and format.
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

.PHONY: typecheck
typecheck: setup ## mypy --strict over the package and its tests.
	@$(PYTHON) -m mypy --strict entrypoint tests

.PHONY: schema-check
schema-check: setup ## Fail if a committed schema is not the one that the dataclasses and chart/values.yaml give.
	@$(PYTHON) -m entrypoint.schema | diff -u --label "$(SCHEMA) (committed)" --label "generated; make schema writes it" $(SCHEMA) -
	@$(PYTHON) .ci/chart_schema.py | diff -u --label "$(CHART_SCHEMA) (committed)" --label "generated; make schema writes it" $(CHART_SCHEMA) -

.PHONY: chart-units
chart-units: tools ## The chart's unit tests, chart/tests/*_test.yaml.
	@"$$(.ci/tools/build helm-unittest)" --strict chart

.PHONY: chart
chart: setup schema-check chart-units ## The chart: schema, lint, unit tests, Kubernetes' schemas, docs; without the smoke run.
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(strip $(WORKERS)) --dist loadgroup --maxschedchunk 1 -m "not slow" tests/chart $(PYTEST_ARGS)

# One thread a worker: torch's pools would fight over the cores. `maxschedchunk` keeps a slow test from hiding behind
# another; loadgroup keeps tests that share a slow server on one worker.
.PHONY: pytest
pytest: setup tools ## The tests alone, but those of test-cluster; PYTEST_ARGS='-m "not slow"' leaves the long ones out.
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(strip $(WORKERS)) --dist loadgroup --maxschedchunk 1 --durations 15 --ignore tests/cluster $(PYTEST_ARGS)

# Each worker has a plane of its own; most of these tests wait for others' clocks, so there are more of them than cores.
.PHONY: test-cluster
test-cluster: setup ## The chart on a real API server with Volcano and Karpenter (root); see docs/cluster-proof.md.
	@$(PYTHON) -m tests.cluster check
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/cluster -n $(strip $(PLANES)) --dist loadgroup -rP --durations 15 $(CLUSTER_ARGS)

.PHONY: test-cluster-all
test-cluster-all: setup ## The same, each row as often as docs/cluster-proof.md says; half an hour.
	@CLUSTER_COUNTS=all $(MAKE) --no-print-directory test-cluster

.PHONY: faults
faults: setup tools ## The fault matrix: real runs killed, stopped and cut off at random moments; see docs/reliability.md.
	@OMP_NUM_THREADS=1 $(PYTHON) -m tests.faults --tests $(FAULTS_ARGS)

##@ Build

.PHONY: lock
lock: ## Resolve the dependencies anew: requirements.lock to run, requirements-dev.lock to develop, uv's and Go's own.
	.ci/uv $(COMPILE) pyproject.toml --output-file requirements.lock
	.ci/uv $(COMPILE) pyproject.toml --extra demo --extra dev --constraints requirements.lock --output-file requirements-dev.lock
	.ci/uv $(COMPILE) .ci/uv.in --output-file .ci/uv.lock
	.ci/uv $(COMPILE) .ci/tools/go.in --output-file .ci/tools/go.lock

.PHONY: schema
schema: setup ## Write the JSON Schemas of a run file and of the chart's values.
	@$(PYTHON) -m entrypoint.schema >$(SCHEMA).new
	@mv $(SCHEMA).new $(SCHEMA)
	@$(PYTHON) .ci/chart_schema.py >$(CHART_SCHEMA).new
	@mv $(CHART_SCHEMA).new $(CHART_SCHEMA)

.PHONY: chart-readme
chart-readme: tools ## Write the chart's README from README.md.gotmpl and the comments of values.yaml.
	@"$$(.ci/tools/build helm-docs)" --chart-search-root chart --log-level warning

.PHONY: tools
tools: ## Build the pinned Go tools into the cache, once a pin.
	@for tool in $(TOOLS); do .ci/tools/build "$$tool" >/dev/null; done

.PHONY: clean
clean: ## Remove what the targets made in this work tree; the caches outside it stay.
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
