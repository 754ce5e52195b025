"""Trained weights out again: ONNX files, the file that a model came from, torch modules, safetensors."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from test_onnx_import import CLASSES, ROWS, gemm, node, numbers, write
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import DataError, StateError, UnsupportedOperator, UsageError
from mest_compile.frontend import from_onnx, onnx_writer
from mest_compile.frontend.onnx_writer import Writer, onnx_name
from mest_compile.ir.expressions import OPERATIONS, Variable, exp, maximum, select
from mest_compile.ir.graph import ForwardGraph, Node
from mest_compile.operators.activation import ACTIVATIONS
from mest_compile.operators.operator import OPERATORS, Operator

IMAGES = (4, 3, 12, 12)


class Every(nn.Module):
    """Every operator that a model may have, biases, odd strides and paddings."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, (3, 5), (1, 2), (1, 2))
        self.norm = nn.BatchNorm2d(16, eps=1e-3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.deep = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.each = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.apart = nn.Conv2d(16, 16, 3, 1, (2, 1), (2, 1), groups=4)
        self.mean = nn.AvgPool2d(2, 1, 1, count_include_pad=False)
        self.late = nn.Conv2d(16, 8, 1)
        self.hidden = nn.Linear(8 * 7 * 4, 24)
        self.head = nn.Linear(24, CLASSES, bias=False)

    def forward(self, x):
        y = self.pool(nn.functional.hardswish(self.norm(self.conv(x))))
        y = nn.functional.relu(self.norm2(self.deep(y)) + y)
        y = nn.functional.relu6(self.late(self.mean(self.apart(self.each(y)))))
        return self.head(nn.functional.relu(self.hidden(y.flatten(1))))


@pytest.fixture(scope="module")
def trained(builder):
    """A function that compiles a model and trains a few steps."""

    def train(model, shape=IMAGES, steps=3, **options):
        asked = {"scheme": "unstructured", "sparsity": 0.8, "threads": 1, "builder": builder} | options
        step = mest.compile(model, shape, **asked)
        rng = np.random.default_rng(0)
        for _ in range(steps):
            step(rng.standard_normal(shape).astype(np.float32), rng.integers(0, step.classes, shape[0]), lr=0.01)
        return step

    return train


@pytest.fixture(scope="module")
def every(trained):
    torch.manual_seed(0)
    return trained(Every())


def runs(path, x):
    """What onnxruntime makes of the file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def assert_predicts(path, step, examples=7):
    x = np.random.default_rng(1).standard_normal((examples, *step.input_shape[1:])).astype(np.float32)
    want = step.predict(x)
    np.testing.assert_allclose(runs(path, x), want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("opset", [None, 18, 21, 23])
def test_a_file_runs_elsewhere_and_predicts_the_same(every, tmp_path, opset):
    path = tmp_path / "net.onnx"
    mest.to_onnx(every, path, opset=opset)
    assert_predicts(path, every)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == (opset or 17)
    state, masks = every.state_dict(), every.masks()
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert sorted(held) == [name for name in sorted(state) if not name.endswith("num_batches_tracked")]
    for name, array in held.items():
        np.testing.assert_array_equal(array, state[name])
    assert masks and all(not held[name][~mask].view(np.uint32).any() for name, mask in masks.items())
    told = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    assert all(name in told for one in model.graph.node for name in one.output)
    shapes = [value.type.tensor_type.shape.dim for value in told.values() if value.type.tensor_type.shape.dim]
    assert all(dim[0].dim_param == "N" and all(size.dim_value for size in dim[1:]) for dim in shapes)


def test_a_file_that_was_written_reads_back_as_the_same_model(every, tmp_path):
    mest.to_onnx(every, tmp_path / "net.onnx")
    graph, state = from_onnx(tmp_path / "net.onnx", IMAGES)
    mine, theirs = ([(one.op, one.params, one.attrs) for one in net.nodes] for net in (every.graph, graph))
    assert theirs == mine
    for name, array in state.items():
        np.testing.assert_array_equal(array, every.state_dict()[name])


def test_a_file_has_room_for_2_gib(every, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_writer, "MOST_BYTES", 1000)
    with pytest.raises(UsageError, match="more than 2 GiB"):
        mest.to_onnx(every, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_every_operator_is_written_or_says_why_not():
    for name, operator in OPERATORS.load().items():
        writes = type(operator).onnx is not Operator.onnx
        assert writes != (operator.not_in_onnx != Operator.not_in_onnx), name


def test_an_operator_that_cannot_be_written_is_named():
    with pytest.raises(UnsupportedOperator, match="odd 'layer' cannot be written to ONNX: its file does not say how"):
        Operator().onnx(Node("odd", "layer", (), (1, 2)), Writer({}, (1, 2)))


def alone(formula, x):
    """The formula as a file of its own, run by onnxruntime."""
    writer = Writer({}, x.shape)
    act = Node("act", "act", ("input",), x.shape)
    writer.operator(act, lambda node, writer: writer.expression(formula, {"x": "input"}, node.shape))
    model = writer.model(ForwardGraph((act,), x.shape, {}), 17)
    onnx.checker.check_model(model, full_check=True)
    return runs(model.SerializeToString(), x)


X = Variable("x")
FORMULAS = {
    **{name: row.formula for name, row in ACTIVATIONS.load().items()},
    "all that there is": select(X <= 1, exp(abs(X) / 3) - 2, maximum(X, 0.5 - X)) + select(X < 0, 1, X * X),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_written_as_its_operations(name):
    x = np.linspace(-8, 8, 200, dtype=np.float32).reshape(20, 10)
    np.testing.assert_allclose(alone(FORMULAS[name], x), FORMULAS[name].evaluate(x=x), rtol=2e-6, atol=2e-6)


def test_every_operation_of_formulas_has_an_onnx_operator():
    assert all(onnx.defs.has(onnx_name(operation)) for operation in OPERATIONS)
    assert onnx_writer.IRREGULAR.keys() <= OPERATIONS.keys() and set(onnx_writer.COMPARISONS) <= OPERATIONS.keys()


def test_what_is_asked_of_a_file_and_cannot_be_is_said(every, tmp_path):
    for opset, said in ((16, "a whole number of 17 or more"), (99, "the onnx package that is installed knows 17 to")):
        with pytest.raises(UsageError, match=said):
            mest.to_onnx(every, tmp_path / "net.onnx", opset=opset)
    with pytest.raises(UsageError, match="leave one of opset and into out"):
        mest.to_onnx(every, tmp_path / "net.onnx", opset=18, into=tmp_path / "old.onnx")
    with pytest.raises(UsageError, match="cannot be written"):
        mest.to_onnx(every, tmp_path)
    with pytest.raises(DataError, match=r"absent\.onnx"):
        mest.to_onnx(every, tmp_path / "net.onnx", into=tmp_path / "absent.onnx")
    assert not list(tmp_path.iterdir())


def test_importing_the_package_imports_no_onnx():
    code = "import sys, mest_compile.operators.operator, mest_compile.exporting; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Into the file that a model came from.


def stored(path):
    """{name: array} of everything that a file holds, and the file without the values of its floats."""
    model = onnx.load(path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    held |= {one.output[0]: one.attribute[0].t for one in model.graph.node if one.op_type == "Constant"}
    arrays = {name: numpy_helper.to_array(tensor).copy() for name, tensor in held.items()}
    for tensor in held.values():
        tensor.ClearField("raw_data"), tensor.ClearField("float_data")
    return arrays, model


def test_weights_go_back_into_their_file_as_they_were_stored(tmp_path, trained):
    square = numbers(12, 12)  # whose shape does not tell which way it lies
    value = numpy_helper.from_array(numbers(CLASSES, 12), "any")
    nodes = [
        node("MatMul", "x a:b", "m"),
        node("Add", "m row", "h"),
        node("Relu", "h", "r"),
        gemm("r plain", "g"),
        helper.make_node("Constant", [], ["w"], value=value),
        helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(numbers(CLASSES), "b")),
        gemm("g w b"),
    ]
    weights = {"a:b": square, "row": numbers(1, 12), "plain": numbers(12, 12) + 1, "old": numbers(3, 3)}
    path = write(tmp_path, nodes, weights, others=[numpy_helper.from_array(np.array([1, 2]), "whole")])
    step = trained(path, (ROWS, 12))
    mest.to_onnx(step, tmp_path / "new.onnx", into=path)
    assert_predicts(tmp_path / "new.onnx", step, ROWS)
    (before, rest), (after, rest_after) = stored(path), stored(tmp_path / "new.onnx")
    assert rest == rest_after
    state = step.state_dict()
    np.testing.assert_array_equal(after["a:b"], state["a:b"].T)
    for name in ("row", "plain", "w", "b"):
        np.testing.assert_array_equal(after[name], state[name])
        assert (after[name] != before[name]).any()
    for name in ("old", "whole"):
        np.testing.assert_array_equal(after[name], before[name])
    mest.to_onnx(step, path, into=path)  # in its place
    assert path.read_bytes() == (tmp_path / "new.onnx").read_bytes()


def test_a_list_of_numbers_takes_weights_back(tmp_path, trained):
    nodes = [helper.make_node("Constant", [], ["b"], value_floats=[1.0] * CLASSES), gemm()]
    path = write(tmp_path, nodes, {"w": numbers(CLASSES, 12)})
    step = trained(path, (ROWS, 12))
    mest.to_onnx(step, path, into=path)
    assert_predicts(path, step, ROWS)


@pytest.mark.filterwarnings("ignore")
def test_parameters_that_were_merged_come_apart_again(tmp_path, trained):
    """The exporter merges equal ones, as those of new BatchNorms are; after training they are no longer equal."""
    torch.manual_seed(0)
    layers = [part for size in (3, 4) for part in (nn.Conv2d(size, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(module, (torch.randn(IMAGES),), path, dynamo=False, do_constant_folding=False)
    assert any(one.op_type == "Identity" for one in onnx.load(path).graph.node)
    step = trained(path)
    assert (step.state_dict()["1.running_mean"] != step.state_dict()["4.running_mean"]).all()
    mest.to_onnx(step, path, into=path)
    assert_predicts(path, step, IMAGES[0])
    mest.to_torch(step, module)
    with torch.no_grad():
        x = torch.randn(IMAGES)
        np.testing.assert_allclose(module.eval()(x).numpy(), step.predict(x), rtol=0, atol=1e-5)


def test_another_model_does_not_take_the_weights(tmp_path, trained):
    step = trained(write(tmp_path, [gemm("x w")], {"w": numbers(CLASSES, 12)}), (ROWS, 12))
    path = write(tmp_path, [gemm("x w", "h"), node("Relu", "h", "y")], {"w": numbers(CLASSES, 12)})
    before = path.read_bytes()
    with pytest.raises(StateError, match="not the model that the step was compiled from.*the number of operators"):
        mest.to_onnx(step, path, into=path)
    assert path.read_bytes() == before
