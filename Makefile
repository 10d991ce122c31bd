# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
#
# Thin front of tools/setup.sh, the CMake presets, ctest and pytest. docs/hacking.md says more.
#   make run     set up, build, and run the main job: tables here, plots in build/report/index.html
#   make test    set up, build, and run every test that this machine can run
#   make lint    formatting and static checks
#   make dev | asan | ubsan | tsan    build one preset and run its tests
#   make clean   remove what was built
JOBS := $(shell nproc)
RESULTS := build/test-results
# Kernels for GPUs take minutes to build: the main job has them where there is a GPU to run them.
CUDA := $(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF)

.NOTPARALLEL:
.DEFAULT_GOAL := run
.PHONY: run test lint clean dev asan ubsan tsan setup-build setup-test setup-python
.PHONY: check-cuda-built wheel checks release check-format check-tidy check-python check-sanitized check-cuda check-pytest check-release

run: setup-build
	cmake --preset release -DATTN8_CUDA=$(CUDA)
	cmake --build --preset release --parallel $(JOBS) --target attn8_cli attn8_shared
	build/release/attn8 report

# -k: one failing check does not hide the next; the status is still that of all.
test: setup-test
	@rm -rf $(RESULTS) && mkdir -p $(RESULTS)
	@status=0; $(MAKE) --no-print-directory -k checks || status=$$?; \
	  python3 tools/list_skipped.py $(RESULTS); exit $$status

checks: check-format check-python check-sanitized check-cuda check-pytest check-tidy check-release

lint: TIDY := (src/(core|reference|cpu|kv_cache)|apps/attn8)
lint: setup-test check-format check-python check-tidy

setup-build:
	@tools/setup.sh build

setup-test:
	@tools/setup.sh test

setup-python: setup-test
	@tools/setup.sh python

release:
	cmake --preset release -DATTN8_CUDA=$(CUDA)
	cmake --build --preset release --parallel $(JOBS)

check-release: release
	ctest --preset release --parallel $(JOBS) --output-junit $(CURDIR)/$(RESULTS)/ctest-release.xml

check-sanitized:
	cmake --preset ci
	cmake --build --preset ci --parallel $(JOBS)
	ctest --preset ci --parallel $(JOBS) --output-junit $(CURDIR)/$(RESULTS)/ctest-ci.xml

# The Python package, built here and installed into .venv.
wheel: setup-python
	@rm -rf build/dist
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) .venv/bin/pip wheel --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --wheel-dir build/dist \
	  --config-settings=cmake.define.ATTN8_CUDA=$(CUDA) .
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
	  build/dist/attn8-*.whl

# The CUDA kernels as machine code; the emulator's tests, which need no nvcc, are in check-release.
check-cuda:
	@if command -v nvcc >/dev/null; then $(MAKE) --no-print-directory check-cuda-built; \
	  else echo "check-cuda: left out, this machine has no nvcc"; fi
check-cuda-built:
	cmake --preset cuda
	cmake --build --preset cuda --parallel $(JOBS) --target attn8_cuda_tests
	ctest --preset cuda -L '^cuda$$' --output-junit $(CURDIR)/$(RESULTS)/ctest-cuda.xml

check-pytest: wheel release
	ATTN8_CLI=$(CURDIR)/build/release/attn8 .venv/bin/pytest --junit-xml=$(RESULTS)/pytest.xml

check-format:
	find apps benchmarks examples include python src tests -name '*.[ch]pp' -o -name '*.[ch]' -o -name '*.cu' | \
	  xargs clang-format --dry-run -Werror

PYTHON := benchmarks/call_overhead.py benchmarks/gpu benchmarks/peers benchmarks/port_costs.py examples python tools tests
check-python: setup-python
	.venv/bin/ruff check $(PYTHON)
	.venv/bin/ruff format --check $(PYTHON)
	.venv/bin/mypy

# The library; `make lint` adds the command line, which takes minutes for the headers it includes.
TIDY := src/(core|reference|cpu|kv_cache)
# clang does not know the options that are for g++ alone (cmake/isa_flags.cmake).
check-tidy: release
	@mkdir -p build/tidy
	@sed 's/ -fno-tree-pre -fno-code-hoisting -fno-ivopts//' build/release/compile_commands.json \
	  > build/tidy/compile_commands.json
	run-clang-tidy -quiet -p build/tidy -j $(JOBS) -extra-arg=-Wno-unknown-warning-option \
	  '/$(TIDY)/'

dev asan ubsan tsan: setup-test
	cmake --preset $@
	cmake --build --preset $@ --parallel $(JOBS)
	ctest --preset $@ --parallel $(JOBS)

clean:
	rm -rf build
