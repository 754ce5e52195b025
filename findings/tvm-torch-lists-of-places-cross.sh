#!/usr/bin/env bash
# apache-tvm 0.27.0.post1, relax.frontend.torch: `x[:, rows, columns]`, where two index tensors of one shape name an element each, is imported as one
# `take` after another, which gives every row with every column: of two rows and two columns four values an example, not two, without a word. Two index
# tensors that stand first, `x[rows, columns]`, are read as torch reads them.
# Seen: torch gives (2, 2), the imported module (2, 2, 2), whose diagonal torch's values are; `x[rows, columns]` gives the same as torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.3 apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
import torch
import tvm
from torch import nn
from tvm.relax.frontend.torch import from_exported_program

warnings.simplefilter("ignore")


class Pairs(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = first
        self.register_buffer("rows", torch.tensor([0, 1]))
        self.register_buffer("columns", torch.tensor([0, 2]))

    def forward(self, x):
        return x[self.rows, self.columns] if self.first else x[:, self.rows, self.columns]


def imported(module, x):
    compiled = tvm.compile(from_exported_program(torch.export.export(module, (x,))), target="llvm")
    found = tvm.relax.VirtualMachine(compiled, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy()))
    return (found if hasattr(found, "numpy") else found[0]).numpy()


x = torch.arange(24.0).reshape(2, 3, 4)
wanted, found = Pairs(False)(x).numpy(), imported(Pairs(False), x)
print("x[:, rows, columns]: torch", wanted.shape, "imported", found.shape)
assert wanted.shape == (2, 2) and found.shape == (2, 2, 2)
assert np.array_equal(np.stack([found[:, 0, 0], found[:, 1, 1]], 1), wanted)
assert np.array_equal(Pairs(True)(x).numpy(), imported(Pairs(True), x))
PYTHON
