# make demo    train a small real model with DPO and with BAPO, on a CPU, and compare them
# make test    the tests that take minutes     make test-all   also the slow ones
# make lint    ruff                            make bench      the benchmarks
# make audit   bandit over the code, pip-audit over the locks (asks PyPI)
# make test-versions     the quick tests with each supported axolotl: 0.19, 0.20, 0.21
# make docs    the documents as a site in build/site
# make fuzz    10,000 mutated YAMLs and rows; another number or seed: make fuzz BAPO_FUZZ=1000 BAPO_FUZZ_SEED=2
# make test-deepspeed    two processes under ZeRO-1, 2 and 3, with DeepSpeed in an environment of its own
#
# Every target installs what it needs into .venv first. Another Python: make demo PYTHON=python3.12
VENV ?= .venv
MODELS ?= .models
TESTS ?= tests
# processes that the tests are spread over; together they use all cores
WORKERS ?= 2
CORES = $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo $(WORKERS))
SPREAD = OMP_NUM_THREADS=$$(( ($(CORES) + $(WORKERS) - 1) / $(WORKERS) )) python -m pytest -n $(WORKERS) --dist worksteal
DEEPSPEED_TESTS ?= -m "not gpu"
export PYTHON AXOLOTL
export AXOLOTL_DO_NOT_TRACK = 1
BIN = $(VENV)/bin
MODEL = $(MODELS)/SmolLM2-135M-Instruct
RUN = PATH="$$(cd "$(BIN)" && pwd):$$PATH"

.PHONY: help install model demo test test-all test-versions test-deepspeed test-gpu fuzz lint audit format docs bench
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -10

install:
	@.ci/install "$(VENV)"

model: install
	@test -e "$(MODEL)/READY" || "$(BIN)/python" yaml_examples/demo/prepare_model.py "$(MODEL)"

# the demo's YAML is for a CPU, so a GPU is hidden from it
demo: model
	@$(RUN) HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= python yaml_examples/demo/demo.py

test: model
	@$(RUN) BAPO_TEST_MODEL_DIR="$$(cd "$(MODEL)" && pwd)" $(SPREAD) -m "not slow and not gpu" $(TESTS)

test-all: model test-deepspeed test-versions
	@$(RUN) BAPO_TEST_MODEL_DIR="$$(cd "$(MODEL)" && pwd)" $(SPREAD) -m "not gpu" $(TESTS)

test-versions: install
	@.ci/test-versions "$(VENV)"

# only here, since transformers behaves otherwise where DeepSpeed is installed
test-deepspeed: install
	@.ci/install-deepspeed "$(VENV)"
	@PATH="$$(cd "$(VENV)-deepspeed/bin" && pwd):$$PATH" python -m pytest $(DEEPSPEED_TESTS) tests/integration/test_distributed.py -k zero

BAPO_FUZZ ?= 10000
BAPO_FUZZ_SEED ?= 1
fuzz: install
	@$(RUN) BAPO_FUZZ=$(BAPO_FUZZ) BAPO_FUZZ_SEED=$(BAPO_FUZZ_SEED) python -m pytest -rP --show-capture=stdout -W ignore $(TESTS)/fuzz

test-gpu: install
	@$(RUN) python -m pytest -m gpu tests/gpu

lint: install
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

audit:
	@.ci/audit "$(VENV)"

format: install
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

# needs neither axolotl nor torch
docs:
	@.ci/install-docs "$(VENV)"
	@python3 .ci/build-docs "$(VENV)-docs/bin/mkdocs"
	@echo "Open build/site/index.html"

bench: model
	@$(RUN) python benchmarks/kernel.py
	@$(RUN) python benchmarks/step.py --model "$(MODEL)"
	@$(RUN) python benchmarks/anchors.py --model "$(MODEL)"
	@$(RUN) python benchmarks/prepare.py --model "$(MODEL)" --rows 1000 --turns 1 --output "$(VENV)/prepare.csv"
	@$(RUN) python benchmarks/forgetting.py --model "$(MODEL)" --quick
	@$(RUN) python benchmarks/proposition.py --quick
