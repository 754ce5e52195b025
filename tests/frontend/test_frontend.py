"""The imported graph, run by plain torch functions, is the model; what cannot be trained is refused by name."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from activations import function_of
from torch import nn

from mest_compile.base.errors import DataError, SpecError, UnknownName, UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch, import_model
from mest_compile.ir.layouts.batch import Image
from mest_compile.models.catalog import build_model, model_names
from mest_compile.operators import pool, resize
from mest_compile.operators.activation import ACTIVATIONS, activation_of
from mest_compile.operators.combine import NAMES, formula_of
from mest_compile.planning.layers import layer_specs
from mest_compile.sparsity.defaults import default_dense_layers


def combined(node, state, inputs):
    """What a formula gives, of its parameters as `strides` lays them over (C, H, W)."""
    shape = (*node.shape[1:], 1, 1)[:3]
    fixed = [np.array(one, np.float32) for one in node.attrs.get("constants", ())]
    held = [
        np.lib.stride_tricks.as_strided(array, shape, [4 * stride for stride in strides])
        for array, strides in zip([*map(state.get, node.params.values()), *fixed], node.attrs["strides"], strict=True)
    ]
    arrays = [*(one.numpy() for one in inputs), *(one.reshape(node.shape[1:]) for one in held)]
    made = formula_of(node.attrs["formula"]).evaluate(**dict(zip(NAMES, arrays, strict=False)))
    return torch.from_numpy(np.broadcast_to(made, node.shape).astype(np.float32))


def run_node(node, state, inputs):
    x, other = (inputs[0], inputs[-1]) if inputs else (None, None)
    held = {role: torch.from_numpy(state[name]) for role, name in node.params.items()}
    if held.get("weight") is not None and held["weight"].ndim == 3:  # of a convolution of one row
        held["weight"] = held["weight"][:, :, None]
    a = node.attrs
    return {
        "conv2d": lambda: F.conv2d(
            F.pad(x, around(a)),
            held["weight"],
            held.get("bias"),
            a["stride"],
            0,
            a.get("dilation", 1),
            a.get("groups", 1),
        ),
        "linear": lambda: F.linear(x.movedim(1, -1), held["weight"], held.get("bias")).movedim(-1, 1),
        "batch_norm": lambda: F.batch_norm(
            x, held["running_mean"], held["running_var"], held.get("weight"), held.get("bias"), eps=a["eps"]
        ),
        "add": lambda: x + other,
        "max_pool2d": lambda: pooled(node, x, pool.max_forward_reference),
        "avg_pool2d": lambda: pooled(node, x, pool.avg_forward_reference),
        "concat": lambda: torch.cat(inputs, a["axis"]),
        "slice": lambda: x[
            (
                slice(None),
                *(
                    slice(first, first + (size - 1) * step + 1, step)
                    for first, step, size in zip(a["start"], a["step"], node.shape[1:], strict=False)
                ),
            )
        ],
        "pad": lambda: F.pad(
            x,
            [side for both in zip(a["after"], a["before"], strict=True) for side in both][: 2 * x.ndim - 2][::-1],
            value=a["fill"],
        ),
        "global_avg_pool": lambda: x.mean((2, 3)).reshape(node.shape),
        "flatten": lambda: x.flatten(1),
        "rearrange": lambda: rearranged(node, x),
        "softmax": lambda: inputs[0].softmax(1),
        "matmul": lambda: x @ other,
        "table": lambda: x + held["bias"].flatten()[picked(node)],
        "attention": lambda: attended(node, state, *inputs),
        "norm": lambda: normed(node, x, held.get("weight"), held.get("bias")),
        "dropout": lambda: x,
        "unflatten": lambda: x[:, :, None, None],
        "combine": lambda: combined(node, state, inputs),
        "reduce": lambda: x.sum(a["axes"], keepdim=True) * a["scale"],
        "resize": lambda: by_reference(
            node, x, lambda images, array: resize.forward_reference(resize.Resize(*images, **a), array)
        ),
        **{name: lambda name=name: function_of(name)(x) for name in ACTIVATIONS.load()},
        "formula": lambda: torch.from_numpy(activation_of(a["formula"]).forward_reference(x.numpy())).float(),
    }[node.op]()


def around(attrs):
    """Padding as F.pad has it."""
    (top, left), (bottom, right) = attrs["padding"], attrs.get("padding_end", attrs["padding"])
    return left, right, top, bottom


def by_reference(node, x, reference):
    """reference: of kernels, (the images of x and of the value, x (C, H, W, N)) -> the value (C, H, W, N)."""
    images = [Image(*shape[1:], shape[0]) for shape in (x.shape, node.shape)]
    return torch.from_numpy(reference(images, x.permute(1, 2, 3, 0).numpy())).float().permute(3, 0, 1, 2)


def pooled(node, x, reference):
    return by_reference(node, x, lambda images, array: reference(pool.Pool(*images, **node.attrs), array))


def normed(node, x, weight, bias):
    """By group_norm, of a value or pixel by pixel."""
    groups, eps = node.attrs["groups"], node.attrs["eps"]
    if node.attrs["pixels"]:
        return F.group_norm(x, groups, weight, bias, eps)
    return (
        F.group_norm(x.movedim(1, -1).reshape(-1, x.shape[1]), groups, weight, bias, eps)
        .reshape(x.movedim(1, -1).shape)
        .movedim(-1, 1)
    )


def picked(node):
    """(heads, queries, keys) of a table's places."""
    pair, heads = node.attrs["bias"][2:], torch.arange(node.attrs["heads"])
    return torch.tensor(node.attrs["places"]).reshape(pair) + heads[:, None, None] * node.attrs["apart"]


