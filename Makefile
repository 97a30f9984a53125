# Two commands: `make demo` and `make test`. Both set up .venv first; nothing else needs installing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch comes from its own step: pinned, so that the CPU build is taken and no CUDA packages are pulled.
REQUIREMENTS = torch triton "numpy<2.4" einops safetensors tqdm matplotlib transformers trl peft pytest pytest-xdist \
	hypothesis mypy ruff setuptools wheel pybind11 cmake ninja
export THINKERNEL_CUDA ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Threads that wait sleep: spinning ones make a step ten times slower when something else runs on the cores.
export OMP_WAIT_POLICY ?= passive
# Test processes side by side, each with one thread beyond what a test asks for: two take half the time of one with two threads.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: install build test test-slow lint demo bench cuda-check cuda-build gpu clean

$(VENV)/.stamp: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install -q -c constraints.txt $(REQUIREMENTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

install: $(VENV)/.stamp

# Incremental: recompiles what changed under csrc/.
build: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace

test: build lint
	$(PYTEST) -m "not slow"

test-slow: build
	THINKERNEL_FRESH_EXAMPLES=1 $(PYTEST) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: build
	$(BIN)/thinkernel demo $(ARGS)

bench: build
	$(BIN)/thinkernel bench $(ARGS)

# Compiles the CUDA sources for every shipped architecture; a register spill is a failure. Needs nvcc, no GPU.
cuda-check: install
	$(BIN)/python tools/cuda_check.py

# Builds the module with its CUDA half into build/cuda and imports it; no driver or GPU is needed for that.
cuda-build: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" THINKERNEL_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/cuda
	$(BIN)/python -c "import sys; sys.path.insert(0, 'build/cuda/thinkernel'); import torch, _C; assert not _C.cuda_left_out; print('CUDA half built:', [n for n in dir(_C) if 'cuda' in n])"

# Everything a GPU machine is for, offline, in stages with time limits; results in $$OUT (default out/).
gpu:
	$(PYTHON) tools/gpu_run.py $(ARGS)

clean:
	rm -rf build out runs python/thinkernel/_C*.so
