"""What a step needs that was compiled before: TVM's runtime, neither its compiler nor torch."""

import subprocess
import sys

import numpy as np

from mest_compile.hardware.tvmruntime import ALIGN_BYTES, tensor

AGAIN = """
import sys
import numpy as np
import mest_compile as mest
step = mest.compile("mlp", (8, 64), sparsity=0.5, threads=1)
loss = step(np.ones((8, 64), np.float32), np.arange(8)).loss
print(loss, sorted({"torch", "tvm"} & set(sys.modules)))
"""


def test_compiling_a_built_in_model_again_imports_neither_torch_nor_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = [
        subprocess.run([sys.executable, "-c", AGAIN], stdout=subprocess.PIPE, text=True, check=True).stdout.split(
            " ", 1
        )
        for _ in range(2)
    ]
    assert [modules.strip() for _, modules in said] == ["['torch', 'tvm']", "[]"]
    assert said[0][0] == said[1][0]


def test_a_tensor_lies_in_its_array_where_vectors_want_it():
    array, inside = tensor(5, np.dtype("float32"))
    array[...] = 3
    assert np.from_dlpack(inside).tolist() == [3] * 5 and array.ctypes.data % ALIGN_BYTES == 0