def attended(node, state, *inputs):
    """By torch's function; each group of rows is one batch of heads."""
    heads, (queries, keys) = node.attrs["heads"], node.attrs["rows"]

    def grouped(x, rows):
        batch, channels, height, width = x.shape
        x = x.reshape(batch, heads, channels // heads, height // rows, rows * width)
        return x.permute(0, 3, 1, 4, 2)

    q, k, v = (grouped(x, rows) for x, rows in zip(inputs, (queries, keys, keys), strict=True))
    q, attrs = q * node.attrs["scale"], node.attrs
    scores = q @ k.transpose(-1, -2)
    pair = scores.shape[-2:]
    if "mask" in attrs:
        scores = scores + torch.tensor(attrs["mask"]).reshape(*attrs["mask_sizes"], *pair).transpose(0, 1)
    if "places" in attrs:
        table = torch.from_numpy(state[node.params["bias"]]).flatten()
        scores = scores + table[picked(node)]
    if attrs.get("causal"):
        scores = scores.masked_fill(torch.ones(pair).tril() == 0, -torch.inf)
    y = scores.softmax(-1) @ v
    return y.permute(0, 2, 4, 1, 3).reshape(node.shape)


def rearranged(node, x):
    """By indices of its own: every part counts up within its dimension, the last fastest."""
    places = {dim: torch.zeros(1, dtype=torch.long) for dim in "CHW"}
    for axis, name in enumerate(("channels", "rows", "columns")):
        for number, (dim, size, stride) in enumerate(parts := node.attrs[name]):
            apart = int(np.prod([size for _, size, _ in parts[number + 1 :]]))
            places_of_axis = int(np.prod([size for _, size, _ in parts]))
            digit = torch.arange(places_of_axis) // apart % size * stride
            places[dim] = places[dim] + digit.reshape([-1 if k == axis else 1 for k in range(3)])
    x = x.reshape(*x.shape, *[1] * (4 - x.ndim))
    return x[:, places["C"], places["H"], places["W"]].reshape(node.shape)


def run_graph(graph, state, images):
    """The graph in evaluation mode, node by node. Output shapes are checked on the way."""
    values = {"input": images[:, :, None] if images.ndim == 3 else images}
    for node in graph.nodes:
        y = run_node(node, state, [values[name] for name in node.inputs])
        assert tuple(y.shape) == node.shape, node
        values[node.name] = y
    return y


def randomised(module):
    """The module with BatchNorm statistics and scales that are not 0 and 1, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return module


def assert_same(module, graph, state, input_shape):
    images = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = module.eval()(images), run_graph(graph, state, images)
    scale = want.abs().max().item()
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=1e-5 * max(scale, 1))
    assert list(state) == list(module.state_dict())
    assert {name: array.shape for name, array in state.items()} == dict(graph.state_shapes)
    assert graph.input_shape == input_shape
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


class Odd(nn.Module):
    """Odd sizes, a residual with downsample, every pool, functional calls and an operator that the logits do not
    need."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(13, 20, (5, 3), (2, 1), (2, 1))
        self.bn = nn.BatchNorm2d(20, eps=1e-3, momentum=0.03)
        self.down = nn.Conv2d(13, 20, 1, (2, 1), bias=False)
        self.max = nn.MaxPool2d(3, 2, 1)
        self.avg = nn.AvgPool2d((2, 3), (1, 2), (1, 1), count_include_pad=False)
        self.conv2 = nn.Conv2d(20, 6, 2)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(6, 11)
        self.norm = nn.BatchNorm1d(11)
        self.head = nn.Linear(11, 5, bias=False)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)) + self.down(x), inplace=True)
        y = F.relu(self.conv2(self.avg(self.max(y))))
        F.gelu(y) + self.fc.bias.mean()  # not needed, so not refused
        y = F.adaptive_avg_pool2d(y, 1).view(y.shape[0], -1) + y.mean((2, 3))
        return self.head(self.norm(F.relu(F.linear(self.drop(y), self.fc.weight, self.fc.bias))))


