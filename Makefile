# make demo    train BAPO with QLoRA on a small real model, on a CPU, and look at it
# make test    the tests that take minutes     make test-all   also the slow ones
# make lint    ruff                            make bench      the benchmarks
#
# Every target installs what it needs into .venv first. Other Python: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
MODELS ?= .models
TESTS ?= tests
export PYTHON
export AXOLOTL_DO_NOT_TRACK = 1
BIN = $(abspath $(VENV))/bin
MODEL = $(MODELS)/SmolLM2-135M-Instruct
export BAPO_TEST_MODEL_DIR = $(abspath $(MODEL))

.PHONY: help install model demo test test-all test-gpu lint format bench
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

install:
	@.ci/install $(VENV)

model: install
	@test -e $(MODEL)/READY || $(BIN)/python yaml_examples/demo/prepare_model.py $(MODEL)

demo: model
	@PATH="$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/python yaml_examples/demo/demo.py

test: model
	@PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -m "not slow and not gpu" $(TESTS)

test-all: model
	@PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -m "not gpu" $(TESTS)

test-gpu: install
	@PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -m gpu tests/gpu

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install
	@$(BIN)/python benchmarks/kernel.py
