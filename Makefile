# Every target does its own set-up on a machine that has python3, venv, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= demo-out

# Shared machines: waiting threads must sleep, not spin.
export OMP_WAIT_POLICY := PASSIVE
export OPENBLAS_NUM_THREADS := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install demo test lint bench gpu-check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/dit-accel compare "a red circle moving right" --sla balanced --crossover never \
		--overwrite --output-dir $(DEMO_OUT)

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python kernels/bench_attention.py --output kernels/results/cpu.json

gpu-check: install
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python kernels/bench_attention.py --device cuda --output kernels/results/gpu.json

clean:
	rm -rf $(VENV) $(DEMO_OUT)
