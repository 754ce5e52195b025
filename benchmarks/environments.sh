#!/usr/bin/env bash
# Environments of rivals whose versions cannot live beside ours: benchmarks/environments.sh [NAME ...]; no name makes all of them.
# Each becomes a virtual environment benchmarks/environments/NAME, where the benchmarks look for it. FOLDER=... puts them elsewhere,
# PYTHON=... chooses the interpreter. Every version that the timings depend on is pinned here.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${FOLDER:-$here/environments}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
torch="torch>=2.9,<2.14"   # the bound of the Makefile: all sides run the same torch

fresh() {  # a new virtual environment with torch, alone and first, so that resolving the rest cannot exchange its build
    "$python" -m venv --clear "$folder/$1"
    "$folder/$1/bin/python" -m pip install --quiet "$torch"
}

sparseprop() {  # built from source with the machine's C++ compiler; needs AVX2
    fresh sparseprop
    "$folder/sparseprop/bin/python" -m pip install --quiet "numpy>=2,<3" "scipy>=1.11,<2" "pybind11>=2.13,<3" "setuptools>=77,<81" wheel
    "$folder/sparseprop/bin/python" -m pip install --quiet --no-build-isolation --no-deps sparseprop==0.1.14
    "$folder/sparseprop/bin/python" -c "import sparseprop.utils"
}

onnxruntime_training() {
    fresh onnxruntime-training
    "$folder/onnxruntime-training/bin/python" -m pip install --quiet onnx==1.16.2 onnxruntime-training==1.19.2
    "$folder/onnxruntime-training/bin/python" -c "import onnxruntime.training.artifacts"
}

coverage() {  # no environment of its own: packages that benchmarks/coverage.py puts behind those of the one it runs in, and its torch
    rm -rf "$folder/coverage"
    "$python" -m pip install --quiet --no-deps --target "$folder/coverage" timm==1.0.31 torchvision==0.28.0
    "$python" -m pip install --quiet --upgrade --target "$folder/coverage" transformers==5.24.0
}

for name in "${@:-sparseprop onnxruntime-training coverage}"; do
    for one in $name; do
        case $one in
            sparseprop | onnxruntime-training | coverage) "${one//-/_}" ;;
            *) echo "no environment $one; there are: sparseprop onnxruntime-training coverage" >&2; exit 2 ;;
        esac
        echo "$folder/$one"
    done
done
