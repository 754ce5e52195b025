#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export, as it is by default, folds a BatchNorm2d into the convolution before it and leaves the changed
# weight the name that the module's own has. A file that holds "conv.weight" thus holds another array than state_dict()["conv.weight"], and whoever goes
# by names (weights back into the module, training from the file) has a net without its normalisation. torch's older exporter (dynamo=False) gives folded
# weights names of their own.
# Seen: no BatchNormalization in the file, and "conv.weight" is 3 times the module's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.3 onnx==1.19.0 onnxscript==0.7.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.0)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, x):
        return self.norm(self.conv(x))


net = Net().eval()
torch.onnx.export(net, (torch.zeros(1, 3, 6, 6),), "net.onnx")
graph = onnx.load("net.onnx").graph
held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
print([node.op_type for node in graph.node], sorted(held))
own = net.state_dict()["conv.weight"].numpy()
print("conv.weight in the file, by the module's own:", float((held["conv.weight"] / own).mean()))
assert "BatchNormalization" not in [node.op_type for node in graph.node]
assert np.allclose(held["conv.weight"], 3 * own, rtol=1e-5) and not np.allclose(held["conv.weight"], own)
PYTHON
