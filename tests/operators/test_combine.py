"""Values made of several, in whole steps: gates and products of maps, learned scales and shifts, sums and means that
are spread."""

import numpy as np
import pytest
import torch
from test_frontend import KEEP, Calls, assert_same, export, run_graph
from test_step import assert_like_torch, make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_torch, import_model
from mest_compile.lowering.fusing import fuse
from mest_compile.operators.combine import formula_of

BATCH = (6, 3, 9, 9)


class Gated(nn.Module):
    """Squeeze-and-excitation by convolutions and by linear layers, a product of two maps; what a map is multiplied by
    that follows from itself is a formula with it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.inner, self.outer = nn.Linear(8, 4), nn.Linear(4, 8)
        self.left, self.right, self.last = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = F.hardswish(self.norm(self.stem(x)))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        gate = torch.sigmoid(self.outer(F.silu(self.inner(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        x = gate.view(-1, 8, 1, 1) * x
        y = self.left(x) * self.right(x)
        y = y * y + y * torch.tanh(y)
        return self.last(y.mean((2, 3)))


OPERATORS = ["unflatten", "combine", "conv2d", "conv2d", "combine", "formula"]


def test_how_they_are_read():
    module = Gated().eval()
    graph, state = from_torch(module, BATCH)
    assert [node.op for node in graph.nodes][-len(OPERATORS) - 2 : -2] == OPERATORS
    assert [node.op for node in graph.nodes].count("combine") == 3
    images = torch.randn(BATCH)
    np.testing.assert_allclose(run_graph(graph, state, images), module(images).detach(), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "target"), [("torch", "local"), ("onnx", "local"), ("torch", "opencl")])
def test_three_steps_equal_torchs(way, target, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model, optimizer = Gated(), mest.SGD(lr=0.01, momentum=0.9)
    source = export(model, BATCH, tmp_path / "net.onnx", **KEEP) if way == "onnx" else model
    named = {"scheme": "unstructured", "sparsity": 0.5, "dense_layers": ["last"]}
    step = mest.compile(source, BATCH, optimizer=optimizer, target=target, **named)
    batches = make_batches(BATCH, 5, 3)
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
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input": batches[0][0]})
        assert relative(logits, wanted) < 1e-4


@pytest.mark.parametrize("frozen", ["stem", "squeeze"])
def test_only_what_trains_gets_a_gradient(frozen):
    """A gate that is frozen while the map trains, and a map that is frozen before a gate that trains."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.squeeze, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            gate = torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
            return self.last((self.stem(x) * gate).mean((2, 3)))

    model = Net()
    model.get_submodule(frozen).requires_grad_(False)
    step = mest.compile(model, BATCH, scheme="dense", sparsity=0)
    ((images, labels),) = make_batches(BATCH, 5, 1)
    found = step.gradients(images, labels)
    F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
    wanted = {name: one.grad.numpy() for name, one in model.named_parameters() if one.requires_grad}
    assert found.keys() == wanted.keys() and not any(name.startswith(frozen) for name in found)
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 1e-4, name


class Scaled(nn.Module):
    """Learned numbers: one, one a channel in the forms that people write, one a pixel, one an element; of features too;
    two of them joined, and one that does not train."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        shapes = {"one": (), "flat": (8,), "channel": (1, 8, 1, 1), "shift": (8, 1, 1), "features": (8,)}
        shapes |= {"pixels": (9, 9), "positions": (1, 8, 9, 9), "single": (1,), "kept": (8, 1, 1)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))
        self.kept.requires_grad_(False)

    def forward(self, x):
        x = self.flat.view(1, -1, 1, 1) * F.relu(self.stem(x)) + self.shift
        x = torch.addcmul(self.positions, x, self.channel.expand(x.shape))
        x = sum([x - self.pixels, self.kept * x]) * 1.0
        x = torch.tanh(self.one * x)
        return self.last((x.mean((2, 3)) * self.features) / self.single)


class Spreading(nn.Module):
    """Sums and means over channels, rows and columns, and what is spread over them: spatial gates, differences from a
    mean, a row times a column, norms."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.left, self.right, self.gate = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        x = x * torch.sigmoid(self.gate(x.mean(1, keepdim=True)))
        x = x - x.mean((2, 3), keepdim=True) + 0.1 * x.sum((1, 2, 3), keepdim=True)
        x = torch.maximum(self.left(x.mean(2, keepdim=True)) + self.right(x.mean(3, keepdim=True)), x)
        x = F.normalize(x, dim=1) / (1 + x.abs().sum(1, keepdim=True))
        x = x * torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + 1e-2)
        return self.last(x.mean((2, 3)))


