# make venv | demo | test | lint | bench | device
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-for-pyproject
# Same bound as pyproject.toml. Torch comes first and alone, so that resolving the rest cannot exchange a CPU build for a CUDA one.
TORCH := torch>=2.9,<2.14

.PHONY: venv demo test lint bench device

venv: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: venv
	$(BIN)/mest-compile demo

# An emulated aarch64 device for the tests; what it needs of Debian's packages is installed when this runs as root.
device: .device/built

.device/built: tests/device/build.sh tests/device/rpcd.cc tests/device/icount.c pyproject.toml | venv
	PYTHON=$(abspath $(BIN)/python) tests/device/build.sh .device

test: venv device
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/run.py
