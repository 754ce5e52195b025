"""ForwardGraph -> ONNX: what operators write themselves with, and the file around it.

Weights are dense initializers under their torch names, as many tools read no sparse ones; the sizes of every value are
written, as some infer none; the batch is "N".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mest_compile import __version__
from mest_compile.base import checks
from mest_compile.base.errors import NotInstalled, UsageError
from mest_compile.frontend.naming import INPUT, PREPARE
from mest_compile.ir.expressions import Apply, Constant, Expression, Variable
from mest_compile.ir.graph import ForwardGraph, Node, Preparation

OPSET = 17  # the first that has all that operators write
OUTPUT = "logits"
# Operations of ir.expressions whose ONNX operators are not called likewise.
IRREGULAR = {
    "subtract": "Sub",
    "multiply": "Mul",
    "divide": "Div",
    "maximum": "Max",
    "minimum": "Min",
    "at_least": "GreaterOrEqual",
    "at_most": "LessOrEqual",
    "select": "Where",
}
MOST_BYTES = 2**31  # of a message
TOO_LARGE = "the model has more than 2 GiB of weights, which one .onnx file cannot hold"
COMPARISONS = ("greater", "less", "at_least", "at_most")


def onnx_name(operation: str) -> str:
    """The ONNX operator that an operation of ir.expressions is."""
    return IRREGULAR.get(operation, operation.capitalize())


class Writer:
    """Collects the nodes of a graph whose input has that shape and whose weights `state` has by torch name."""

    def __init__(self, state: Mapping[str, np.ndarray], input_shape: tuple[int, ...]):
        self.nodes: list[Any] = []
        self.sizes: dict[str, tuple[tuple[str | int, ...], str]] = {  # value -> (shape, kind)
            INPUT: (("N", *input_shape[1:]), "float")
        }
        self.weights: dict[str, np.ndarray] = {}  # those that are read
        self.values = {INPUT: INPUT}  # name of a node of the ForwardGraph -> of its value
        self._state = state
        self._taken = {*state, INPUT, OUTPUT}
        self._numbers: dict[float, str] = {}
        self._path = ""

    def operator(self, node: Node, write: Callable[[Node, Writer], str]) -> None:
        """Lets an operator's `onnx` write that node."""
        self._path = node.name
        self.values[node.name] = write(node, self)

    def prepare(self, steps: Sequence[Preparation]) -> None:
        """Lets the operators see the input after these steps."""
        self._path = PREPARE
        shape = self.shape(INPUT)
        for step in steps:
            value, operand = self.values[INPUT], self._channels(step.operand, len(shape) - 2)
            inputs = [operand, value] if step.swapped else [value, operand]
            self.values[INPUT] = self.call(onnx_name(step.operation), inputs, shape)
        if len(shape) == 3:  # which operators see as images of one row
            row = (*shape[:2], 1, shape[2])
            self.values[INPUT] = self.call("Unsqueeze", [self.values[INPUT], self.axis(2)], row)

    def inputs(self, node: Node) -> list[str]:
        """The values that it reads."""
        return [self.values[name] for name in node.inputs]

    def sizes_of(self, weight: str) -> tuple[int, ...]:
        """Of an initializer."""
        return self._state[weight].shape

    def shape(self, value: str) -> tuple[Any, ...]:
        """Of a value, the batch first."""
        return self.sizes[value][0]

    def parameters(self, node: Node, *roles: str) -> list[str]:
        """Its initializers of those roles, as far as it has them."""
        return [self.weight(node.params[role]) for role in roles if role in node.params]

    def weight(self, name: str) -> str:
        """The initializer of that torch name."""
        self.weights[name] = self._state[name]
        return name

    def call(
        self, operator: str, inputs: Sequence[str], shape: tuple[int, ...], kind: str = "float", **attributes: Any
    ) -> str:
        """Adds an ONNX node; returns the name of its value.

        shape  of the value, the batch first
        kind   of its elements: "float" (float32), "bool" or "int64"
        """
        from onnx import helper

        name = self._free(f"{self._path}/{operator}")
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        self.sizes[name] = ("N", *shape[1:]), kind
        return name

    def number(self, value: float) -> str:
        """A constant without axes."""
        if value not in self._numbers:
            self._numbers[value] = self.constant(np.array(value, np.float32), f"number {value:g}")
        return self._numbers[value]

    def constant(self, array: np.ndarray, name: str) -> str:
        """float32 or, of sizes, int64."""
        from onnx import helper, numpy_helper

        name = self._free(name)
        self.sizes[name] = array.shape, "float" if array.dtype == np.float32 else "int64"
        self.nodes.append(
            helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(array, name))
        )
        return name

    def turned(self, weight: str) -> str:
        """The initializer's transpose, of two axes."""
        name = self.call("Transpose", [weight], (), perm=(1, 0))
        self.sizes[name] = self._state[weight].shape[::-1], "float"
        return name

    def squeezed(self, value: str) -> str:
        """(N, C, L) of an image (N, C, 1, L)."""
        name = self.call("Squeeze", [value, self.axis(2)], ())
        (batch, channels, _, length), kind = self.sizes[value]
        self.sizes[name] = (batch, channels, length), kind
        return name

    def repeated(self, value: str, shape: tuple[int, ...]) -> str:
        """What has no batch, of that shape for every example."""
        (axes, _), rank = self.sizes[self.values[INPUT]], len(shape)
        whole = self.call("Shape", [self.values[INPUT]], (), "int64")
        self.sizes[whole] = (len(axes),), "int64"
        count = self.call("Gather", [whole, self.axis(0)], (), "int64", axis=0)
        self.sizes[count] = (1,), "int64"
        sizes = self.call("Concat", [count, self.constant(np.array(shape[1:]), "sizes")], (), "int64", axis=0)
        self.sizes[sizes] = (rank,), "int64"
        return self.call("Expand", [value, sizes], shape)

    def axis(self, number: int) -> str:
        """One axis, as Squeeze and Unsqueeze take it."""
        return self.constant(np.array([number]), f"axis {number}")

    def _channels(self, operand: float | tuple[float, ...] | str, axes: int) -> str:
        """A number a channel, with so many axes behind it. operand: as Preparation has it."""
        if isinstance(operand, float):
            return self.number(operand)
        sizes = (-1, *[1] * axes)
        if isinstance(operand, tuple):
            return self.constant(np.array(operand, np.float32).reshape(sizes), "number a channel")
        return self.shaped(operand, (self._state[operand].size, *sizes[1:]))

    def shaped(self, name: str, sizes: Sequence[int]) -> str:
        """The initializer of that torch name with these axes, as far as it needs them to be spread over a value."""

        def needed(shape: Sequence[int]) -> list[int]:
            return list(shape)[next((place for place, size in enumerate(shape) if size != 1), len(shape)) :]

        if needed(self._state[name].shape) == needed(sizes):
            return self.weight(name)
        shape = self.constant(np.array(sizes), f"sizes of {name}")
        made = self.call("Reshape", [self.weight(name), shape], ())
        self.sizes[made] = tuple(sizes), "float"
        return made

    def expression(self, formula: Expression, values: Mapping[str, str], shape: tuple[int, ...]) -> str:
        """The value of a formula, element by element. values: {variable: what it is here}, each of that shape."""
        match formula:
            case Variable(name):
                return values[name]
            case Constant(value):
                return self.number(value)
            case Apply("maximum", (Constant(0.0), other)):
                return self.call("Relu", [self.expression(other, values, shape)], shape)
            case Apply("minimum", (Constant(high), Apply("maximum", (Constant(low), other)))):
                bounds = [self.number(low), self.number(high)]
                return self.call("Clip", [self.expression(other, values, shape), *bounds], shape)
            case Apply(operation, arguments):
                inputs = [self.expression(argument, values, shape) for argument in arguments]
                return self.call(onnx_name(operation), inputs, shape, "bool" if operation in COMPARISONS else "float")
        raise AssertionError(f"{formula!r} is no expression")

    def model(self, graph: ForwardGraph, opset: int) -> Any:
        """The whole but for the initializers, as an onnx.ModelProto, the last node's value as `OUTPUT`."""
        from onnx import helper

        logits = self.values[graph.nodes[-1].name]
        for node in self.nodes:
            node.input[:] = [OUTPUT if name == logits else name for name in node.input]
            node.output[:] = [OUTPUT if name == logits else name for name in node.output]
        sizes = {OUTPUT if name == logits else name: size for name, size in self.sizes.items()}

        def described(name: str) -> Any:
            shape, kind = sizes[name]
            return helper.make_tensor_value_info(name, _kinds()[kind], list(shape))

        made = helper.make_graph(
            self.nodes,
            "mest-compile",
            [described(INPUT)],
            [described(OUTPUT)],
            value_info=[described(name) for name in sizes if name not in (INPUT, OUTPUT)],
        )
        imported = [helper.make_opsetid("", opset)]
        return helper.make_model(
            made,
            opset_imports=imported,
            ir_version=helper.find_min_ir_version_for(imported),
            producer_name="mest-compile",
            producer_version=__version__,
        )

    def _free(self, name: str) -> str:
        number, found = 1, name
        while found in self._taken:
            number += 1
            found = f"{name} {number}"
        self._taken.add(found)
        return found


