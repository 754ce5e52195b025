#!/usr/bin/env bash
# torch 2.13.0, torch.onnx.export(dynamo=False): `-(-n // 2)`, half of a size rounded up, is written as Neg, Div, Neg of int64, and ONNX's Div of whole
# numbers rounds towards zero where Python's // rounds down. Of an odd size the file computes the lower half, so that it gives another shape than the
# module, without a word. Padding "SAME" is often computed like this.
# Seen: the module gives 3 of 5 columns, its file 2 (onnxruntime 1.32.0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.3 onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import onnx
import onnxruntime
import torch
from torch import nn

warnings.simplefilter("ignore")


class Half(nn.Module):
    def forward(self, x):
        return x[:, : -(-x.shape[1] // 2)]


x = torch.arange(5.0).reshape(1, 5)
torch.onnx.export(Half(), (x,), "half.onnx", dynamo=False, input_names=["x"], dynamic_axes={"x": {1: "columns"}})
operators = [node.op_type for node in onnx.load("half.onnx").graph.node]
(found,) = onnxruntime.InferenceSession("half.onnx").run(None, {"x": x.numpy()})
print(operators, "module:", tuple(Half()(x).shape), "file:", found.shape)
assert operators.count("Neg") == 2 and operators.count("Div") == 1
assert tuple(Half()(x).shape) == (1, 3) and found.shape == (1, 2)
PYTHON
