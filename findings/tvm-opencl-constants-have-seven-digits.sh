#!/usr/bin/env bash
# apache-tvm 0.27.0.post1 writes float32 constants into OpenCL C with seven significant digits; telling a float32 from its neighbours takes nine.
# A kernel computes with other numbers than its TIR holds, without a word. Code for a CPU has them exactly.
# Seen: 1.0000001192092896 (the float32 after 1) becomes 1.000000e+00f, 16777215 becomes 1.677722e+07f, which is 16777220.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1 numpy==2.3.3
"$folder/venv/bin/python" - <<'PYTHON'
import tvm
from tvm.script import tirx as T

text = '''
@T.prim_func(s_tir=True)
def f(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
    T.func_attr({"global_symbol": "f"})
    for i in T.thread_binding(64, thread="threadIdx.x"):
        y[i] = x[i] * T.float32(1.00000012) + T.float32(16777215)
'''
function = tvm.script.from_source(text, extra_vars={"T": T})
target = tvm.target.Target({"kind": "opencl"}, host={"kind": "llvm"})
source = str(tvm.compile(tvm.IRModule({"f": function}), target=target).mod.imports[0].inspect_source())
(line,) = [line.strip() for line in source.splitlines() if "y_ptr[" in line]
print(line)
assert "1.000000e+00f" in line and "1.677722e+07f" in line
PYTHON
