# Two commands set up everything: `make train` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
# The one place where the venv's torch is pinned. PIP_FLAGS chooses a CPU or CUDA build of it (README, Install).
TORCH     ?= torch==2.13.0
PIP_FLAGS ?=
# Processes that share out the tests, of one thread each, or two where threads are tested: most tests keep no second core busy.
WORKERS ?= 2
BIN := $(VENV)/bin

GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: train test test-slow test-llama bench plots gpu lint clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(VENV)/.installed: pyproject.toml Makefile $(wildcard kernels/csrc/*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"jindo-core needs Python >= 3.11, this is {sys.version.split()[0]}: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e ".[dev]"
	@touch $@

train: $(VENV)/.installed ## the main job on an embedded default: SmolLM2-135M, Korean instructions
	$(BIN)/jindo-core train

test: $(VENV)/.installed-dev ## lint, types, and every test that needs no GPU (under 10 minutes on 2 cores)
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" --ignore tests/kernels
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" tests/kernels
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "interpreter and not slow" tests/kernels

test-slow: $(VENV)/.installed-dev ## the long tests: real training runs against the peers
	$(BIN)/python -m pytest -q -m slow

test-llama: $(VENV)/.installed-dev ## exported GGUF files in llama.cpp, built from source first (cmake, some twelve minutes)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e ".[llama]"
	$(BIN)/python -m pytest -q -m slow tests/jindo_core/test_llama_cpp.py

bench: $(VENV)/.installed-dev ## kernel throughput beside the peers that are installed
	$(BIN)/python -m pytest -q bench

plots: $(VENV)/.installed-dev ## docs/roofline-*.png and docs/ratios-*.png from the newest results of make bench
	$(BIN)/python -m bench.plot

gpu: ## on a machine with a GPU, no network needed: correctness, benchmarks, memory (within 8 minutes; what does not fit is named)
	$(GPU_PYTHON) bench/gpu.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