ODD_SHAPE = (7, 13, 17, 17)


class Pools(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.Identity(),
            nn.ReLU(True),
            nn.AdaptiveAvgPool2d((2, 3)),
            nn.AvgPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


@pytest.mark.parametrize("name", model_names())
def test_built_in_model_imports_to_the_same_function(name):
    shape = (3, 28, 28) if name == "mlp" else (3, 16, 16)
    width = 5 if name != "mlp" else 33
    module = randomised(build_model(name, (2, *shape), width=width))
    graph, state = from_torch(module, (2, *shape))
    assert_same(module, graph, state, (2, *shape))


@pytest.mark.parametrize(("module", "input_shape"), [(Odd, ODD_SHAPE), (Pools, (2, 3, 8, 8))])
def test_custom_module_imports_to_the_same_function(module, input_shape):
    torch.manual_seed(0)
    module = randomised(module())
    assert_same(module, *from_torch(module, input_shape), input_shape)


def test_nodes_carry_torch_names_and_attributes():
    graph, _ = from_torch(Odd(), ODD_SHAPE)
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["conv"].attrs == {"stride": (2, 1), "padding": (2, 1)}
    assert nodes["conv"].params == {"weight": "conv.weight", "bias": "conv.bias"}
    assert nodes["bn"].attrs == {"eps": 1e-3, "momentum": 0.03}
    assert nodes["bn"].params["running_var"] == "bn.running_var"
    assert nodes["head"].params == {"weight": "head.weight"}
    assert graph.nodes[-1].name == "head"
    ops = [node.op for node in graph.nodes]
    assert {op: ops.count(op) for op in ops} == {
        "conv2d": 3,
        "batch_norm": 2,
        "add": 2,
        "relu": 3,
        "max_pool2d": 1,
        "avg_pool2d": 1,
        "global_avg_pool": 2,
        "flatten": 1,
        "linear": 2,
    }


def test_import_leaves_the_module_alone():
    module = Odd().train()
    module.drop.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _, state = from_torch(module, ODD_SHAPE)
    assert module.training and module.conv.training and not module.drop.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    state["conv.weight"][:] = 0
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def export(module, input_shape, path, **options):
    torch.onnx.export(module, (torch.randn(input_shape),), path, dynamo=False, **options)
    return path


KEEP = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}


@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_graph_and_names_that_torch_gives(tmp_path):
    module = randomised(
        build_model("resnet20", (2, 3, 16, 16), width=4)
    ).train()  # the odd module below is exported in eval mode
    path = export(module, (2, 3, 16, 16), tmp_path / "net.onnx", **KEEP)
    graph, state = import_model(path, (2, 3, 16, 16))
    want, want_state = import_model(module, (2, 3, 16, 16))
    used = [name for name in want_state if not name.endswith("num_batches_tracked")]  # no operator of a file counts
    assert graph == replace(want, state_shapes={name: want.state_shapes[name] for name in used})
    assert list(state) == used
    for name in state:
        np.testing.assert_array_equal(state[name], want_state[name])


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_odd_module_is_the_same_function_at_another_batch(tmp_path):
    class Flat(Odd):  # a view() would fix the batch in the file
        def forward(self, x):
            y = self.conv2(self.avg(self.max(F.relu(self.bn(self.conv(x)) + self.down(x)))))
            return self.head(F.relu(self.fc(self.drop(F.adaptive_avg_pool2d(y, 1).flatten(1)))))

    torch.manual_seed(0)
    module = randomised(Flat()).eval()
    path = export(module, (1, *ODD_SHAPE[1:]), tmp_path / "odd.onnx", **KEEP)
    graph, state = from_onnx(str(path), ODD_SHAPE)
    images = torch.randn(ODD_SHAPE)
    with torch.no_grad():
        np.testing.assert_allclose(run_graph(graph, state, images), module(images), rtol=0, atol=1e-5)
    want, _ = from_torch(module, ODD_SHAPE)
    assert graph.nodes == want.nodes


