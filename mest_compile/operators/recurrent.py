"""Recurrent layers: GRU, LSTM and plain ones, a whole series at a time, with their backward pass through time.

What a step of the series gives to the gates is a linear layer of all steps, a node of its own. Here is the rest: each
step's gates take in the state of the step before, of which a dense weight makes `p`. A cell is written once, as
expressions of x0, x1, ... and p0, p1, ... (gate by gate), h and c (the state before) and new_c; kernels, gradients and
the float64 reference follow. Source: Cho et al., arXiv:1406.1078; Hochreiter and Schmidhuber, 1997; gates in torch's
order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.base.registry import Registry
from mest_compile.frontend.onnx_recurrent import AS_THEY_ARE, ORDERS
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _is_stored, _shape, reads
from mest_compile.ir.arrangement import Arrangement, merged, whole
from mest_compile.ir.expressions import Expression, Variable, maximum, tanh
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import SIZE
from mest_compile.ir.program import Buffer
from mest_compile.operators.operator import Operator, Trace, operator

CELLS = Registry("recurrent cell", "mest_compile.operators")
DX, DP = "x", "p"  # what gradients of gates are of


@dataclass(frozen=True, slots=True)
class Cell:
    """gates: how many; hidden: what the hidden state becomes; carried: what the other state does, if there is one.

    onnx   its ONNX operator, and its attributes
    """

    gates: int
    hidden: Expression
    onnx: tuple[str, dict[str, Any]]
    carried: Expression | None = None

    @property
    def states(self) -> tuple[str, ...]:
        return ("h",) if self.carried is None else ("h", "c")

    def slope(self, name: str) -> Expression:
        """What a variable's gradient is, of those of the new states: dh and dc."""
        found = Variable("dh") * self.hidden.derivative(name)
        return found if self.carried is None else found + self.due_carried * self.carried.derivative(name)

    @property
    def due_carried(self) -> Expression:
        """The whole gradient of the new other state: it makes the hidden one, too."""
        return Variable("dc") + Variable("dh") * self.hidden.derivative("new_c")


def sigmoid(a: Expression) -> Expression:
    """By tanh: no infinity is divided by another in its slope."""
    return 0.5 * tanh(0.5 * a) + 0.5


_x, _p = ([Variable(f"{kind}{gate}") for gate in range(4)] for kind in (DX, DP))
_h, _c, _sum = Variable("h"), Variable("c"), [x + p for x, p in zip(_x, _p, strict=True)]
_NEW = tanh(_x[2] + sigmoid(_sum[0]) * _p[2])
CELLS.add("gru", Cell(3, _NEW + sigmoid(_sum[1]) * (_h - _NEW), ("GRU", {"linear_before_reset": 1})))
CELLS.add(
    "lstm",
    Cell(
        4,
        sigmoid(_sum[3]) * tanh(Variable("new_c")),
        ("LSTM", {}),
        sigmoid(_sum[1]) * _c + sigmoid(_sum[0]) * tanh(_sum[2]),
    ),
)
CELLS.add("rnn_tanh", Cell(1, tanh(_sum[0]), ("RNN", {"activations": ["Tanh"]})))
CELLS.add("rnn_relu", Cell(1, maximum(0, _sum[0]), ("RNN", {"activations": ["Relu"]})))


@dataclass(frozen=True, slots=True)
class Recurrent:
    """Kernel "recurrent.forward": x (x.elems,), gate by gate; weight (x.channels * hidden,) float32, of [row, state];
    bias (x.channels,) float32 if `bias`; kept (kept_elems,) float32; y (y.elems,), the hidden states.

    x, y are series, images of one row. The state before the first step is 0.
    reverse  the last pixel is the first step
    kept     [slice, step, row, lane]: p, then each of the cell's states
    """

    x: Image
    y: Image
    cell: str
    reverse: bool = False
    bias: bool = False

    @property
    def of(self) -> Cell:
        return CELLS.find(self.cell)

    @property
    def rows(self) -> int:
        """Of a step in `kept`."""
        return self.x.channels + len(self.of.states) * self.y.channels

    @property
    def kept_elems(self) -> int:
        return self.x.lanes * self.x.width * self.rows


@dataclass(frozen=True, slots=True)
class RecurrentBackward:
    """Kernel "recurrent.backward": dy (dy.elems,), x, weight and kept as in the forward pass, dues (kept_elems,)
    float32, dx (dx.elems,).

    dues        [slice, step, row, lane]: gradients of p, then what the states before the step get
    accumulate  dx += instead
    """

    forward: Recurrent
    dy: Image
    dx: Image
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class RecurrentParameters:
    """Kernel "recurrent.parameters": kept, dues, dweight (gates * hidden * hidden,), dbias (gates * hidden,) if `bias`.

    steps   of the series; lanes: examples there is room for, in slices of `vector`; in lanes beyond those dues are 0
    """

    cell: str
    hidden: int = field(metadata=SIZE)
    steps: int = field(metadata=SIZE)
    lanes: int = field(metadata=SIZE)
    vector: int
    bias: bool = False

    @property
    def gates(self) -> int:
        """Rows of the weight."""
        return CELLS.find(self.cell).gates * self.hidden

    @property
    def rows(self) -> int:
        return self.gates + len(CELLS.find(self.cell).states) * self.hidden


