# Two commands are enough: `make demo` and `make test`. Each makes the environment in .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# tests that run Triton kernels: on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter
KERNEL_TESTS := $(addprefix tests/,ops/test_gated_retention_triton.py ops/test_gated_retention_step.py \
	ops/test_gated_delta_step.py ops/test_decode_linear.py ops/test_decode_attention.py ops/test_linear_cross_entropy.py ops/test_float8_triton.py \
	models/test_step_graph.py models/test_float8_parts.py)

.PHONY: demo test lint types imports unit test-slow test-interop test-kernels test-gpu bench clean

demo: $(STAMP)  ## train a small YOCO and a Transformer, read a book, compare: about 5 minutes
	$(BIN)/oncelm demo

test: lint types imports unit  ## everything that must be green

# torch comes first and alone: on a machine without a GPU a later release would bring gigabytes of CUDA libraries
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"OnceLM needs Python 3.11 or newer, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --durations 10

test-slow: $(STAMP)  ## tests of more than a few seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto -m slow --ignore tests/interop

test-interop: $(STAMP)  ## Trainer, TRL, PEFT, bitsandbytes and accelerate, each beside transformers' Llama
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[interop]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto -m slow tests/interop

test-kernels: $(STAMP)  ## the Triton kernels in Triton's interpreter, on the CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "triton==3.7.1"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto $(KERNEL_TESTS)

test-gpu: $(STAMP)  ## tests that need a CUDA device, then each op's gate and times
	$(BIN)/python -m pytest -m gpu
	$(BIN)/oncelm bench ops --device cuda

bench: $(STAMP)  ## the figures of README.md, on this machine
	$(BIN)/oncelm bench prefill
	$(BIN)/oncelm bench decode

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
