# make demo | test | test-quick | test-integrations | bench | numerics | lint | tidy | docs | cuda-check | gpu
# make sanitize | test-aarch64 | wheel | test-wheel | test-matrix | clean
#
# Every verb makes the environment and the build first, where they are missing or out of date.
# torch without CUDA on Linux:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON   ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
                      $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' \
                        2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
ARGS     ?=
# A process per core, each with tests that are neighbours, as these share what they make first;
# ARGS="-n 0" runs all in one, where a debugger can look.
PYTEST_ARGS := -n auto --dist worksteal

BIN   := .venv/bin
READY := .venv/.ready
PIP   := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS)
CPP    = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' \
                            'bench/*.cu' 'release/*.cpp' 'tests/*.cpp' 'tests/*.h')
PY     = $(shell git ls-files '*.py' '*.pyi')

.PHONY: demo test test-quick test-integrations bench numerics lint tidy docs cuda-check gpu sanitize wheel \
        test-aarch64 test-wheel test-matrix clean

demo: $(READY)
	$(BIN)/python examples/demo.py $(ARGS)

# glibc then fills what it hands out with 0xFE, so that reading unwritten memory shows.
test: $(READY)
	MALLOC_PERTURB_=1 $(BIN)/pytest $(PYTEST_ARGS) $(ARGS)

# For the inner loop: a choice that meets every kernel and every layer, on this CPU's highest level.
# Nothing of test_compile.py is chosen, and importing it takes seconds.
QUICK := not (levels or slow or compiler or cuda or peers)

test-quick: $(READY)
	MALLOC_PERTURB_=1 $(BIN)/pytest $(PYTEST_ARGS) \
	  --ignore tests/contract/test_compile.py -m '$(QUICK)' $(ARGS)

# With real packages of others. What pip takes from rnnkern, which is installed, is the extras' list.
test-integrations: $(READY)
	$(PIP) torch==2.13.0 'rnnkern[onnx,rl]'
	$(PIP) --no-deps xlstm==2.0.6 speechbrain==1.1.2
	$(BIN)/pytest $(PYTEST_ARGS) -m peers $(ARGS)

bench: $(READY)
	$(BIN)/python bench/run.py $(ARGS)

# Errors against float64, beside torch.nn's; ARGS=--check compares with those kept.
numerics: $(READY)
	$(BIN)/python bench/numerics.py $(ARGS)

# lint-imports checks the rooms of the Python package. The last line is the house rule that keeps
# compile times low and the engines reusable: only the bindings know torch and Python.
lint: $(READY)
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/codespell *.md *.cff bench csrc docs examples release rnnkern tests
	! grep -rnE '#include *[<"](torch|ATen|c10|Python\.h|pybind11)' csrc --exclude-dir=bindings

# clang-tidy over the C++ of the CPU engine, at one level, and the bindings: `make -j tidy`.
TIDY_LEVEL = $(if $(filter x86_64,$(shell uname -m)),-mavx2 -mfma -DRNNKERN_ISA=avx2,\
                  -DRNNKERN_ISA=baseline)
TIDY_TORCH = $(shell $(BIN)/python -c 'import sysconfig, importlib.util as u; \
                 t = u.find_spec("torch").submodule_search_locations[0] + "/include"; \
                 print("-isystem", t, "-isystem", t + "/torch/csrc/api/include", \
                       "-isystem", sysconfig.get_paths()["include"])')
TIDY_FILES = csrc/cpu/engine.cpp $(wildcard csrc/cpu/runtime/*.cpp) \
             $(addprefix csrc/bindings/,numpy_module.cpp torch_ops.cpp torch_engine_ops.cpp autograd.cpp \
               autograd_module.cpp module_weights.cpp direct_call.cpp plain_call.cpp plain_module.cpp)

tidy: $(TIDY_FILES:%=tidy/%)

tidy/csrc/cpu/engine.cpp: FLAGS = $(TIDY_LEVEL)
tidy/csrc/bindings/%: FLAGS = $(TIDY_TORCH)
tidy/csrc/bindings/torch_%.cpp: FLAGS = $(TIDY_TORCH) -DTORCH_TARGET_VERSION=0x020a000000000000
tidy/%: $(READY)
	$(BIN)/clang-tidy --quiet $* -- -std=c++20 $(FLAGS)

# Into site/; a warning is an error. The README's picture is drawn from the benchmark's results.
docs: $(READY)
	$(BIN)/python docs/scripts/results.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

cuda-check: $(READY)
	$(BIN)/python bench/gpu_build.py $(ARGS)

gpu:
	bash bench/gpu.sh $(ARGS)

# One wheel for every Python here, into dist/. Autograd in C++ for more torches, each fetched for the
# while: make wheel ARGS="--torch all"
wheel: $(READY)
	$(PIP) -r release/requirements.txt
	$(BIN)/python release/build_wheel.py --pip-args="$(PIP_ARGS)" $(ARGS)

# A wheel for one other Python and one other torch, installed, under the quick tests: minutes.
test-wheel: $(READY)
	$(PIP) -r release/requirements.txt
	$(BIN)/python release/one_other.py --pip-args="$(PIP_ARGS)" -- $(PYTEST_ARGS) -m '$(QUICK)' $(ARGS)

# The suite against the installed wheel, for each Python and torch: hours. ARGS="--help" chooses.
test-matrix: $(READY)
	$(PIP) -r release/requirements.txt
	$(BIN)/python release/matrix.py --pip-args="$(PIP_ARGS)" $(ARGS)

sanitize:
	bash tests/sanitize/run.sh

# AArch64 on another machine, by a cross-compiler and qemu: minutes. ARGS: layers at each level.
test-aarch64: $(READY)
	bash tests/aarch64/run.sh $(ARGS)

clean:
	rm -rf .venv build dist site *.egg-info rnnkern/*.so

# torch comes first and pinned, so that no later step can choose another one.
$(READY): pyproject.toml setup.py $(shell find csrc -type f)
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed: make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) 'setuptools>=77' wheel ninja numpy
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