@pytest.mark.filterwarnings("ignore")
def test_onnx_with_folded_batch_norm_is_biased_convolutions(tmp_path):
    torch.manual_seed(0)
    module = randomised(Odd()).eval()
    graph, state = from_onnx(export(module, ODD_SHAPE, tmp_path / "folded.onnx"), ODD_SHAPE)
    ops = [node.op for node in graph.nodes]
    assert ops.count("conv2d") == 3 and all("bias" in node.params for node in graph.nodes[:1])
    assert {name: array.shape for name, array in state.items()} == dict(graph.state_shapes)
    assert all(array.flags.c_contiguous for array in state.values())
    images = torch.randn(ODD_SHAPE)
    with torch.no_grad():
        np.testing.assert_allclose(run_graph(graph, state, images), module(images), rtol=0, atol=1e-5)


class Calls(nn.Module):
    """A convolution, a function of its output, a classifier."""

    def __init__(self, function, **parts):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.function(self, self.conv(x)).mean((2, 3)))


def part(module):
    return Calls(lambda self, y: self.part(y), part=module)


REFUSED = {
    "sin": (Calls(lambda self, y: torch.sin(y)), ["sin", "forward (Calls)", "supported: add, "]),
    "dropout in evaluation too": (
        Calls(lambda self, y: F.dropout(y, 0.3)),
        ["dropout with p=0.3", "forward (Calls)", "set p to 0 or remove it"],
    ),
    "alpha dropout": (part(nn.AlphaDropout(0.3)), ["dropout with p=0.3", "'part'"]),
    "alpha": (Calls(lambda self, y: torch.add(y, y, alpha=2)), ["alpha=2"]),
    "alpha of sub": (Calls(lambda self, y: torch.sub(y, y * 2, alpha=2)), ["sub with alpha=2"]),
    "alpha of rsub": (Calls(lambda self, y: torch.rsub(y, 1, alpha=3)), ["rsub with alpha=3"]),
    "selu, which TVM reads as elu": (part(nn.SELU()), ["selu in layer 'part' (SELU)"]),
    "divisor": (part(nn.AvgPool2d(2, divisor_override=3)), ["divisor_override=3", "'part'"]),
    "over examples": (Calls(lambda self, y: y * y.mean(0, keepdim=True)), ["mean of (2, 4, 8, 8) over axes (0,)"]),
    "dilated pool": (part(nn.MaxPool2d(3, 2, dilation=2)), ["dilated max_pool2d", "'part'"]),
    "slice of the batch": (Calls(lambda self, y: y[:1]), ["slice from (2, 4, 8, 8) to (1, 4, 8, 8)"]),
    "concat of the batch": (Calls(lambda self, y: torch.cat([y, y])), ["concat", "along axis 0"]),
    "infinite pad": (Calls(lambda self, y: F.pad(y, (1, 1), value=-torch.inf)), ["pad with -inf"]),
    "bicubic": (part(nn.Upsample(scale_factor=2, mode="bicubic")), ["'part' (Upsample)"]),
    "antialias": (
        Calls(lambda self, y: F.interpolate(y, scale_factor=0.5, mode="bilinear", antialias=True)),
        ["upsample_bilinear2d with antialias=True"],
    ),
    "reflect": (part(nn.ReflectionPad2d(1)), ["pad with mode='reflect' in layer 'part'"]),
    "replicate": (part(nn.ReplicationPad2d(1)), ["pad with mode='replicate' in layer 'part'"]),
    "refused within a concat": (Calls(lambda self, y: torch.cat([y, torch.sin(y)], 1)[:, :4]), ["sin in"]),
    "no statistics": (part(nn.BatchNorm2d(4, track_running_stats=False)), ["'part' (BatchNorm2d)"]),
    "cumulative": (part(nn.BatchNorm2d(4, momentum=None)), ["momentum=None", "'part'"]),
    "called twice": (
        Calls(lambda self, y: self.part(self.part(y)), part=nn.Conv2d(4, 4, 1)),
        ["part.weight", "two operators", "shared"],
    ),
    "data dependent": (Calls(lambda self, y: y if y.sum() > 0 else -y), ["torch.export"]),
    "parameter": (Calls(lambda self, y: y + self.part.weight.mean(), part=nn.Conv2d(4, 4, 1)), ["supported"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name_and_place(case):
    module, words = REFUSED[case]
    with pytest.raises(UnsupportedOperator) as caught:
        from_torch(module, (2, 3, 8, 8))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tied_weights_are_refused():
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    module[3].weight = module[1].weight
    with pytest.raises(UnsupportedOperator, match="1.weight and 3.weight are one parameter"):
        from_torch(module, (2, 6))


@pytest.mark.parametrize(
    ("module", "input_shape", "words"),
    [
        (nn.Conv2d(3, 4, 3), (2, 1, 8, 8), "does not take input_shape .*expected input.* 3 channels"),
        (nn.Linear(5, 4), (2, 6), "does not take input_shape"),
        (nn.Identity(), (2, 3), "nothing to train"),
        (nn.Linear(5, 4).double(), (2, 5), "weight is float64: call model.float"),
        (nn.Linear(5, 4), (2, 0), "whole numbers of 1 or more"),
        (nn.Linear(5, 4), (2, 3, 5, 5, 5), r"\(N, C, H, W\), \(N, C, L\) or \(N, features\)"),
        (nn.Linear(5, 4), (2, 3, 5), r"logits of shape \(2, classes\) .* the model gives \(2, 3, 4\)"),
        (nn.Linear(5, 4), None, "input_shape is"),
        (42, (2, 5), "a torch.nn.Module, a path .* got int"),
    ],
)
def test_facts_that_contradict_each_other_are_named(module, input_shape, words):
    with pytest.raises(SpecError, match=words) as caught:
        import_model(module, input_shape)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_inputs_or_state_are_refused():
    """A non-persistent buffer has no place in the state_dict, so nothing could train or save it."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.ones(4, 3, 3, 3), persistent=False)

        def forward(self, x):
            return F.conv2d(x, self.kernel).mean((2, 3))

    with pytest.raises(UnsupportedOperator, match="conv2d with a computed weight"):
        from_torch(Hidden(), (2, 3, 8, 8))


def test_unused_parameters_keep_their_place_in_the_state():
    module = Calls(lambda self, y: y, part=nn.Conv2d(4, 4, 1))
    graph, state = from_torch(module, (2, 3, 8, 8))
    assert list(state) == list(graph.state_shapes) == list(module.state_dict())
    assert [node.name for node in graph.nodes] == ["conv", "global_avg_pool_1", "fc"]


def test_bias_that_is_added_beside_another_use_of_the_layer_is_refused():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 4, bias=False)
            self.bias = nn.Parameter(torch.ones(4))

        def forward(self, x):
            y = self.fc(x)
            return y + (y + self.bias)

    with pytest.raises(UnsupportedOperator, match="fc.weight is used by two operators"):
        from_torch(Both(), (2, 5))


def test_two_outputs_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x.relu(), x

    with pytest.raises(SpecError, match="returns 2 values"):
        from_torch(Two(), (2, 3))


def test_unknown_names_and_files_are_named(tmp_path):
    with pytest.raises(UnknownName, match="no model 'resnet21'; there are: autoencoder, cct, "):
        import_model("resnet21", (2, 3, 8, 8))
    with pytest.raises(DataError, match="missing.onnx"):
        import_model(str(tmp_path / "missing.onnx"), (2, 3, 8, 8))
    (tmp_path / "cut.onnx").write_bytes(b"not a model")
    with pytest.raises(DataError, match="cut.onnx"):
        import_model(tmp_path / "cut.onnx", (2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore")
def test_onnx_refusals_name_the_operator_and_its_node(tmp_path):
    path = export(part(nn.LogSoftmax(1)).eval(), (2, 3, 8, 8), tmp_path / "softmax.onnx", **KEEP)
    with pytest.raises(
        UnsupportedOperator,
        match="^LogSoftmax in node '.*' cannot be trained here; supported: add, ",
    ):
        from_onnx(path, (2, 3, 8, 8))
    with pytest.raises(SpecError, match=r"\(2, 3, 8, 8\), input_shape is \(2, 1, 8, 8\); give .* --image 3x8x8$"):
        from_onnx(path, (2, 1, 8, 8))


def test_first_convolution_downsamples_and_classifier_stay_dense():
    graph, _ = import_model("resnet20", (2, 3, 8, 8))
    dense = default_dense_layers(graph, layer_specs(graph), {})
    assert sorted(dense) == [
        "conv1.weight",
        "fc.weight",
        "layer2.0.downsample.0.weight",
        "layer3.0.downsample.0.weight",
    ]
    graph, _ = import_model("mlp", (2, 20))
    assert default_dense_layers(graph, layer_specs(graph), {}) == {"fc3.weight": "the last layer"}


def test_importing_the_frontend_loads_neither_torch_nor_tvm():
    code = (
        "import sys, mest_compile.frontend, mest_compile.models.catalog as models\n"
        "models.model_names(); print({'torch', 'tvm', 'onnx'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
