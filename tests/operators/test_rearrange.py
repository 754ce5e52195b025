"""Series, shuffles and tokens in whole steps: what is reshaped and permuted, and linear layers on it."""

import numpy as np
import pytest
import torch
from test_frontend import KEEP, assert_same, export, run_graph
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.frontend import from_onnx, from_torch


class Sensor(nn.Module):
    """A series: convolutions with strides, groups and dilation, normalisation, every pool."""

    shape = (3, 6, 41)

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv1d(6, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8)
        self.deep, self.wide = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8), nn.Conv1d(8, 12, 3)
        self.pool, self.mean, self.last = nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.mean(self.pool(F.gelu(self.wide(x + self.deep(x).relu()))))
        return self.last(F.adaptive_avg_pool1d(x, 1).flatten(1) + x.mean(2))


class Shuffled(nn.Module):
    """Channels, and pixels for channels and back; flattened with the channels last."""

    shape = (3, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.fine, self.coarse, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(16, 6, 1), nn.Linear(96, 5)

    def forward(self, x):
        x = self.stem(x)
        batch, channels, *size = x.shape
        x = x.view(batch, 2, channels // 2, *size).transpose(1, 2).reshape(batch, channels, *size)
        x = self.fine(F.pixel_shuffle(self.grouped(x.relu()), 2))
        x = self.coarse(F.pixel_unshuffle(x.relu(), 2))
        return self.last(x.permute(0, 2, 3, 1).flatten(1))


class Mixer(nn.Module):
    """Linear layers over tokens and over channels; a block of ConvNeXt between them."""

    shape = (3, 3, 12, 8)

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.out, self.back = nn.Linear(8, 16), nn.Linear(16, 8)
        self.over, self.under = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)
        self.wide, self.narrow, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.back(F.gelu(self.out(self.deep(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        x = x.flatten(2).transpose(1, 2)
        x = x + self.under(F.gelu(self.over(x.transpose(1, 2)))).transpose(1, 2)
        x = x + self.narrow(F.relu(self.wide(x)))
        return self.last(x.mean(1))


NETS = Sensor, Shuffled, Mixer


@pytest.mark.parametrize("net", NETS)
def test_the_graph_is_the_model(net):
    torch.manual_seed(0)
    module = net()
    assert_same(module, *from_torch(module, net.shape), net.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", NETS)
def test_a_file_says_the_same(net, tmp_path):
    module = net()
    (graph, _), (read, _) = (
        from_torch(module, net.shape),
        from_onnx(export(module, net.shape, tmp_path / "net.onnx", **KEEP), net.shape),
    )
    assert [(node.op, node.name) for node in read.nodes if node.op != "formula"] == [
        (node.op, node.name) for node in graph.nodes if node.op != "formula"
    ]


def test_what_is_only_seen_otherwise_is_not_copied():
    graph, _ = from_torch(Mixer(), Mixer.shape)
    assert [node.name for node in graph.nodes if node.op in ("rearrange", "flatten")] == ["rearrange_1", "rearrange_2"]
    assert {node.name: node.shape[1:] for node in graph.nodes if node.op == "linear"}["over"] == (10, 1, 8)
    graph, _ = from_torch(Sensor(), Sensor.shape)
    assert "rearrange" not in {node.op for node in graph.nodes}


STEPS = [
    (Sensor, "onnx", "local", "block:2x1"),
    (Mixer, "torch", "local", "unstructured"),
    (Shuffled, "onnx", "local", "unstructured"),
    (Shuffled, "torch", "opencl", "block:2x1"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("net", "way", "target", "scheme"), STEPS)
def test_three_steps_equal_torchs(net, way, target, scheme, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model, optimizer = net(), mest.SGD(lr=0.01, momentum=0.9)
    source = export(model, net.shape, tmp_path / "net.onnx", **KEEP) if way == "onnx" else model
    dense = [name for name in ("deep", "last") if hasattr(model, name)]
    named = {"scheme": scheme, "sparsity": 0.5, "dense_layers": dense}
    step = mest.compile(source, net.shape, optimizer=optimizer, target=target, **named)
    batches = make_batches(net.shape, 5, 3)
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, step.masks(), batches, 0.01, optimizer)
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4, key
    np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], losses, rtol=1e-5)
    model.eval()
    wanted = model(torch.from_numpy(batches[0][0])).detach().numpy()
    assert relative(step.predict(batches[0][0]), wanted) < 1e-4
    if target == "local":
        mest.to_onnx(step, tmp_path / "out.onnx")
        again = run_graph(*from_onnx(tmp_path / "out.onnx", net.shape), torch.from_numpy(batches[0][0]))
        assert relative(again.numpy(), wanted) < 1e-4
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input": batches[0][0]})
        assert relative(logits, wanted) < 1e-4
