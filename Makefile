# Paths are relative, so that a directory with a space in its name works.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARCHITECTURES := $(notdir $(patsubst %/__init__.py,%,$(wildcard models/*/__init__.py)))

# The environments of test-versions; REPORT names one whose failure is a line of the output and no failure of make.
VERSIONS ?= floor pinned newest newest-torch
REPORT ?=
STEPS ?= 10000
TRIES ?= 10000
SEED ?= 0
# The commit that compare compares with: the newest, for what is not committed yet.
BASE ?= HEAD
# What bench-engines compares with, on which models and texts, and further flags of benchmarks/engines.py.
ENGINES ?= openvino llama_cpp vllm
# Those that test-engines lets load what is written for them.
TESTED ?= llama_cpp vllm openvino $(LIGHT)
# Those of them that test-engines-reported makes: they install in under 3 minutes together.
LIGHT ?= \
    onnxruntime_genai gptqmodel sglang torchao lmdeploy_0.18.0 msmodelslim vllm_ascend_0.23.0 vllm_ascend_0.25.1rc1
ENGINE_STAMPS := $(ENGINES:%=.cache/engines/%/.installed)
MODELS ?=
EVAL ?=
CALIB ?=
FLAGS ?=

.PHONY: help setup setup-test demo test test-engines test-engines-reported test-versions stateful campaign compare check format bench bench-engines clean

help:
	@echo "make setup          make .venv and install everything into it"
	@echo "make demo           fetch SmolLM2-135M, convert it, and compare it with the float model (under 4 minutes on 2 cores)"
	@echo "make test           run the tests"
	@echo "make test-engines   make environments of other engines, and let them load and run what is written for them"
	@echo "make test-versions  run the contract with the oldest, the pinned and the newest transformers, and the newest torch"
	@echo "make stateful       run random sequences of cache operations, STEPS=$(STEPS) of them for each scheme"
	@echo "make campaign       damage outputs, sources, files, flags and calls of ops, TRIES=$(TRIES) times from SEED=$(SEED) on"
	@echo "make compare        convert tiny models with the scripts of a commit, BASE=COMMIT, and of this tree, and say what differs"
	@echo "make check          lint, and check that the code can be bundled"
	@echo "make bench          time ops and models on this machine"
	@echo "make bench-engines  make environments of other engines, and measure MODELS beside them on the texts EVAL and CALIB"
	@echo "make clean          remove .venv and .cache, and say what is left in the home directory"

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('error: the pinned versions need Python 3.11 or newer, and this is ' + sys.version.split()[0] + '; make setup PYTHON=python3.12')"
	@echo "making .venv"
	$(PYTHON) -m venv .venv
	@echo "installing torch and what else requirements.txt names: 0.2 GB to 3 GB, the latter where pip takes torch for CUDA"
	$(PIP) install --requirement requirements.txt
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

setup-test: .venv/.installed-test

.venv/.installed-test: .venv/.installed requirements-test.txt
	$(PIP) install --requirement requirements-test.txt
	touch $@

demo: setup
	@$(BIN)/python examples/demo.py

test: setup-test
	smollm2="$$($(BIN)/python examples/fetch_smollm2.py)" && OCTAVO_SMOLLM2="$$smollm2" $(BIN)/python -m pytest -q

test-engines: setup-test $(TESTED:%=.cache/engines/%/.installed)
	$(BIN)/python -m pytest -q -rs tests/engines

# An environment that the package index cannot serve is a line of the output, and its tests skip.
test-engines-reported: setup-test
	for engine in $(LIGHT); do $(MAKE) .cache/engines/$$engine/.installed || echo "engines: $$engine: NOT MADE (reported only)"; done
	$(BIN)/python -m pytest -q -rs tests/engines

test-versions: setup-test
	$(BIN)/python tests/versions/environments.py $(VERSIONS) $(addprefix --report ,$(REPORT))

stateful: setup-test
	OCTAVO_STATEFUL_STEPS=$(STEPS) $(BIN)/python -m pytest -q -s tests/common/runtime/cache/test_stateful.py

campaign: setup-test
	$(BIN)/python -m tests.campaign --tries $(TRIES) --seed $(SEED)

compare: setup-test
	$(BIN)/python -m tests.comparison since $(BASE)

check: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for arch in $(ARCHITECTURES); do $(BIN)/python -m octavo.common.convert.output.bundle --arch $$arch --out .cache/bundle || exit 1; done

format: setup-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/run.py --device cpu

bench-engines: setup $(ENGINE_STAMPS)
ifneq ($(and $(MODELS),$(EVAL),$(CALIB)),)
	$(BIN)/python benchmarks/engines.py --models $(MODELS) --eval_file $(EVAL) --calib_file $(CALIB) $(FLAGS)
else
	@echo "to measure: make bench-engines MODELS='DIR ...' EVAL=TEXT CALIB=TEXTS FLAGS=..."
endif

# llama.cpp is built here, for 10 minutes and more; pip's cache would hand one build to both environments of it.
.cache/engines/llama_cpp/.installed .cache/engines/llama_cpp_avx2/.installed: export PIP_NO_CACHE_DIR := 1
.cache/engines/llama_cpp/.installed: export CMAKE_ARGS := -DGGML_NATIVE=ON
.cache/engines/llama_cpp_avx2/.installed: export CMAKE_ARGS := \
    -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF

.cache/engines/%/.installed: benchmarks/engines/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --no-deps --requirement $<
	touch $@

# These need the torch and transformers of .venv beside them.
BESIDE := gptqmodel msmodelslim onnxruntime_genai sglang torchao
$(BESIDE:%=.cache/engines/%/.installed): .cache/engines/%/.installed: benchmarks/engines/%.txt
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps --upgrade --target $(@D) --requirement $<
	touch $@

# Of vllm-ascend, which runs on NPUs alone, the wheel's own Python is imported as far as it goes without.
.cache/engines/vllm_ascend_%/.installed:
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps --target $(@D) vllm-ascend==$*
	touch $@

# Of LMDeploy, whose library needs CUDA, likewise.
.cache/engines/lmdeploy_%/.installed:
	$(BIN)/python -m pip --disable-pip-version-check install --no-deps --target $(@D) lmdeploy==$*
	touch $@

# Compiled kernels and the demo's model, and transformers' copies of the code of directories that were loaded.
clean:
	rm -rf .venv .cache
	@for left in "$$HOME/.cache/octavo" "$$HOME/.cache/huggingface/modules/transformers_modules"; do \
	    if [ -e "$$left" ]; then echo "left in the home directory; to remove it: rm -r '$$left'"; fi; done
