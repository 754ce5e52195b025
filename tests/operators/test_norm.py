"""Norms of images, and activations with a learned slope, in whole steps."""

import numpy as np
import pytest
import torch
from test_frontend import KEEP, export, part
from test_step import assert_like_torch, make_batches, masked_steps, relative
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_torch

BATCH = (3, 3, 9, 7)


class Normed(nn.Module):
    """Groups, instances with and without a scale of their own, all channels at once; slopes a channel and one for
    all, of features too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            *(nn.GroupNorm(2, 8), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.PReLU()),
            *(nn.Conv2d(8, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.ReLU(), nn.Conv2d(12, 8, 1)),
            *(nn.GroupNorm(1, 8), nn.SiLU()),
        )
        self.inner, self.slope, self.last = nn.Linear(8, 8), nn.PReLU(8, init=0.1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.slope(self.inner(self.body(x).mean((2, 3)))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("way", "target", "scheme"),
    [("torch", "local", "block"), ("onnx", "local", "unstructured"), ("torch", "opencl", "block")],
)
def test_three_steps_equal_torchs(way, target, scheme, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model, optimizer = Normed(), mest.SGD(lr=0.05, momentum=0.9)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # or a mix-up of ones and zeros would not show
            nn.init.uniform_(parameter, 0.2, 1)
    source = export(model, BATCH, tmp_path / "net.onnx", **KEEP) if way == "onnx" else model
    named = {"scheme": scheme, "sparsity": 0.5, "dense_layers": ["last"]}
    step = mest.compile(source, BATCH, optimizer=optimizer, target=target, **named)
    batches = make_batches(BATCH, 5, 3)
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, step.masks(), batches, 0.05, optimizer)
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4 or np.abs(wanted).max() < 1e-6, key  # a bias before a norm has none
    np.testing.assert_allclose([step(*batch, lr=0.05).loss for batch in batches], losses, rtol=1e-5)
    assert_like_torch(step, model, batches[0][0])
    if target == "local":
        mest.to_onnx(step, tmp_path / "out.onnx")
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
        assert relative(session.run(None, {"input": batches[0][0]})[0], step.predict(batches[0][0])) < 1e-4


def test_running_statistics_of_instances_are_refused():
    with pytest.raises(UnsupportedOperator, match="instance_norm"):
        from_torch(part(nn.InstanceNorm2d(4, track_running_stats=True)), (2, 3, 8, 8))
