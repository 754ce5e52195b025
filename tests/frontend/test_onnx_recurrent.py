"""LSTM, GRU and RNN nodes of ONNX files: as torch exports them and as others write them; what cannot be trained is told
by name."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from test_onnx_import import node, numbers
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch

SHAPE, HIDDEN, CLASSES = (3, 5, 4), 6, 5  # N, T, inputs


class Net(nn.Module):
    """Takes a value of the series, their mean, and the last states."""

    def __init__(self, kind, batch_first=True, **more):
        super().__init__()
        self.rnn = kind(SHAPE[-1], HIDDEN, batch_first=batch_first, **more)
        self.batch_first = batch_first
        self.last = nn.Linear(HIDDEN * (1 + self.rnn.bidirectional), CLASSES)
        self.state = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        y, state = self.rnn(x if self.batch_first else x.transpose(0, 1))
        y = y if self.batch_first else y.transpose(0, 1)
        state = state[0] if isinstance(state, tuple) else state
        return self.last(y[:, 1] + y.mean(1)) + self.state(state[-1])


def assert_reads_as(path, module, but=(), **cells):
    """The same operators, on weights of the same values as torch's module has; returns {torch name: the file's}.
    but: kinds of operators in which the two may differ; cells: attributes in which the recurrent ones do."""
    (graph, state), (other, wanted) = from_onnx(path, SHAPE), from_torch(module, SHAPE)
    mine, theirs = ([one for one in found.nodes if one.op not in but] for found in (graph, other))
    names = {}
    for ours, torchs in zip(mine, theirs, strict=True):
        attrs = torchs.attrs | (cells if torchs.op == "recurrent" else {})
        assert (ours.op, ours.shape, ours.attrs) == (torchs.op, torchs.shape, attrs)
        names |= {torchs.params[role]: name for role, name in ours.params.items()}
    assert sorted(names) == sorted(wanted) and sorted(names.values()) == sorted(state)
    for name, array in wanted.items():
        assert np.array_equal(state[names[name]], array), name
    return names


KINDS = {
    "lstm": (nn.LSTM, {}),
    "gru, both directions": (nn.GRU, {"bidirectional": True}),
    "rnn, two layers": (nn.RNN, {"num_layers": 2, "bias": False, "nonlinearity": "relu", "batch_first": False}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_exports_is_read_as_torch(kind, folded, tmp_path):
    """The exporter puts gates in ONNX's order; where it does not fold that, the weights are torch's by name."""
    torch.manual_seed(0)
    make, more = KINDS[kind]
    module, path = Net(make, **more).eval(), tmp_path / "net.onnx"
    torch.onnx.export(module, (torch.randn(SHAPE),), path, dynamo=False, do_constant_folding=folded)
    layers = kind == "rnn, two layers"  # whose last states it joins, and torch's layer does so in another order
    names = assert_reads_as(path, module, ("concat", "slice", "flatten") if layers else ())
    assert folded or all(ours == torchs for torchs, ours in names.items())


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_a_file_has_torchs_gradients_and_its_weights_go_back(tmp_path):
    torch.manual_seed(0)
    module, path = Net(nn.GRU, num_layers=2).eval(), tmp_path / "net.onnx"
    torch.onnx.export(module, (torch.randn(SHAPE),), path, dynamo=False)
    parameters = {name: one.detach().numpy().copy() for name, one in module.named_parameters()}
    step = mest.compile(path, SHAPE, "dense", 0, optimizer=mest.SGD(lr=0.1))
    x, labels = numbers(*SHAPE), np.arange(SHAPE[0])
    with torch.no_grad():
        np.testing.assert_allclose(step.predict(x), module(torch.from_numpy(x)), atol=1e-6)
    found, state = step.gradients(x, labels), step.state_dict()
    module.double()
    nn.functional.cross_entropy(module(torch.from_numpy(x).double()), torch.from_numpy(labels)).backward()
    assert len(found) == len(parameters)
    for name, one in module.named_parameters():
        ours = next(key for key in found if np.array_equal(state[key], parameters[name]))
        np.testing.assert_allclose(found[ours], one.grad.numpy(), atol=1e-6)
    step(x, labels)
    mest.to_onnx(step, tmp_path / "into.onnx", into=path)
    _, trained = from_onnx(tmp_path / "into.onnx", SHAPE)
    assert trained.keys() == state.keys()
    for name, value in step.state_dict().items():
        assert np.array_equal(trained[name], value) and not np.array_equal(value, state[name])
    mest.to_onnx(step, tmp_path / "out.onnx")  # where gates pass by a matrix of ones, which is no weight
    _, again = from_onnx(tmp_path / "out.onnx", SHAPE)
    assert again.keys() == trained.keys() and all(np.array_equal(again[name], trained[name]) for name in again)


def gates_of(kind):
    """Of ONNX's: where torch's nn.LSTM, nn.GRU and nn.RNN have them."""
    return {"LSTM": "ifco", "GRU": "rzn", "RNN": "n"}[kind], {"LSTM": "iofc", "GRU": "zrn", "RNN": "n"}[kind]


def built(folder, kind, weights=("W", "R", "B"), more=(), outputs=("Y",), **attributes):
    """A file with one such node and a linear layer of its last value or, of three outputs, of its last cell state; and
    its initializers."""
    (batch, steps, inputs), rng = SHAPE, np.random.default_rng(1)
    rows = len(gates_of(kind)[0]) * HIDDEN
    held = {"W": (1, rows, inputs), "R": (1, rows, HIDDEN), "B": (1, 2 * rows), "L": (CLASSES, HIDDEN)}
    held |= {"P": (1, 3 * HIDDEN), "h1": (1, batch, HIDDEN)}
    held = {name: (rng.standard_normal(sizes) / 3).astype(np.float32) for name, sizes in held.items()}
    held |= {"h0": np.zeros_like(held["h1"]), "lengths": np.full(batch, steps, np.int32)}
    held |= {"last": np.array(steps - 1), "one": np.array([1]), "none": np.array([0])}
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0, 2]),
        helper.make_node(kind, ["t", *weights, *more], outputs, name="cells", hidden_size=HIDDEN, **attributes),
        *([node("Squeeze", "Y one", "s"), node("Gather", "s last", "g", axis=0)] if len(outputs) == 1 else []),
        *([node("Squeeze", "C none", "g")] if len(outputs) == 3 else []),
        node("Gemm", "g L", "y", transB=1),
    ]
    read = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (batch, CLASSES))],
        [numpy_helper.from_array(array, name) for name, array in held.items() if name in read],
    )
    path = folder / "built.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path, held


class Built(nn.Module):
    """The same net by torch's layer."""

    def __init__(self, kind, held):
        super().__init__()
        self.rnn = getattr(nn, kind)(SHAPE[-1], HIDDEN, batch_first=True)
        self.last = nn.Linear(HIDDEN, CLASSES, bias=False)
        torchs, theirs = gates_of(kind)
        rows = np.concatenate([np.arange(HIDDEN) + HIDDEN * theirs.index(gate) for gate in torchs])
        parts = held["W"][0], held["R"][0], *np.split(held["B"][0], 2)
        with torch.no_grad():
            for parameter, array in zip(self.parameters(), [*(part[rows] for part in parts), held["L"]], strict=True):
                parameter.copy_(torch.from_numpy(array))

    def forward(self, x):
        return self.last(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    ("kind", "more", "attributes"),
    [
        ("LSTM", ("", "h0", "h0"), {"activations": ["Sigmoid", "Tanh", "Tanh"]}),
        ("GRU", (), {"linear_before_reset": 1}),
        ("RNN", (), {"direction": "reverse"}),
    ],
)
def test_what_others_write_is_read_as_torchs_layer(kind, more, attributes, tmp_path):
    path, held = built(tmp_path, kind, more=more, **attributes)
    reverse = attributes.get("direction") == "reverse"
    names = assert_reads_as(path, Built(kind, held), reverse=reverse)
    way = "reverse" if reverse else "forward"
    assert list(names.values()) == [f"W.{way}", f"B.{way}.input", f"R.{way}", f"B.{way}.hidden", "L"]


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("GRU", {}, "linear_before_reset=0; torch's GRU is the one with 1"),
        ("LSTM", {"more": ("lengths",)}, "a length for every series"),
        ("LSTM", {"more": ("", "h1", "h0")}, "a state to begin with"),
        ("LSTM", {"more": ("", "", "", "P")}, "peepholes"),
        ("LSTM", {"clip": 3.0}, "clip=3"),
        ("LSTM", {"input_forget": 1}, "input_forget=1"),
        ("RNN", {"activations": ["Sigmoid"]}, "the activations Sigmoid"),
        ("LSTM", {"outputs": ("Y", "", "C")}, "its last cell state used as a value"),
        ("RNN", {"weights": ("W", "R", "t")}, "computed weights"),
    ],
)
def test_what_cannot_be_trained_is_told(kind, arguments, said, tmp_path):
    path, _ = built(tmp_path, kind, **arguments)
    with pytest.raises(UnsupportedOperator, match=f"^{kind} \\({kind} with {said}.*in node 'cells'"):
        from_onnx(path, SHAPE)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (helper.make_node("RNN", ["t", "W", "R"], ["Y2"], hidden_size=HIDDEN), "shared weights cannot be trained"),
        (node("MatMul", "Y R", "Y2"), "the weight 'R', which something else takes as well"),
    ],
)
def test_a_weight_that_something_else_takes_is_told(other, said, tmp_path):
    """It would become two that train apart."""
    path, _ = built(tmp_path, "RNN")
    model = onnx.load(path)
    model.graph.node[2].input[0] = "Z"
    for place, one in enumerate((other, node("Add", "Y Y2", "Z"))):
        model.graph.node.insert(2 + place, one)
    onnx.save(model, path)
    with pytest.raises(UnsupportedOperator, match=said):
        from_onnx(path, SHAPE)
