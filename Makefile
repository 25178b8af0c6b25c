# From a bare clone: `make demo`, `make test`. Each installs what it needs into .venv, builds the
# extension and runs; repeated, they start in seconds.
#
#   make test PYTEST_ARGS="-k decode -x"     make bench PYTEST_ARGS=...     make lint     make format
#   make test-peers: against other implementations, which it installs
#   make test-arm64: the CPU kernels compiled for ARM64, in an emulator
#   make models: the table of docs/models.md, half an hour
#   make bench-peers: against other engines, which it installs into build/peers; half an hour

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# The AMX kernels on a model of their instructions, so that their code is tested on machines that
# have AVX-512 alone.
export HGFAST_AMX_MODEL ?= 1
# The CUDA kernels on a model of the GPU: likewise.
export HGFAST_EMULATOR ?= 1

# A stamp is newer than everything that it was made from.
INSTALLED := $(VENV)/installed.stamp
PEERS := $(VENV)/peers.stamp
ENGINES := build/peers/installed.stamp
BUILT := $(VENV)/built.stamp
NATIVE := setup.py pyproject.toml CMakeLists.txt hgfast/_version.py \
          $(shell find cmake csrc tests/emulator -type f -not -path '*/__pycache__/*')
CXX_FILES = $(shell find csrc tests benchmarks/peers -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test test-peers test-arm64 demo bench bench-peers models gpu resources lint format \
        clean

build: $(BUILT)

test: $(BUILT)
	$(BIN)/python -m pytest tests --ignore tests/peers $(PYTEST_ARGS)

test-peers: $(BUILT) $(PEERS)
	$(BIN)/python -m pytest tests/peers $(PYTEST_ARGS)

# Without torch or Python: tests/portable. Debian has the compiler in g++-aarch64-linux-gnu, the
# emulator in qemu-user-static.
ARM64_CXX ?= aarch64-linux-gnu-g++
ARM64_EMULATOR ?= qemu-aarch64-static
test-arm64: $(INSTALLED)
	@for tool in $(ARM64_CXX) $(ARM64_EMULATOR); do command -v $$tool > /dev/null || \
	  { echo "make test-arm64: there is no $$tool; on Debian:" \
	    "apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2; exit 1; }; done
	$(BIN)/cmake -G Ninja -S tests/portable -B build/arm64 \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_CXX_COMPILER=$(ARM64_CXX) \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
	$(BIN)/cmake --build build/arm64
	$(ARM64_EMULATOR) build/arm64/check portable

demo: $(BUILT)
	$(BIN)/python -m hgfast demo

bench: $(BUILT)
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

# A part of it, or the rest of a run that was cut: make bench-peers PEERS_ARGS="--missing"
PEERS_ARGS ?=
bench-peers: $(BUILT) $(ENGINES)
	$(BIN)/python -m benchmarks.peers $(PEERS_ARGS)

# A part of it: make models MODELS_ARGS="--networks CPN"
MODELS_ARGS ?=
models: $(BUILT)
	$(BIN)/python -m benchmarks.models $(MODELS_ARGS)

# On a machine with a GPU, with the $(PYTHON) that has its torch: builds, tests, measures, writes a
# table. docs/gpu.md tells more.   make gpu STEPS="build test" GPU_ARGS="--minutes 20"
STEPS ?=
GPU_ARGS ?=
gpu:
	$(PYTHON) -m benchmarks.gpu $(STEPS) $(GPU_ARGS)

# After a change of the CUDA kernels that is meant: their registers, as tests/test_cuda_gates.py
# finds them.
resources: $(BUILT)
	$(BIN)/python tests/cuda_gates.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info hgfast/_C*.so tests/hgfast_emulator*.so

$(INSTALLED): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(PEERS): requirements-peers.txt $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	touch $@

$(ENGINES): requirements-bench.txt $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r requirements-bench.txt
	touch $@

$(BUILT): $(INSTALLED) $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
