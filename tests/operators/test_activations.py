"""Every activation of the table is torch's, value and gradient; chains of operators are read as the activation that
they compute."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from activations import function_of
from onnx import helper, numpy_helper
from test_frontend import KEEP, Calls, export, part, run_graph
from test_onnx_import import CLASSES, ROWS, gemm, node, numbers, write
from test_step import make_batches, masked_steps, relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.base.errors import SpecError, UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch
from mest_compile.frontend.refusals import SUPPORTED
from mest_compile.ir.expressions import Constant, Variable, exp, log, maximum, minimum, select, sqrt
from mest_compile.ir.wording import as_text, from_text
from mest_compile.lowering.fusing import fuse
from mest_compile.operators.activation import ACTIVATIONS, POINTS, activation_of

NAMES = list(ACTIVATIONS.load())
# What torch itself rounds to: its slope of hardsigmoid is a float32 sixth, its softplus is x from 20 on.
ROUNDING = {"hardsigmoid": 4e-8, "softplus": 3e-9}
KINKS = [0.0, -0.0, 3.0, -3.0, 6.0]
X, Y = Variable("x"), Variable("y")


def torch_gradient(name, x, dy):
    """(y, dx) in float64."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = function_of(name)(x)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    return y.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_torchs_at_kinks_and_infinities_too(name):
    row, numbers = ACTIVATIONS[name], np.concatenate([POINTS[~np.isnan(POINTS)], KINKS])
    for dy in (
        np.random.default_rng(0).standard_normal(len(numbers)),
        np.full(len(numbers), np.nan),
        np.full(len(numbers), np.inf),
    ):
        y, dx = torch_gradient(name, numbers, dy)
        told = ~np.isnan(dx) | ~np.isinf(dy) | (name in ("relu", "relu6", "hardswish"))  # torch's own inf - inf, else
        wrong = ROUNDING.get(name, 1e-14)
        np.testing.assert_allclose(row.forward_reference(numbers), y, wrong, wrong)
        source = y if row.from_result else numbers
        np.testing.assert_allclose(row.backward_reference(dy, source)[told], dx[told], wrong, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_and_its_gradient_is_one_of_torchs(name):
    """torch's loop over whole vectors and the one over the rest disagree about a NaN."""
    row, lost = ACTIVATIONS[name], np.full(64, np.nan)
    assert np.isnan(row.forward_reference(lost)).all()
    torchs = [torch_gradient(name, lost[:count], np.ones(count))[1][0] for count in (1, 64)]
    assert any(
        np.array_equal(row.backward_reference(np.ones(1), lost[:1])[0], wanted, equal_nan=True) for wanted in torchs
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_told_slope_is_that_of_the_formula(name):
    """But for a formula's at its corner, and where that computes with infinity."""
    row, numbers = ACTIVATIONS[name], np.concatenate([POINTS, KINKS])
    numbers = numbers[(numbers != 0) & (abs(numbers) < 20)]
    np.testing.assert_allclose(
        row.slope.evaluate(x=numbers), row.formula.derivative("x").evaluate(x=numbers), rtol=0, atol=1e-13
    )


def test_which_slopes_follow_from_the_result():
    assert [name for name in ("relu", "relu6", "hardswish") if ACTIVATIONS[name].from_result] == ["relu", "relu6"]


# Expressions


EXPRESSIONS = {
    "sum": (X + 2 * Y - 3, lambda x, y: x + 2 * y - 3),
    "minus": (-X, lambda x, y: -x),
    "quotient": (X / (Y + 5), lambda x, y: x / (y + 5)),
    "maximum": (maximum(X, 0.3 * Y), lambda x, y: torch.maximum(x, 0.3 * y)),
    "minimum": (minimum(X * Y, 1), lambda x, y: (x * y).clamp(max=1)),
    "functions": (exp(X) + log(Y + 5) * sqrt(Y + 5), lambda x, y: x.exp() + (y + 5).log() * (y + 5).sqrt()),
    "select": (select(X > Y, X * X, Y), lambda x, y: torch.where(x > y, x * x, y)),
    "softsign": (X / (1 + abs(X)), lambda x, y: F.softsign(x)),
    "reversed": (1 - 1 / (2 + exp(-X)), lambda x, y: 1 - 1 / (2 + torch.exp(-x))),
}


@pytest.mark.parametrize("case", EXPRESSIONS)
def test_an_expression_and_its_derivatives_are_torchs(case):
    made, compute = EXPRESSIONS[case]
    x, y = np.random.default_rng(1).standard_normal((2, 50))
    tensors = [torch.tensor(values, requires_grad=True) for values in (x, y)]
    value = compute(*tensors)
    value.sum().backward()
    np.testing.assert_allclose(made.evaluate(x=x, y=y), value.detach(), rtol=1e-13)
    for name, tensor in zip(("x", "y"), tensors, strict=True):
        wanted = np.zeros(50) if tensor.grad is None else tensor.grad
        np.testing.assert_allclose(np.broadcast_to(made.derivative(name).evaluate(x=x, y=y), 50), wanted, rtol=1e-12)


def test_text_is_an_expression_of_the_kernels_own():
    def text(made):
        return made.text({"x": "a + b", "y": "c"}, lambda value: f"{value:g}")

    assert text(minimum(6, maximum(0, X))) == "T.min(6, T.max(0, a + b))"
    assert text((X + 3) * Y / 6) == "((((a + b) + 3) * (c)) / 6)"
    assert text(select(X <= 0, 0, Y)) == "T.Select(a + b <= 0, 0, c)"
    assert maximum(0, X).text({"x": "v"}, str, {"maximum": "fmax({1}, {0})"}) == "fmax(v, 0.0)"


def test_derivatives_hold_no_factors_of_0_and_1():
    assert maximum(0, X).derivative("x") == select(X <= 0, 0, 1)
    assert Y * maximum(0, X).derivative("x") == select(X <= 0, 0, Y)
    assert (X * 3 + Y).derivative("y") == Constant(1.0)


# Reading


WRITTEN = {
    "ReLU6": (nn.ReLU6(), "relu6"),
    "in place": (nn.ReLU6(inplace=True), "relu6"),
    "Hardtanh": (nn.Hardtanh(0, 6), "relu6"),
    "clamp": (lambda y: y.clamp(0, 6), "relu6"),
    "minimum of a ReLU": (lambda y: F.relu(y).clamp(max=6), "relu6"),
    "ReLU": (nn.ReLU(), "relu"),
    "clamp below": (lambda y: y.clamp(min=0), "relu"),
    "Hardswish": (nn.Hardswish(), "hardswish"),
    "function in place": (lambda y: F.hardswish(y, inplace=True), "hardswish"),
    "by hand": (lambda y: y * F.relu6(y + 3) / 6, "hardswish"),
    "by Hardsigmoid": (lambda y: y * F.hardsigmoid(y), "hardswish"),
    "divided first": (lambda y: (3 + y).clamp(0, 6) / 6 * y, "hardswish"),
    "Softplus": (nn.Softplus(), "softplus"),
    "softplus by hand": (lambda y: F.relu(y) + (1 + (-y.abs()).exp()).log(), "softplus"),
    "Mish": (nn.Mish(), "mish"),
    "mish by hand": (lambda y: y * F.softplus(y).tanh(), "mish"),
    "SiLU": (nn.SiLU(), "silu"),
    "silu by hand": (lambda y: y * torch.sigmoid(y), "silu"),
    "sigmoid by hand": (lambda y: 1 / (1 + torch.exp(-y)), "sigmoid"),
    "GELU": (nn.GELU(), "gelu"),
    "gelu by hand": (lambda y: y * (1 + torch.erf(y / 2**0.5)) / 2, "gelu"),
    "GELU, tanh": (nn.GELU("tanh"), "gelu_tanh"),
    "LeakyReLU": (nn.LeakyReLU(), "leaky_relu"),
    "slope by hand": (lambda y: torch.where(y > 0, y, 0.01 * y), "leaky_relu"),
    "ELU": (nn.ELU(), "elu"),
    "Hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid"),
    "tanh by hand": (lambda y: 2 * torch.sigmoid(2 * y) - 1, "tanh"),
    "from above": (lambda y: (0 - y) * (6 - F.relu6(3 - y)) / (-6.0), "hardswish"),
}


class Ways(nn.Module):
    """All ways of writing, each behind a convolution of its own; their sum."""

    def __init__(self):
        super().__init__()
        self.convs, self.fc = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in WRITTEN), nn.Linear(4, 10)

    def forward(self, x):
        total, *rest = (way(conv(x)) for conv, (way, _) in zip(self.convs, WRITTEN.values(), strict=True))
        for each in rest:
            total = total + each
        return self.fc(total.mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["torch", "onnx"])