def _steps(problem: Recurrent) -> list[int]:
    """Pixels in the order of time."""
    pixels = list(range(problem.x.width))
    return pixels[::-1] if problem.reverse else pixels


def forward_reference(
    problem: Recurrent, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(y (H, 1, T, N), kept (steps, rows, N)) in float64; x (gates * H, 1, T, N), weight (gates * H, H)."""
    cell, hidden = problem.of, problem.y.channels
    matrix = weight.reshape(-1, hidden).astype(np.float64)
    state = {name: np.zeros((hidden, x.shape[-1])) for name in cell.states}
    y, kept = np.zeros((hidden, *x.shape[1:])), []
    for pixel in _steps(problem):
        p = matrix @ state["h"] + (0 if bias is None else bias.astype(np.float64)[:, None])
        values = _gates(x[:, 0, pixel], p, hidden) | state
        if cell.carried is not None:
            state["c"] = values["new_c"] = cell.carried.evaluate(**values)
        y[:, 0, pixel] = state["h"] = cell.hidden.evaluate(**values)
        kept.append(np.concatenate([p, *state.values()]))
    return y, np.stack(kept)


def backward_reference(
    problem: Recurrent, dy: np.ndarray, x: np.ndarray, weight: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(dx, dues (steps, rows, N)) in float64; kept (steps, rows, N)."""
    cell, hidden, rows = problem.of, problem.y.channels, len(weight.reshape(-1, problem.y.channels))
    matrix, kept = weight.reshape(-1, hidden).astype(np.float64), kept.astype(np.float64)
    dx, dues = np.zeros(x.shape), np.zeros(kept.shape)
    due = {f"d{name}": np.zeros((hidden, x.shape[-1])) for name in cell.states}
    for step, pixel in reversed(list(enumerate(_steps(problem)))):
        before = kept[step - 1, rows:] if step else np.zeros_like(kept[0, rows:])
        values = _gates(x[:, 0, pixel], kept[step, :rows], hidden)
        values |= dict(zip(cell.states, before.reshape(-1, hidden, x.shape[-1]), strict=True))
        values |= due | {"dh": due["dh"] + dy[:, 0, pixel], "new_c": kept[step, -hidden:]}

        def slopes(kind: str, values: dict[str, np.ndarray] = values) -> np.ndarray:
            found = [cell.slope(f"{kind}{gate}").evaluate(**values) for gate in range(cell.gates)]
            return np.concatenate([np.broadcast_to(one, values["dh"].shape) for one in found])

        dx[:, 0, pixel], dues[step, :rows] = slopes(DX), slopes(DP)
        due = {f"d{name}": np.zeros(before.shape[1:]) + cell.slope(name).evaluate(**values) for name in cell.states}
        due = {name: np.broadcast_to(one, (hidden, x.shape[-1])) for name, one in due.items()}
        due["dh"] = due["dh"] + matrix.T @ dues[step, :rows]
        dues[step, rows:] = np.concatenate(list(due.values()))
    return dx, dues


def parameters_reference(
    problem: RecurrentParameters, kept: np.ndarray, dues: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(dweight (gates * H, H), dbias (gates * H,)) in float64; kept, dues (steps, rows, N)."""
    rows, hidden = problem.gates, problem.hidden
    due, before = dues[:, :rows].astype(np.float64), kept[:-1, rows : rows + hidden].astype(np.float64)
    return np.einsum("trn,tkn->rk", due[1:], before), due.sum((0, 2))


def _gates(x: np.ndarray, p: np.ndarray, hidden: int) -> dict[str, np.ndarray]:
    return {
        f"{kind}{gate}": values[gate * hidden : (gate + 1) * hidden].astype(np.float64)
        for kind, values in ((DX, x), (DP, p))
        for gate in range(len(x) // hidden)
    }


@operator("recurrent")
class RecurrentOperator(Operator):
    """params: weight (gates * H, H), bias?; attrs: cell, reverse."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        bias = [low.parameter(node, "bias")] if "bias" in node.params else []
        problem = Recurrent(x.image, y.image, **node.attrs, bias=bool(bias))
        weight, kept = low.parameter(node, "weight"), _kept(node, low, problem, "kept")
        low.call("recurrent.forward", problem, x, weight, *bias, kept, y)

    def backward(self, node: Node, low: Trace) -> None:
        dy, x, weight = low.gradient(node), low.value(node.inputs[0]), low.parameter(node, "weight")
        image = Image(node.shape[1], 1, node.shape[3], x.image.batch, vector=x.image.vector)
        problem = Recurrent(x.image, image, **node.attrs, bias="bias" in node.params)
        kept, dues = (_kept(node, low, problem, name) for name in ("kept", "dues"))
        source = node.inputs[0]
        if low.needs_gradient(source):
            dx, accumulate = low.contribute(source)
        else:  # its kernel gives what the parameters' gradients are made of as well
            dx, accumulate = low.scratch(f"{source}.gradient", x.image), False
        back = RecurrentBackward(problem, dy.image, dx.image, accumulate)
        low.call("recurrent.backward", back, dy, x, weight, kept, dues, dx)
        trained = [role for role in ("weight", "bias") if low.trains(node, role)]
        if trained:
            found = RecurrentParameters(
                problem.cell, node.shape[1], node.shape[3], image.lanes, image.vector, "bias" in trained
            )
            if "weight" in trained:
                dweight = low.parameter_gradient(node, "weight")
            else:
                dweight = low.temporary(f"{node.name}.dweight", found.gates * found.hidden)
            dbias = [low.parameter_gradient(node, "bias")] if "bias" in trained else []
            low.call("recurrent.parameters", found, kept, dues, dweight, *dbias)

    def onnx(self, node: Node, writer: Writer) -> str:
        """As ONNX has it, which would compute what the linear layer before it does: by a matrix of ones and zeros."""
        (x,), cell, hidden = writer.inputs(node), CELLS.find(node.attrs["cell"]), node.shape[1]
        rows, steps = cell.gates * hidden, node.shape[3]
        order = np.concatenate([np.arange(gate * hidden, (gate + 1) * hidden) for gate in ORDERS[cell.onnx[0]]])
        series = writer.squeezed(x)
        first = writer.call("Transpose", [series], (), perm=(2, 0, 1))
        writer.sizes[first] = (steps, "N", rows), "float"
        takes = writer.constant(np.eye(rows, dtype=np.float32)[order][None], AS_THEY_ARE)
        places = writer.constant(order, "order of gates")

        def ordered(role: str) -> str:
            held = writer.weight(node.params[role])
            name = writer.call("Gather", [held, places], (), axis=0)
            writer.sizes[name] = writer.sizes_of(held), "float"
            return name

        weight = writer.call("Unsqueeze", [ordered("weight"), writer.axis(0)], ())
        writer.sizes[weight] = (1, rows, hidden), "float"
        bias = ""
        if "bias" in node.params:
            none = writer.constant(np.zeros(rows, np.float32), "no bias")
            both = writer.call("Concat", [none, ordered("bias")], (), axis=0)
            writer.sizes[both] = (2 * rows,), "float"
            bias = writer.call("Unsqueeze", [both, writer.axis(0)], ())
            writer.sizes[bias] = (1, 2 * rows), "float"
        kind, attrs = cell.onnx
        direction = "reverse" if node.attrs["reverse"] else "forward"
        made = writer.call(kind, [first, takes, weight, bias], (), hidden_size=hidden, direction=direction, **attrs)
        writer.sizes[made] = (steps, 1, "N", hidden), "float"
        return writer.call("Transpose", [made], node.shape, perm=(2, 3, 1, 0))


def _kept(node: Node, low: Trace, problem: Recurrent, name: str) -> Buffer:
    return low.temporary(f"{node.name}.{name}", problem.kept_elems)


def _read(reader: Reader, call: Any, arguments: list) -> Any:
    """(N, T, H) of (N, T, inputs), two weights and two biases or none, or of gates, the second weight and bias."""
    _, cell, *gated, direction = str(call.args[0].global_symbol).split(".")
    value, *stored = arguments[1:]
    if not _is_stored(*stored):
        raise reader.error(f"{cell} with computed weights")
    weights, biases = ([stored[0]], stored[1:]) if gated else (stored[:2], stored[2:])
    arrangement, dims = reader.arrangement(reader.seen(value)), whole(reader.bare(value).shape)
    examples, steps, inputs = arrangement.axes
    if examples != dims["N"]:
        raise reader.error(f"{cell} of a value of shape {value.shape}, whose examples are not apart,")
    gates = reader.lay(value, {"C": inputs, "H": (), "W": merged(steps)})
    batch, length, hidden = _shape(call)
    params = [{"weight": weight.name} for weight in weights]
    for given, bias in zip(params, biases, strict=bool(biases)):
        given["bias"] = bias.name
    if not gated:
        gates = reader.add("linear", (gates,), (batch, reader.shape_of(weights[0])[0], 1, length), params[0])
    how = {"cell": cell, "reverse": direction == "reverse"}
    made = reader.add("recurrent", (gates,), (batch, hidden, 1, length), params[-1], how)
    dims = whole(made.shape)
    return reader.viewed(made, Arrangement((dims["N"], dims["W"], dims["C"])))


def _names(*cells: str) -> list[str]:
    return [f"mest.{cell}{of}.{way}" for cell in cells for of in ("", ".gates") for way in ("forward", "reverse")]


reads(*_names("gru"), gives=("gru",))(_read)
reads(*_names("lstm"), gives=("lstm",))(_read)
reads(*_names("rnn_tanh", "rnn_relu"), gives=("rnn",))(_read)
