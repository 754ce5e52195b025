# `make help` lists the targets: the ## comments behind their names.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-for-pyproject
# The torch of the recorded figures, within the bound of pyproject.toml. It comes first and alone, so that resolving the rest cannot exchange a CPU build for a CUDA one.
TORCH := torch>=2.9,<2.14

.PHONY: venv demo test test-quick test-thorough lint bench docs device help

venv: $(STAMP) ## the project's own virtual environment in .venv

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: venv ## fine-tune a pretrained mobile net to drawn digits, beside dense torch
	$(BIN)/python -m pip install --quiet -e ".[pretrained]"
	$(BIN)/mest-compile demo

# An emulated aarch64 device for the tests; what it needs of Debian's packages is installed when this runs as root.
device: .device/built ## an emulated aarch64 device for the tests

.device/built: tests/device/build.sh tests/device/rpcd.cc tests/device/icount.c pyproject.toml | venv
	PYTHON=$(abspath $(BIN)/python) tests/device/build.sh .device

test: venv device ## the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not thorough"

# Before a release.
test-thorough: venv device ## all tests, with those that take long and ask further cases of the same
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# What pre-commit asks before a push.
test-quick: venv ## the quick tests that need neither an emulated device nor OpenCL, of kernels those in float32
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not (opencl or device or docs or slow or thorough)" -k "not float16"

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv ## the published figures, measured on this machine
	$(BIN)/python benchmarks/run.py

# -E: docstrings are read anew, whose files Sphinx does not watch.
docs: venv ## the site, in build/site
	$(BIN)/python -m sphinx -W --keep-going -q -E -d build/trees -c docs . build/site
	@echo build/site/index.html

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12
