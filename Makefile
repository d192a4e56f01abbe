# make demo: set up, look at a picture twice.  make test: set up, lint, types, tests.  Both work on a fresh clone.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp carries what it was made from, so that a changed requirement installs again and nothing else does.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
BUILD := build
DEPLOY_TOOLS := helm-python-sdk kubernetes-validate promql-parser
TORCH := 2.13.0
PICTURE ?= examples/pictures/norvik-mug-red.png
PYTEST := $(BIN)/python -m pytest
# Else every worker, and every command that a test starts, would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE
# Four workers for two cores, since many tests wait. Each has one thread: several a core only wait for each other.
WORKERS ?= $(shell echo $$(( $$(nproc 2>/dev/null || echo 2) * 2 )))
PARALLEL = OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder
FAST := not slow and not vllm and not openvino and not browser and not ray and not clients
# What separates the arguments of a call cannot be written in one.
comma := ,
# $(call install,PYTHON,WHAT): pip's steps with the names of the packages, and the seconds it took.
install = @set -o pipefail; began=$$SECONDS; echo "installing: $(2)"; \
	$(1) -m pip install --disable-pip-version-check --no-input --progress-bar off $(2) | sed -un \
	-e 's/^Collecting \([^ ;(]*\).*/  needs \1/p' -e 's/^ *Downloading \(.*([0-9.]* [MG]B)\).*/  fetching \1/p' \
	-e 's/^Installing collected packages:.*/  unpacking them all: minutes, where torch is new/p' && \
	echo "installed after $$((SECONDS - began)) s"

.PHONY: help setup demo test quick lint fix docs slow pins test-compat test-clients test-ray test-deploy notebooks test-vllm test-openvino bench-engine bench-server bench-gateway bench-cache bench-sdk bench-redis clean

help: ## these lines
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## make the virtual environment, if it is not there or out of date

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install,$(BIN)/python,-c constraints.txt -e '.[dev]')
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP) ## analyze a picture with the bundled model, twice: a miss, then a hit
	@rm -rf $(BUILD)/demo && mkdir -p $(BUILD)/demo
	$(BIN)/qvl analyze $(PICTURE) --cache $(BUILD)/demo/answers.db
	$(BIN)/qvl analyze $(PICTURE) --cache $(BUILD)/demo/answers.db

test: $(STAMP) lint ## lint, types, and every test that is not marked slow, vllm, openvino or browser
	$(PARALLEL) -m "$(FAST)"

quick: $(STAMP) ## the tests that load no model and start no process, for the inner loop
	$(PARALLEL) -q -rfE --quick -m "$(FAST)"

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy -n auto

fix: $(STAMP) ## what ruff can put right by itself
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .

# One worker a core: these compute, or drive a browser, and none of them waits for long.
slow: WORKERS = $(shell nproc 2>/dev/null || echo 2)
slow: $(STAMP) ## the tests that take minutes, and those in a browser
	$(PARALLEL) -m "slow or browser"

# What llamafactory's images pin. Its own constraints, since the older transformers needs the older hub client.
test-compat: ## the local backend under transformers 4.57.1, in an environment of its own
	test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	$(call install,.venv-compat/bin/python,torch==$(TORCH) transformers==4.57.1 -e '.[local$(comma)video]' \
		accelerate pytest pytest-timeout pytest-asyncio pytest-xdist hypothesis)
	$(PARALLEL:$(BIN)/%=.venv-compat/bin/%) tests/backends/local tests/tiny tests/training -m "$(FAST)"

test-vllm: ## the vLLM backend on vLLM's CPU build, in an environment of its own
	$(PYTHON) tests/backends/environment.py vllm .venv-vllm

test-openvino: ## the OpenVINO backend on models that optimum-intel converts, in an environment of its own
	$(PYTHON) tests/backends/environment.py openvino .venv-openvino

test-clients: $(STAMP) ## real clients of Python and Node, in environments of their own; WRITE=1 writes the table of README
	$(if $(WRITE),QVL_WRITE_CLIENTS=1) $(PYTEST) tests/clients

test-ray: $(STAMP) ## replicas and datasets under Ray, which it installs
	$(call install,$(BIN)/python,-c constraints.txt -e '.[dev$(comma)ray]')
	$(PYTEST) tests/backends/ray

test-deploy: $(STAMP) ## the Helm chart and the alerts, with Helm's library and promtool, where that is on the PATH
	$(call install,$(BIN)/python,-c constraints.txt $(DEPLOY_TOOLS))
	$(PYTEST) -q tests/ascend/test_helm.py tests/ascend/test_helm_values.py tests/cli/test_scaling_manifests.py

bench-engine: $(STAMP) ## qvl-serve beside plain generate, transformers serve, vLLM and OpenVINO on 139 M random weights; gigabytes at first
	$(BIN)/python benchmarks/bench_engine.py

bench-server: $(STAMP) ## what qvl-serve costs in front of an endpoint, beside LiteLLM's proxy; needs wrk
	$(BIN)/python benchmarks/bench_server.py

bench-gateway: $(STAMP) ## pictures through qvl-serve and other gateways; needs wrk and npm; BENCH=--quick for 5 minutes
	$(BIN)/python benchmarks/bench_gateway.py $(BENCH)

bench-cache: $(STAMP) ## a hit and a miss for 2 MB pictures, beside LangChain's, LiteLLM's caches and diskcache
	$(BIN)/python benchmarks/bench_cache.py

bench-sdk: $(STAMP) ## one call beside the openai client, ChatOpenAI and LiteLLM's SDK
	$(BIN)/python benchmarks/bench_sdk.py

bench-redis: $(STAMP) ## what requests feel when Redis is killed, paused, emptied, full
	$(BIN)/python benchmarks/bench_redis_faults.py

docs: $(STAMP) ## write docs/cli.md and the pages of chips, reports, fields and models, check every link between the pages
	$(BIN)/python -m tests.ascend.chip_page docs/ascend-chips.md
	$(BIN)/python -m tests.ascend.reports docs/ascend-reports.md
	$(BIN)/python -m tests.server.fields_page docs/fields.md
	$(BIN)/python -m tests.backends.models_page docs/models.md
	$(BIN)/python docs/build.py

notebooks: $(STAMP) ## run the notebooks and keep what they show
	cd examples/notebooks && for one in *.ipynb; do \
		MPLBACKEND=module://matplotlib_inline.backend_inline PATH=$(abspath $(BIN)):$$PATH \
		XDG_CACHE_HOME=$(abspath $(VENV))/notebooks jupyter-execute --inplace $$one || exit 1; done
	$(BIN)/python -m tests.examples.tidy_notebook examples/notebooks/*.ipynb

pins: ## write constraints.txt anew: the newest versions of what dev pulls in, with this torch
	rm -rf $(BUILD)/pins && $(PYTHON) -m venv $(BUILD)/pins
	$(BUILD)/pins/bin/python -m pip install -q 'torch==$(TORCH)' '.[dev,ray]' $(DEPLOY_TOOLS)
	{ sed -n '/^#/p' constraints.txt; $(BUILD)/pins/bin/python -m pip freeze --all --exclude qvl --exclude pip | \
		sed 's/+cpu$$//'; } > $(BUILD)/constraints.txt
	mv $(BUILD)/constraints.txt constraints.txt

clean: ## remove what make made; the virtual environment stays (rm -rf .venv)
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