def test_however_it_is_written_it_is_the_activation(way, tmp_path):
    torch.manual_seed(0)
    module, shape = Ways().eval(), (2, 3, 8, 8)
    graph, state = (
        from_torch(module, shape)
        if way == "torch"
        else from_onnx(export(module, shape, tmp_path / "net.onnx", **KEEP), shape)
    )
    made = {
        each.inputs[0]: each.op for each in graph.nodes if each.op not in ("conv2d", "linear", "add", "global_avg_pool")
    }
    assert [made[f"convs.{place}"] for place in range(len(WRITTEN))] == [name for _, name in WRITTEN.values()]
    images = torch.randn(shape) * 9
    np.testing.assert_allclose(run_graph(graph, state, images), module(images).detach(), rtol=0, atol=1e-4)


def test_what_is_computed_on_the_way_may_be_used_elsewhere_where_it_is_an_activation():
    """y serves three times, relu(y) once by itself; the sum with it is no chain, but two activations."""
    module = Calls(lambda self, y: F.relu(y).clamp(max=6) + F.relu(y) + y)
    graph, state = from_torch(module, (2, 3, 8, 8))
    assert [node.op for node in graph.nodes][1:-2] == ["relu6", "relu", "add", "add"]
    images = torch.randn(2, 3, 8, 8) * 9
    np.testing.assert_allclose(run_graph(graph, state, images), module(images).detach(), rtol=0, atol=1e-5)


