#!/usr/bin/env bash
# apache-tvm 0.27.0.post1: a kernel of `T.Buffer` arguments refuses a tensor that begins inside another one's memory. `Tensor._create_view` gives such a
# tensor, and `alloc_tensor` of the virtual machine does with an offset; DLPack says that its elements begin `byte_offset` behind `data`. Copying the view
# reads the right elements, and a copy of it is taken. Memory that a plan cuts into pieces by offsets is therefore of no use to kernels as they are.
# Seen: view.numpy() is [32. 33. 34. 35.]; the kernel on it raises ValueError "Invalid x.byte_offset on argument #0 ... expected 0"; on a copy it answers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.3.3 apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1
cat > "$folder/views.py" <<'PYTHON'
import numpy as np
import tvm
from tvm.script import tirx as T


@T.prim_func
def double(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")):
    for i in range(4):
        y[i] = x[i] * T.float32(2)


kernel = tvm.compile(double, target="llvm")
whole = tvm.runtime.tensor(np.arange(36, dtype="float32"))
view = whole._create_view((4,), "float32", 128)
answer = tvm.runtime.tensor(np.zeros(4, "float32"))
print("the view", view.numpy())
assert np.array_equal(view.numpy(), [32, 33, 34, 35])
kernel(tvm.runtime.tensor(view.numpy()), answer)
assert np.array_equal(answer.numpy(), [64, 66, 68, 70])
try:
    kernel(view, answer)
except ValueError as error:
    print(error)
    assert "byte_offset" in str(error) and "expected 0" in str(error)
else:
    raise SystemExit(f"the kernel takes views: {answer.numpy()}")
PYTHON
"$folder/venv/bin/python" "$folder/views.py"
