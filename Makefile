# Every target makes the environment it needs; python3 (3.10 or later), make and a network are enough.
#
#   make demo      quantize the bundled model and compare (about three minutes on two cores)
#   make demo-finetune  an adapter on the bundled model, from JSONL to a merged 4-bit checkpoint
#   make test      the whole test suite
#   make test-interop  the formats with their real clients: llm-compressor, GPTQModel, llama.cpp, ...
#   make fuzz      damaged files for every reader, for an hour (docs/design/interop.md)
#   make lint      ruff and mypy
#   make sanitize  the tests of the native CPU kernels under AddressSanitizer and UBSan (needs g++)
#   make bench-gpu measure the kernels, a decoder and GPTQ on a GPU (docs/benchmarks-gpu.md)
#   make bench-cpu measure the kernels and a decoder on the CPU beside peers (docs/benchmarks-cpu.md)
#   make clean     remove the environment and everything generated
#
# Variables:
#   PYTHON=python3.12     the interpreter behind .venv
#   TORCH='...'           what pip installs as torch. On Linux the default brings CUDA, several GB.
#                         Without a GPU:
#     make demo TORCH='torch --extra-index-url https://download.pytorch.org/whl/cpu'
#   CXX=clang++           what compiles the native CPU kernels; without a compiler there are none
#   BENCH_PYTHON=python3  what runs bench-gpu, instead of .venv: nothing is installed then
#   BENCH='--tune'        arguments of bench-gpu or bench-cpu
#   FUZZ=10               minutes of fuzz
#   INTEROP='--clients gptqmodel'  arguments of scripts/interop.py

PYTHON ?= python3
TORCH ?= torch

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BENCH_PYTHON ?= $(BIN)/python
BENCH ?=
FUZZ ?= 60
INTEROP ?=
NATIVE := kernels/lowbit_kernels/cpu

.PHONY: help demo demo-finetune test test-interop fuzz lint sanitize bench-gpu bench-cpu clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#   /s/^#//p' Makefile

demo: $(VENV)/compiled
	$(BIN)/python scripts/demo.py

demo-finetune: $(VENV)/installed-finetune $(VENV)/compiled
	$(BIN)/python scripts/demo_finetune.py

test: $(VENV)/installed-dev $(VENV)/compiled
	$(BIN)/python -m pytest

test-interop: $(VENV)/installed-dev $(VENV)/compiled
	$(BIN)/python -m scripts.interop $(INTEROP)

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m scripts.fuzz_formats --minutes $(FUZZ)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(VENV)/installed-dev
	$(BIN)/python scripts/sanitize.py

bench-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/installed-bench)
	$(BENCH_PYTHON) kernels/benchmarks/gpu.py $(BENCH)

bench-cpu: $(VENV)/installed-bench $(VENV)/compiled
	$(BIN)/python kernels/benchmarks/cpu.py $(BENCH)

clean:
	rm -rf $(VENV) build dist demo-output demo-finetune bench-gpu bench-cpu fuzz-findings .interop .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf $(NATIVE)/liblowbit.* $(NATIVE)/.lowbit-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than what they were made from, so a second call costs nothing.
$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing lowbit into $(VENV) (make TORCH=... chooses another torch, see Makefile)"
	$(PIP) $(TORCH) -e .
	@touch $@

# Installing compiled the native kernels; this does it again when their sources have changed. Status 2
# is a compiler that is missing or refuses them: lowbit works without, and a test of theirs fails.
$(VENV)/compiled: $(VENV)/installed $(NATIVE)/build.py $(wildcard $(NATIVE)/src/*)
	$(BIN)/python -m lowbit_kernels.cpu.build || [ $$? -eq 2 ]
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing the tools for tests and lint into $(VENV)"
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/installed-finetune: $(VENV)/installed
	@echo "installing PEFT and what draws loss curves into $(VENV)"
	$(PIP) -e '.[finetune,plot]'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	@echo "installing what the benchmarks draw with into $(VENV)"
	$(PIP) -e '.[bench]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: $(PYTHON) not found; install Python 3.10 or later, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) --version 2>&1) is too old; set PYTHON= to 3.10 or later" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) lacks venv; install it (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
