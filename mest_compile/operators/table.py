"""Numbers picked from a parameter by constant places, added to every example: biases of scores that are no
attention's."""

from __future__ import annotations

from math import prod

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader
from mest_compile.frontend.values import Picked, Value
from mest_compile.ir.graph import Node
from mest_compile.operators.attention_bias import bias_buffers, bias_constants, table_gradient, write_bias
from mest_compile.operators.combine import Combine, CombineBackward, Goal, Weights
from mest_compile.operators.operator import Operator, Trace, operator

SUM = "x0 + x1"


@operator("table")
class Table(Operator):
    """params: bias, the table; attrs: bias (channels, 1, rows, columns), and what `attention_bias.Bias` has of a table:
    heads (channels), places (of a row and a column), apart, table."""

    def constants(self, node: Node) -> dict[str, np.ndarray]:
        return bias_constants(node)

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        problem = Combine(SUM, (x.image, _weights(node)), y.image)
        low.call("combine.forward", problem, x, *bias_buffers(node, low, low.stage), y)

    def backward(self, node: Node, low: Trace) -> None:
        dy, goals, results = low.gradient(node), [], []
        if low.needs_gradient(node.inputs[0]):
            dx, accumulate = low.contribute(node.inputs[0])
            goals.append(Goal(0, dx.image, accumulate))
            results.append(dx)
        trained = low.trains(node, "bias")
        gradients = [low.temporary(f"{node.name}.gradients", prod(node.attrs["bias"]))] if trained else []
        goals += [Goal(1, _weights(node))] * trained
        if goals:
            problem = CombineBackward(SUM, dy.image, (None, None), tuple(goals))
            low.call("combine.backward", problem, dy, *results, *gradients)
        if trained:
            table_gradient(node, low, (1, node.attrs["heads"], 1), gradients[0])

    def onnx(self, node: Node, writer: Writer) -> str:
        sizes = writer.constant(np.array((-1, *node.shape[2:])), "sizes")
        added = writer.call("Reshape", [write_bias(node, writer), sizes], node.shape[1:])
        return writer.call("Add", [*writer.inputs(node), added], node.shape)


def _weights(node: Node) -> Weights:
    """The numbers, one for each place of an example."""
    channels, _, rows, columns = node.attrs["bias"]
    return Weights(channels * rows * columns, (rows * columns, columns, 1))


def plus_picked(reader: Reader, value: Value, held: Picked) -> Value:
    """An activation and numbers that are spread over it. Raises UnsupportedOperator."""
    _, *sizes = value.shape
    places = np.broadcast_to(held.places, (1, *sizes)).reshape(-1, *sizes[1:]) if len(sizes) == 3 else np.zeros((0, 1))
    apart = int(places[1].flat[0] - places[0].flat[0]) if len(places) > 1 else 0
    regular = len(places) and (places == places[0] + np.arange(len(places)).reshape(-1, 1, 1) * apart).all()
    if not regular or held.added is not None:
        raise reader.error(f"{reader.called} of a value {value.shape} and numbers picked from {held.name}")
    attrs = {
        "bias": (sizes[0], 1, *sizes[1:]),
        "heads": sizes[0],
        "places": tuple(map(int, places[0].ravel())),
        "apart": apart,
        "table": prod(reader.state_shapes[held.name]),
    }
    return reader.add("table", (value,), value.shape, {"bias": held.name}, attrs)
