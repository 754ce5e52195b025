#!/usr/bin/env bash
# apache-tvm 0.27.0.post1: code for a CPU tells LLVM that sums and products of uint32 never have more than 32 bits (nuw), so that what follows from them
# is folded as if they had not: hashes and random number generators, which are made of such products, give other numbers than numpy, C and TVM's own
# OpenCL code. What comes out is silently wrong where LLVM uses the promise, as in a comparison with a constant, and right elsewhere. Products in uint64,
# cast back to uint32, are right.
# Seen: of 1,024 products compared with 2**30 numpy finds 727 at least as large, TVM all 1,024; of sums 744 and 1,024; 727 in uint64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 numpy==2.3.3
cat >"$folder/run.py" <<'PYTHON'
import numpy as np
import tvm
from tvm.script import tirx as T


@T.prim_func
def product(x: T.Buffer((1024,), "uint32"), y: T.Buffer((1024,), "int32")):
    for i in range(1024):
        y[i] = T.Select(x[i] * T.uint32(2221713035) >= T.uint32(1073741824), 1, 0)


@T.prim_func
def total(x: T.Buffer((1024,), "uint32"), y: T.Buffer((1024,), "int32")):
    for i in range(1024):
        y[i] = T.Select(x[i] + T.uint32(2221713035) >= T.uint32(1073741824), 1, 0)


@T.prim_func
def wider(x: T.Buffer((1024,), "uint32"), y: T.Buffer((1024,), "int32")):
    for i in range(1024):
        whole = T.cast(T.cast(x[i], "uint64") * T.uint64(2221713035), "uint32")
        y[i] = T.Select(whole >= T.uint32(1073741824), 1, 0)


def counted(function):
    module = tvm.compile(tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")}), target="llvm")
    found = tvm.runtime.tensor(np.zeros(1024, np.int32))
    module["kernel"](tvm.runtime.tensor(numbers), found)
    return int(found.numpy().sum())


numbers = np.random.default_rng(0).integers(0, 2**32, 1024, dtype=np.uint32)
factor, bound = np.uint32(2221713035), np.uint32(2**30)
products, sums = int((numbers * factor >= bound).sum()), int((numbers + factor >= bound).sum())
print("numpy: products", products, "sums", sums)
print("TVM: products", counted(product), "sums", counted(total), "products in uint64", counted(wider))
assert counted(wider) == products == 727
assert counted(product) == 1024 != products
assert counted(total) == 1024 != sums
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
