# make demo       forecasts the S&P 500's closes with torch.nn.LSTM and with fastrnn.LSTM
# make examples   runs all examples; their output and pictures go to examples/results
# make test       runs the tests except the slow ones: ARGS='-m slow' runs those
# make fuzz       compares random layers with torch's until one differs, CASES (1000) per round
# make soak       runs layers of any size on 8 threads for ten minutes: none may hang
# make sanitize   runs tests, and trains layers under LeakSanitizer, on a copy in build/sanitized
#                 that is built with AddressSanitizer and UBSan
# make test-cuda  runs the tests on a GPU, or on the virtual one in tests/vgpu, in an environment of
#                 its own with another torch; needs nvcc
# make test-aarch64  cross-compiles for 64-bit Arm and runs tests under qemu
# make cuda-all   compiles the CUDA kernels for every architecture, into build/cuda; needs only nvcc
# make matrix     builds with every minor version of torch from 2.6 on, runs a short suite in each,
#                 and writes the table of docs/versions.md; ARGS='2.6 2.9' for some
# make wheels     makes a wheel in dist/ with a binding for every supported torch, or for those in
#                 ARGS, for PYTHON
# make bench      times the layers against torch, ONNX Runtime, OpenVINO, JAX and TensorFlow: 3
#                 minutes, results and a picture in bench/out; ARGS='--only streaming' for a part
# make docs       builds the documentation in build/docs, and checks its links
# make lint       checks style, format, types, and the figures in the pages
# make clean      removes the environment and the build
#
# All use one environment, made on first use. A change in csrc/ rebuilds only the extension.
#   PYTHON=python3.12            the interpreter that makes the environment
#   TORCH=torch==2.14.1          the torch to build with, as a requirement for pip
#   TORCH_INDEX=URL              the package index for torch, instead of pip's default
#   VENV=.venv                   the folder of the environment
#   CUDA_TORCH=torch==2.14.1, CUDA_VENV=.venv-cuda    the same for test-cuda
#   VGPU=tests/vgpu/vgpu         the virtual GPU, used where there is no real one
#   ARGS='--window 60'           arguments to the example (demo) or to pytest (test)

PYTHON ?= python3
TORCH ?= torch==2.15.0
TORCH_INDEX ?=
VENV ?= .venv
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
VGPU ?= tests/vgpu/vgpu
CASES ?= 1000
ARGS ?=

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
# What pyproject.toml requires for a build.
requires := import re; \
    line = re.search("^requires = .*", open("pyproject.toml").read(), re.MULTILINE); \
    print(*map(repr, re.findall("\"([^\"]+)\"", line[0])))
build_tools = $(shell $(PYTHON) -c '$(requires)')
# With the folders, so that a removed file is a change.
sources := $(shell find csrc -not -name __pycache__ -not -name "*.pyc")
formatted := $(filter %.h %.cpp %.cu %.cuh,$(sources)) \
    $(wildcard bench/*.cpp tests/additions/*.h tests/barrier/*.cpp tests/mutations/*.cu) \
    $(wildcard tests/vgpu/runtime/*.h tests/vgpu/runtime/*.cpp tests/vgpu/tests/*/*.cu)