FORMULAS = {  # what no row has: how it is written -> its formula
    "LeakyReLU of another slope": (nn.LeakyReLU(0.1), "select(x > 0.0, x, (0.1 * (x)))"),
    "ELU of another size": (nn.ELU(2.0), "select(x > 0.0, x, (2.0 * (exp(x) - 1.0)))"),
    "Hardtanh": (nn.Hardtanh(-2, 3), "minimum(3.0, maximum(-2.0, x))"),
    "another bound": (nn.Hardtanh(0, 6.0001), "minimum(6.0001, maximum(0.0, x))"),
    "Softplus": (nn.Softplus(2.0), "select(((x) * 2.0) > 20.0, x, (log((exp(((x) * 2.0)) + 1.0)) / 2.0))"),
    "a choice": (lambda y: torch.where(y > 0.5, y, 0.25 * y), "select(x > 0.5, x, ((x) * 0.25))"),
    "a scale and a shift": (lambda y: 2 * y - 1, "(((x) * 2.0) - 1.0)"),
    "a cube": (lambda y: y * y * y, "(((x) * (x)) * (x))"),
    "swish that is doubled": (lambda y: y * torch.tanh(y), "((x) * tanh(x))"),
    "of a function that is known": (lambda y: 3 * torch.relu(y), "(maximum(0.0, x) * 3.0)"),
}