class Constants(nn.Module):
    """Numbers that are no parameters: of a BatchNorm without any, buffers that are state and such that are not, what is
    made of constants."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)
        self.inner, self.flat = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, affine=False)
        self.last = nn.Linear(8, 5)
        self.register_buffer("kept", torch.rand(8) + 0.5)
        self.register_buffer("made", torch.rand(8, 1, 1) + 0.5, persistent=False)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x))) * self.kept.view(-1, 1, 1)
        x = x * (self.made * 2 - 1) + torch.ones(7, 7) / 4
        return self.last(torch.tanh(self.flat(self.inner(x.mean((2, 3))))))


class Reduced(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.stem, self.of = nn.Conv2d(3, 4, 3), of

    def forward(self, x):
        x = self.stem(x)
        return x * (1 + self.of(x))


@pytest.mark.parametrize("axes", [(2, 3), (1, 2, 3), (1, 3), (1,)], ids=str)
@pytest.mark.parametrize("of", ["mean", "sum", "var"])
def test_a_sum_is_no_mean_over_whatever_axes(of, axes):
    how = {"unbiased": False} if of == "var" else {}
    module = Reduced(lambda x: getattr(x, of)(axes, keepdim=True, **how))
    assert_same(module, *from_torch(module, BATCH), BATCH)


def test_a_sum_of_pixels_that_keeps_no_image_is_refused():
    module = Reduced(lambda x: x.sum((2, 3))[:, :, None, None])
    with pytest.raises(UnsupportedOperator, match=r"sum of \(6, 4, 7, 7\) over axes \(2, 3\) to \(6, 4\)"):
        from_torch(module, BATCH)


def test_a_scale_and_a_shift_are_one_pass():
    graph, _ = from_torch(Scaled(), BATCH)
    after = [node for node in fuse(graph).nodes if node.op == "combine"]
    assert sum(node.op == "combine" for node in graph.nodes) == 9
    assert [len(node.params) for node in after] == [4, 1, 1, 1, 2]
    numbers = dict.fromkeys(("x0", "x1", "x2", "x3", "x4"), 0.0) | {"x0": 5.0}
    held = dict(zip(after[0].params.values(), after[0].params, strict=True))
    numbers |= {
        held[name]: value for name, value in zip(("flat", "shift", "channel", "positions"), (2, 3, 10, 1), strict=True)
    }
    assert formula_of(after[0].attrs["formula"]).evaluate(**numbers) == (2 * 5 + 3) * 10 + 1
    assert not {name for node in after for name in node.inputs} - {node.name for node in fuse(graph).nodes}


NETS = {"scaled": (Scaled, "torch", "local"), "scaled from onnx": (Scaled, "onnx", "local")}
NETS |= {"scaled on opencl": (Scaled, "torch", "opencl"), "spreading": (Spreading, "torch", "local")}
NETS |= {"constants": (Constants, "torch", "local"), "constants on opencl": (Constants, "torch", "opencl")}
NETS |= {"spreading from onnx": (Spreading, "onnx", "local"), "spreading on opencl": (Spreading, "torch", "opencl")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NETS)
def test_three_steps_of_scales_and_spreads_equal_torchs(case, tmp_path):
    kind, way, target = NETS[case]
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    batch, model, optimizer = (3, *BATCH[1:]), kind(), mest.SGD(lr=0.01, momentum=0.9)
    if case == "scaled from onnx":  # which does not say what trains, and whose numbers without axes are no weights
        model.kept.requires_grad_(True)
        model.one = nn.Parameter(model.one.detach()[None])
    source = export(model, batch, tmp_path / "net.onnx", **KEEP) if way == "onnx" else model
    graph, state = import_model(source, batch)
    images = torch.randn(batch)
    np.testing.assert_allclose(run_graph(graph, state, images), model.eval()(images).detach(), rtol=0, atol=1e-4)
    model.train()
    named = {"scheme": "block", "sparsity": 0.5, "dense_layers": ["last", "gate"][: 1 + (kind is Spreading)]}
    step = mest.compile(source, batch, optimizer=optimizer, target=target, **named)
    batches = make_batches(batch, 5, 3)
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, step.masks(), batches, 0.01, optimizer)
    assert found.keys() == gradients.keys()
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4, key
    np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], losses, rtol=1e-5)
    assert_like_torch(step, model, batches[0][0])
    if kind is Constants:
        step.save(tmp_path / "checkpoint")
        again = mest.load(tmp_path / "checkpoint")
        assert again(*batches[0]).loss == step(*batches[0]).loss
    if way == "onnx" or case == "constants":
        mest.to_onnx(step, tmp_path / "out.onnx")
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
        assert relative(session.run(None, {"input": batches[0][0]})[0], step.predict(batches[0][0])) < 1e-4


def test_a_number_of_each_example_is_one_of_its_features():
    module = Calls(lambda self, y: y * y.mean((2, 3))[:, :1, None, None])
    assert_same(module, *from_torch(module, (2, 3, 8, 8)), (2, 3, 8, 8))


def test_what_does_not_fit_is_refused():
    for forward in (lambda self, y: y ** self.conv.weight.mean(), lambda self, y: y * y.mean(0, keepdim=True)):
        with pytest.raises(UnsupportedOperator, match="power|mean"):
            from_torch(Calls(forward), (2, 3, 8, 8))