# The formatters do not wrap comments and prose: `make columns` checks their lines.
texts := $(formatted) Makefile .ci/run pyproject.toml $(wildcard *.md docs/*.md tests/vgpu/*.md)

# torch's build looks for ninja there.
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Packages outside the environment are not used.
export PYTHONNOUSERSITE := 1

.PHONY: demo examples test fuzz soak sanitize test-cuda on-a-gpu test-aarch64 cuda-all matrix \
    wheels bench docs lint columns clean FORCE

demo: $(VENV)/built
	$(python) examples/forecast.py $(ARGS)

results := examples/results
examples: $(VENV)/built
	@mkdir -p $(results)
	$(python) examples/simple_rnn.py --both-times --out $(results)/simple_rnn.png \
	    | tee $(results)/simple_rnn.txt
	$(python) examples/classify_text.py --both-times --out $(results)/classify_text.png \
	    | tee $(results)/classify_text.txt
	$(VENV)/bin/torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --both-times \
	    --out $(results)/train_ddp.png | tee $(results)/train_ddp.txt
	$(python) examples/tag_sequence.py --both-times --out $(results)/tag_sequence.png \
	    | tee $(results)/tag_sequence.txt
	$(python) examples/own_cell.py --both-times --out $(results)/own_cell.png \
	    | tee $(results)/own_cell.txt
	$(python) examples/translate.py --minutes 30 --both-times --out $(results)/translate.png \
	    | tee $(results)/translate.txt
	$(python) examples/generate.py --both-times --out $(results)/generate.png \
	    | tee $(results)/generate.txt
	$(python) examples/forecast.py --layer fastrnn --cell gru --horizon 5 --series sp500 nasdaq \
	    --folds 4 --both-times --out $(results)/forecast.png | tee $(results)/forecast.txt

test: $(VENV)/built
	$(python) -m pytest -n auto --maxprocesses 8 -m 'not slow' $(ARGS)

fuzz: $(VENV)/built
	while $(python) -m pytest tests/test_fuzz*.py --other-cases --fuzz $(CASES) \
	    $(ARGS); \
	    do :; done; false

soak: $(VENV)/built
	$(python) -m pytest tests/test_threads.py -k soak --soak 600 $(ARGS)

sanitize: $(VENV)/built
	$(python) tests/sanitizers.py $(ARGS)

test-cuda:
	+@$(MAKE) --no-print-directory on-a-gpu VENV='$(CUDA_VENV)' TORCH='$(CUDA_TORCH)'

gpu = $(shell nvidia-smi -L 2>/dev/null | head -n 1)
given_archs := $(TORCH_CUDA_ARCH_LIST)
on-a-gpu: export FASTRNN_CUDA := 1
# The virtual GPU runs PTX, and that of 8.0 also as a GPU of 9.0.
on-a-gpu: export TORCH_CUDA_ARCH_LIST = $(or $(given_archs),$(if $(gpu),,8.0+PTX))
on-a-gpu: $(VENV)/built
	@echo 'tests on $(or $(gpu),the virtual GPU $(VGPU))'
	$(if $(gpu),,$(VGPU) run --) $(python) -m pytest --device cuda -n auto --maxprocesses 8 \
	    -m 'not slow' $(ARGS)

kernels := $(patsubst csrc/cuda/%.cu,build/cuda/%.o,$(filter %.cu,$(sources)))
machine_code := $(foreach arch,75 80 86 89 90 100 120,-gencode arch=compute_$(arch),code=sm_$(arch))
cuda-all: $(kernels)
$(kernels): build/cuda/%.o: csrc/cuda/%.cu $(sources)
	@mkdir -p $(@D)
	nvcc -std=c++20 -O3 -lineinfo $(machine_code) -gencode arch=compute_120,code=compute_120 \
	    -c $< -o $@

test-aarch64: $(VENV)/built
	$(python) tests/aarch64/run.py $(ARGS)

matrix:
	$(PYTHON) tests/matrix.py $(ARGS)

wheels: $(VENV)/built
	$(pip) install --quiet 'fastrnn[wheels]'
	$(python) csrc/wheels.py dist $(ARGS)

bench: $(VENV)/peers
	$(python) bench/cpu.py --quick --json bench/out/cpu.json --picture bench/out/cpu.png $(ARGS)

docs: $(VENV)/linters
	$(python) -m sphinx --quiet --fail-on-warning --keep-going --conf-dir docs --builder html \
	    --doctree-dir build/doctrees . build/docs

lint: $(VENV)/linters columns
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(formatted)
	$(python) -m mypy
	$(python) bench/readme.py --check

# At most 100 columns, except in tables and pictures of Markdown; ruff checks Python.
columns:
	@! LC_ALL=C.UTF-8 grep -HnE '^.{101,}' $(texts) | grep -vE '^[^:]+\.md:[0-9]+: *(\||!\[)'

clean:
	rm -rf $(VENV) .venv-cuda build dist *.egg-info fastrnn/lib fastrnn/*.so

# --- the environment ------------------------------------------------------------------------------

# $(step) 'what is done' command: a line for each, with a bar where it takes long; the output is in
# build/make.log.
step := $(PYTHON) csrc/progress.py build/make.log
# $(call need,test,what is missing,Debian's package)
need = @{ $(1); } >/dev/null 2>&1 || { echo 'make: $(2): on Debian, apt install $(3)' >&2; exit 1; }

# What the environment is made from. The file changes only if the text does: then torch is installed
# again.
request := $(PYTHON) $(TORCH) $(TORCH_INDEX)
$(VENV)/request: FORCE
	@mkdir -p $(VENV)
	@echo '$(request)' | cmp -s - $@ || echo '$(request)' >$@

$(VENV)/torch: $(VENV)/request
	$(call need,$(PYTHON) -c 'import ensurepip$(comma) venv',$(PYTHON) has no venv,python3-venv)
	$(call need,test -e "$$($(PYTHON) -c '$(header)')",$(PYTHON) has no Python.h,python3-dev)
	$(call need,$${CXX:-g++} --version,there is no C++ compiler,g++)
	@$(step) 'creating the environment $(VENV)' \
	    $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	@$(step) 'installing what the build needs' $(pip) install $(build_tools)
	@$(step) 'installing $(TORCH)' \
	    $(pip) install $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	@echo '$(request)' >$(VENV)/request
	@touch $@
# The settings of the build: a change of one compiles what it concerns.
settings = $(CXX) $(CXXFLAGS) isas=$(FASTRNN_ISAS) cuda=$(FASTRNN_CUDA) $(TORCH_CUDA_ARCH_LIST)
$(VENV)/settings: $(VENV)/torch FORCE
	@echo '$(settings)' | cmp -s - $@ || echo '$(settings)' >$@

comma := ,
header := import sysconfig; print(sysconfig.get_path("include") + "/Python.h")

# Everything if the set-up changed. If only sources changed, what ninja finds that depends on them.
# Environments with different torch or Python share this folder: each has a binding in fastrnn/lib.
install = $(step) 'installing other packages' \
    $(pip) install --no-build-isolation --editable '.[test,demo]'
rebuild = $(step) 'compiling fastrnn' $(python) setup.py --quiet build_ext --inplace
$(VENV)/built: $(VENV)/torch $(VENV)/settings setup.py pyproject.toml $(sources)
	@$(rebuild)$(if $(filter-out $(VENV)/settings $(sources),$?), && $(install))
	@touch $@

# fastrnn is installed by then, so that pip fetches only its extras.
$(VENV)/linters: $(VENV)/torch setup.py | $(VENV)/built
	$(pip) install 'fastrnn[docs,lint]'
	@touch $@

$(VENV)/peers: $(VENV)/torch setup.py | $(VENV)/built
	$(pip) install 'fastrnn[bench]'
	@touch $@
