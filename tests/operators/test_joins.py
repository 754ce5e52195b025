"""Concatenations, parts, padding, uneven pools and other sizes, in whole steps."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_frontend import KEEP, export, run_graph
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.frontend import from_torch, import_model


class Joined(nn.Module):
    """Concatenations of channels, rows, columns and features, a value twice in one, parts of all of these, with steps
    and of parts; padding of pixels and channels, by other numbers and by less than nothing."""

    def __init__(self):
        super().__init__()
        self.stem, self.split = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(26, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        first, second = self.split(x).split([2, 4], 1)
        y = torch.cat([x, first, second[:, ::2], x[:, 4:6], x], 1)  # 22
        y = torch.cat([y[:, :, 2:-1], y[:, :, :3]], 2)
        y = torch.cat([y, F.pad(x[:, :, ::2, 1::2], (3, 2, 2, 2, 1, 0))[:, 1:5]], 1)  # 26
        y = y[:, :, 1:, 1:] + F.pad(y, (-2, 1, 0, -1), value=0.5)
        y = y.mean((2, 3))
        return self.last(torch.cat([y[:, 13:], y[:, :13]], 1))


class Same(nn.Module):
    """Padding as TensorFlow's nets have it, taken in by convolutions: dense, depthwise, of stride 2 on even sizes, and
    on top of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        self.pad, self.deep = nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(8, 8, 5, 2, groups=8, bias=False)
        self.point, self.none = nn.Conv2d(8, 12, 3, 2, padding=1), nn.ZeroPad2d(0)
        self.even, self.last = nn.Conv2d(12, 12, 2, padding="same"), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu(self.point(F.pad(self.none(self.deep(self.pad(x))), (0, 1, 1, 0))))
        return self.last(self.even(x).relu().mean((2, 3)))


class Pooled(nn.Module):
    """Pools whose windows leave the image, with padding that counts and that does not, and adaptive ones."""

    def __init__(self, adaptive=True):
        super().__init__()
        self.stem, self.last, self.adaptive = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6, 5), adaptive

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, ceil_mode=True)
        x = x + F.avg_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = torch.cat([F.avg_pool2d(x, 2, 2, ceil_mode=True), F.max_pool2d(x, (2, 3), 2, (0, 1), ceil_mode=True)], 2)
        x = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)
        y = F.adaptive_avg_pool2d(x, (2, 3)) if self.adaptive else x[:, :, :2, :3]
        return self.last(y.flatten(1))


class Resized(nn.Module):
    """Images of another size, one way after the other."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.interpolate(x, scale_factor=2) * F.interpolate(x, scale_factor=2.0, mode="bilinear")
        y = self.mix(F.interpolate(y, size=(7, 11), mode="bilinear", align_corners=True)) + F.interpolate(
            y, size=(5, 9)
        )
        return self.last(F.interpolate(y, scale_factor=1.5, mode="bilinear").mean((2, 3)))


class Series(nn.Module):
    """Convolutions that see the past alone, as those of temporal nets; parts of series and of tokens, the
    last of them by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, dilation=2)
        self.mix, self.last = nn.Linear(8, 8), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.first(F.pad(x, (2, 0))))
        x = torch.cat([x[..., 1:], F.relu(self.second(F.pad(x, (4, 0))))[..., :-1]], 1)
        first, second = x.chunk(2, 1)
        tokens = torch.cat([first, F.pad(second, (1, 0), value=0.5)[:, :, ::2]], 2).transpose(1, 2)
        tokens = self.mix(tokens)[:, 1:]
        return self.last(torch.cat([tokens.mean(1), tokens[:, -3:].mean(1) + tokens[:, -1]], 1))


def same_as_torch(model, source, shape, tmp_path, target="local", onnx=True, classes=5, **options):
    """Three steps, gradients and predictions; what is written to ONNX predicts the same."""
    options = {"scheme": "unstructured", "sparsity": 0.5, "dense_layers": ["last"]} | options
    step = mest.compile(source, shape, target=target, **options)
    batches = make_batches(shape, classes, 3)
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, step.masks(), batches, 0.01, mest.SGD())
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4, key
    np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], losses, rtol=1e-4)
    model.eval()
    with torch.no_grad():
        wanted = model(torch.from_numpy(batches[0][0])).numpy()
    assert relative(step.predict(batches[0][0]), wanted) < 1e-4
    if onnx and target == "local":
        mest.to_onnx(step, tmp_path / "out.onnx")
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input": batches[0][0]})
        assert relative(logits, wanted) < 1e-4
    return step


NETS = {
    "joined": (Joined, 9),
    "same": (Same, 16),
    "pooled": (Pooled, 16),
    "resized": (Resized, 7),
    "series": (Series, 11),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NETS)
def test_three_steps_equal_torchs(name, tmp_path):
    torch.manual_seed(0)
    kind, size = NETS[name]
    model, shape = kind(), (5, 3, size) if kind is Series else (5, 3, size, size)
    same_as_torch(model, model, shape, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETS)
def test_onnx_files_are_read_to_the_same(name, tmp_path):
    torch.manual_seed(0)
    kind, size = NETS[name]
    model = Pooled(adaptive=False) if kind is Pooled else kind()
    shape = (3, 3, size) if kind is Series else (3, 3, size, size)
    graph, state = import_model(export(model, shape, tmp_path / "net.onnx", **KEEP), shape)
    ours, _ = from_torch(model, shape)
    assert list(state) == list(model.state_dict()) or "norm.num_batches_tracked" in model.state_dict()
    assert Counter(node.op for node in graph.nodes) == Counter(node.op for node in ours.nodes)
    images = torch.randn(shape)
    with torch.no_grad():
        np.testing.assert_allclose(run_graph(graph, state, images), model.eval()(images), rtol=0, atol=2e-5)