class Formulas(nn.Module):
    """Each behind a convolution of its own; their sum."""

    def __init__(self):
        super().__init__()
        self.convs, self.fc = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in FORMULAS), nn.Linear(4, 10)

    def forward(self, x):
        total, *rest = (form(conv(x)) for conv, (form, _) in zip(self.convs, FORMULAS.values(), strict=True))
        for each in rest:
            total = total + each
        return self.fc(total.mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["torch", "onnx"])
def test_any_other_chain_is_a_formula(way, tmp_path):
    torch.manual_seed(0)
    module, shape = Formulas().eval(), (2, 3, 8, 8)
    if way == "onnx":
        graph, state = from_onnx(export(module, shape, tmp_path / "net.onnx", **KEEP), shape)
    else:
        graph, state = from_torch(module, shape)
    made = {node.inputs[0]: node.attrs["formula"] for node in graph.nodes if node.op == "formula"}
    assert len(made) == len(FORMULAS)
    for place, (_, formula) in enumerate(FORMULAS.values()):
        assert way == "onnx" or made[f"convs.{place}"] == formula
    images = torch.randn(shape) * 9
    np.testing.assert_allclose(run_graph(graph, state, images), module(images).detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", FORMULAS)
def test_a_formula_and_its_slope_are_torchs(case):
    module, _ = FORMULAS[case]
    graph, _ = from_torch(Calls(lambda self, y: module(y)), (2, 3, 8, 8))
    (node,) = (node for node in graph.nodes if node.op == "formula")
    row, numbers = activation_of(node.attrs["formula"]), POINTS[np.abs(POINTS) < 30]
    x = torch.tensor(numbers, requires_grad=True)
    y = module(x)
    y.sum().backward()
    np.testing.assert_allclose(row.forward_reference(numbers), y.detach(), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(row.slope.evaluate(x=numbers), x.grad, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", EXPRESSIONS)
def test_text_of_a_formula_is_read_back(case):
    made = EXPRESSIONS[case][0].of(y=X)
    again = from_text(as_text(made))
    np.testing.assert_array_equal(again.evaluate(x=POINTS), made.evaluate(x=POINTS))


@pytest.mark.parametrize(
    "text", ["y", "x.real", "x ** 2", "sin(x)", "open('a')", "x if x else 1", "", "(" * 10 + "x", "__import__"]
)
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(SpecError, match="no formula of x"):
        activation_of(text)


REFUSED = {
    "LogSoftmax": (part(nn.LogSoftmax(1)), "^log_softmax in layer 'part' .LogSoftmax. cannot"),
    "a far bound": (Calls(lambda self, y: y.clamp(0, 1e300)), "minimum of a constant"),
    "a comparison": (Calls(lambda self, y: (y > 0) * y), "supported"),
    "a parameter": (Calls(lambda self, y: y * self.part.bias.mean(), part=nn.Conv2d(4, 4, 1)), "supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_activation_is_refused_as_it_was_written(case):
    module, words = REFUSED[case]
    with pytest.raises(UnsupportedOperator, match=words) as caught:
        from_torch(module, (2, 3, 8, 8))
    assert "\n" not in str(caught.value) and all(name in str(caught.value) for name in NAMES)


def test_a_files_single_numbers_are_no_weights(tmp_path):
    """Other exporters than torch's hold the bounds of a Clip among the weights."""
    bounds = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("low", 0), ("high", 6))]
    nodes = [
        gemm("x w", "h"),
        helper.make_node("Clip", ["h", "low", "high"], ["r"]),
        node("Gemm", "r v", "y", transB=1),
    ]
    weights = {"w": numbers(7, 12), "v": numbers(CLASSES, 7)}
    graph, state = from_onnx(
        write(tmp_path, nodes, weights, others=bounds, after=[("low", ()), ("high", ())]), (ROWS, 12)
    )
    assert [each.op for each in graph.nodes] == ["linear", "relu6", "linear"] and list(state) == ["w", "v"]


def test_a_long_chain_is_followed_in_no_time():
    def square(self, y):
        for _ in range(40):
            y = y * y + 1
        return y

    graph, _ = from_torch(Calls(square), (2, 3, 8, 8))
    assert len(graph.nodes) < 100


def test_the_docs_list_what_is_supported():
    text = " ".join((Path(__file__).resolve().parents[2] / "docs" / "own-model.md").read_text().split())
    assert f" programs): {', '.join(SUPPORTED.names())} Inputs are images" in text and set(NAMES) < set(SUPPORTED)


# Whole steps


class Blocks(nn.Module):
    """Behind batch_norm, behind batch_norm and an addition, behind a convolution and a linear layer: the same, or in
    turns."""

    def __init__(self, *acts):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.three, self.hidden, self.last = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 12), nn.Linear(12, 5)
        self.acts = nn.ModuleList([*acts] * (4 // len(acts)))

    def forward(self, x):
        x = self.acts[0](self.norm1(self.one(x)))
        x = self.acts[1](self.norm2(self.two(x)) + x)
        x = self.acts[2](self.three(x))
        return self.last(self.acts[3](self.hidden(F.adaptive_avg_pool2d(x, 1).flatten(1))))


class Bent(nn.Module):
    def forward(self, x):
        return x / (1 + x * x) - 0.5


class Doubled(nn.Module):
    def forward(self, x):
        return x * torch.tanh(x)


MODULES = {name.lower(): module for name, module in vars(nn).items()} | {"gelutanh": partial(nn.GELU, "tanh")}
ACTS = {name: MODULES[name.replace("_", "")] for name in NAMES}
BATCH = (6, 3, 9, 9)
ACTS |= {"steep": lambda: nn.LeakyReLU(0.1), "large": lambda: nn.ELU(2.0), "bent": Bent, "swish": Doubled}
MIXED = (
    "steep large bent swish",
    "silu gelu mish softplus",
    "sigmoid elu tanh gelu_tanh",
    "leaky_relu hardsigmoid hardtanh silu",
)


@pytest.mark.parametrize("name", NAMES)
def test_which_activations_batch_norm_takes_in(name):
    graph = fuse(from_torch(Blocks(ACTS[name]()), BATCH)[0])
    joined = [each.attrs["activation"] for each in graph.nodes if each.op == "batch_norm"]
    alone = [each.op for each in graph.nodes].count(name)
    assert (joined, alone) == (([name, name], 2) if ACTIVATIONS[name].from_result else ([name, None], 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "way", "target"),
    [
        *((name, way, "local") for name in ("relu6", "hardswish") for way in ("torch", "onnx")),
        ("hardswish", "torch", "opencl"),
        *((names, "torch", "local") for names in MIXED),
        *((names, way, target) for names in MIXED[:2] for way, target in (("onnx", "local"), ("torch", "opencl"))),
    ],
)
def test_three_steps_equal_torchs(name, way, target, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model = Blocks(*(ACTS[each]() for each in name.split()))
    for norm in model.norm1, model.norm2:
        norm.weight.data *= 4  # so that values lie on all sides of the bounds
    source = export(model, BATCH, tmp_path / "net.onnx", **KEEP) if way == "onnx" else model
    optimizer = mest.SGD(lr=0.01, momentum=0.9)
    step = mest.compile(
        source, BATCH, scheme="unstructured", sparsity=0.5, dense_layers=["last"], optimizer=optimizer, target=target
    )
    batches = make_batches(BATCH, 5, 3)
    found = step.gradients(*batches[0])
    losses, gradients = masked_steps(model, step.masks(), batches, 0.01, optimizer)
    for key, wanted in gradients.items():
        assert relative(found[key], wanted) < 1e-4, key
    np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], losses, rtol=1e-5)
    model.eval()
    assert relative(step.predict(batches[0][0]), model(torch.from_numpy(batches[0][0])).detach().numpy()) < 1e-4