def check_opset(opset: Any) -> int:
    """Raises UsageError for a version that operators are not written for, or that the installed onnx does not know."""
    from onnx import defs

    found, most = checks.whole("opset", opset, OPSET), defs.onnx_opset_version()
    if found > most:
        raise UsageError(f"opset is {found}; the onnx package that is installed knows {OPSET} to {most}")
    return found


def load_onnx_package() -> None:
    """Raises NotInstalled where it is not there."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise NotInstalled("reading and writing .onnx files needs the package onnx: pip install onnx") from error


def content_of(model: Any) -> bytes:
    """The file of an onnx.ModelProto. Raises UsageError where it is beyond what one file can hold."""
    from google.protobuf.message import EncodeError

    try:
        return model.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise UsageError(TOO_LARGE) from error


def pieces(model: Any, weights: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    """The file of an onnx.ModelProto with these initializers, in pieces, one behind another; those of arrays are the
    arrays' own memory. With them in the model they would be in memory twice more, in it and as it is written.

    weights  name -> float32 array
    Raises UsageError as `content_of`. Source: https://protobuf.dev/programming-guides/encoding, a message in a message
    is its field's tag, its size and its fields in any order.
    """
    from onnx import GraphProto, ModelProto, TensorProto

    def opened(message: Any, field: str, size: int) -> bytes:
        return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2) + _varint(size)

    heads = []
    for name, array in weights.items():
        tensor = TensorProto(dims=array.shape, data_type=TensorProto.FLOAT, name=name)
        head = tensor.SerializeToString() + opened(TensorProto, "raw_data", array.nbytes)
        heads.append(opened(GraphProto, "initializer", len(head) + array.nbytes) + head)
    graph, around = model.graph.SerializeToString(), ModelProto()
    around.CopyFrom(model)
    around.ClearField("graph")
    size = len(graph) + sum(len(head) + array.nbytes for head, array in zip(heads, weights.values()))
    begin = around.SerializeToString() + opened(ModelProto, "graph", size)
    if len(begin) + size >= MOST_BYTES:
        raise UsageError(TOO_LARGE)
    found: list[bytes | memoryview] = [begin + graph]
    for head, array in zip(heads, weights.values()):
        found += head, np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data
    return found


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more come."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _kinds() -> dict[str, int]:
    from onnx import TensorProto

    return {"float": TensorProto.FLOAT, "bool": TensorProto.BOOL, "int64": TensorProto.INT64}
