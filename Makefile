# `make serve` starts the server with the embedded model; CI runs `make check`, `make test` and `make test-sglang`.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip
SERVE_ARGS ?= --sp-size 2
SGLANG_VENV := .venv-sglang
PEERS_VENV  := .venv-peers
SGLANG_PYTEST := PYTHONPATH=tests/sglang/shims $(SGLANG_VENV)/bin/python -m pytest tests/sglang

.PHONY: serve test test-sglang test-sglang-all bench-peers check clean
serve: $(VENV)/.serve
	$(VENV)/bin/python -m server.launch $(SERVE_ARGS)

test: $(VENV)/.dev  # two at a time, on 2 cores in three quarters of the time
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

test-sglang: $(SGLANG_VENV)/.ready  # the plugin in a real SGLang; its environment is 2.6 GB
	$(SGLANG_PYTEST) -m "not matrix"

test-sglang-all: $(SGLANG_VENV)/.ready  # every model, strategy and number of ranks: about 7 minutes on 2 cores
	$(SGLANG_PYTEST) --timeout 900

check: $(VENV)/.dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

bench-peers: $(PEERS_VENV)/.ready  # what benchmarks compare with, in an environment of its own

$(PEERS_VENV)/.ready: pyproject.toml benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(PEERS_VENV)/bin/python -m pip install -c constraints.txt -e . -r benchmarks/peers.txt
	touch $@

$(SGLANG_VENV)/.ready: pyproject.toml tests/sglang/requirements.txt tests/sglang/cpu_platform/pyproject.toml
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install torch==2.13.0
	$(SGLANG_VENV)/bin/python -m pip install --no-deps -r tests/sglang/requirements.txt
	$(SGLANG_VENV)/bin/python -m pip install --no-deps --no-build-isolation -e . -e tests/sglang/cpu_platform
	touch $@

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(PEERS_VENV) build *.egg-info
