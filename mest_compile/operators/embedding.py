"""Rows of a table by whole numbers: tokens and other things that are counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _is_stored, _shape, reads
from mest_compile.frontend.values import Value, Whole
from mest_compile.ir.arrangement import Arrangement, whole
from mest_compile.ir.graph import ForwardGraph, Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import SIZE
from mest_compile.operators.operator import Operator, Trace, operator

TOLD_APART = {"float16": 2**11, "bfloat16": 2**8}  # whole numbers, from 0 on


@dataclass(frozen=True, slots=True)
class Embedding:
    """Kernel "embedding.forward": x (x.elems,) of one pixel, weight (rows * y.channels,) float32, y (y.elems,), pixel k
    of which is the row that channel k of x names. What names none takes the nearest that there is.
    """

    x: Image
    y: Image
    rows: int = field(metadata=SIZE)


@dataclass(frozen=True, slots=True)
class EmbeddingBackward:
    """Kernel "embedding.backward": dy (dy.elems,), 0 in lanes without an example, x as in the forward pass, dweight
    (rows * dy.channels,) float32: what each row gets of all that took it. padding: a row that gets nothing, or -1."""

    dy: Image
    x: Image
    rows: int = field(metadata=SIZE)
    padding: int = -1


def _named(x: np.ndarray, rows: int) -> np.ndarray:
    """(pixels, N) int64 of x (pixels, 1, 1, N)."""
    return np.clip(x[:, 0, 0].astype(np.int64), 0, rows - 1)


def forward_reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """y (C, 1, pixels, N) in float64; weight (rows, C)."""
    return np.moveaxis(weight.astype(np.float64)[_named(x, len(weight))], 2, 0)[:, None]


def backward_reference(problem: EmbeddingBackward, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dweight (rows, C) in float64; dy (C, 1, pixels, N)."""
    named, out = _named(x, problem.rows), np.zeros((problem.rows, len(dy)))
    np.add.at(out, named.ravel(), np.moveaxis(dy[:, 0], 0, 2).reshape(-1, len(dy)).astype(np.float64))
    if problem.padding >= 0:
        out[problem.padding] = 0
    return out


@operator("embedding")
class EmbeddingOperator(Operator):
    """params: weight (rows, C); attrs: rows; padding, only if there is such a row."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y, rows = low.value(node.inputs[0]), low.output(node), node.attrs["rows"]
        if rows > TOLD_APART.get(x.image.dtype, rows):
            raise SpecError(
                f"{node.params['weight']} has {rows} rows, whose numbers {x.image.dtype} does not tell apart; compile "
                'with activations="float32"'
            )
        low.call("embedding.forward", Embedding(x.image, y.image, rows), x, low.parameter(node, "weight"), y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.trains(node, "weight"):
            x, dy = low.value(node.inputs[0]), low.gradient(node)
            problem = EmbeddingBackward(dy.image, x.image, **node.attrs)
            low.call("embedding.backward", problem, dy, x, low.parameter_gradient(node, "weight"))

    def onnx(self, node: Node, writer: Writer) -> str:
        (x,), weight = writer.inputs(node), writer.weight(node.params["weight"])
        batch, channels, _, pixels = node.shape
        numbers = writer.call("Cast", [x], (batch, pixels), "int64", to=7)
        found = writer.call("Gather", [weight, numbers], (batch, pixels, channels), axis=0)
        turned = writer.call("Transpose", [found], (batch, channels, pixels), perm=(0, 2, 1))
        return writer.call("Unsqueeze", [turned, writer.axis(2)], node.shape)


def whole_numbers(graph: ForwardGraph) -> list[tuple[int, int, int, str]]:
    """(first, end, rows, table) of the input's features that name rows of a table."""
    nodes, found = {node.name: node for node in graph.nodes}, []
    for node in graph.nodes:
        if node.op == "embedding":
            source = nodes.get(node.inputs[0])
            first, count = source.attrs["start"][0] if source else 0, node.shape[3]
            found.append((first, first + count, node.attrs["rows"], node.params["weight"]))
    return found


@reads("relax.astype")
def read_astype(reader: Reader, call: Any, arguments: list) -> Any:
    """To whole numbers, of what only an embedding can do something with."""
    kind = str(call.ty.dtype)
    if isinstance(arguments[0], Whole) or "int" not in kind:
        return arguments[0]
    return Whole(reader.activation(arguments[0]))


@reads("mest.embedding", gives=("embedding",))
def read_embedding(reader: Reader, call: Any, arguments: list) -> Any:
    """A weight, numbers (N, L), and a number that says which row is padding, or -1."""
    weight, numbers, padding = arguments[1:]
    value = numbers.value if isinstance(numbers, Whole) else numbers
    if not _is_stored(weight):
        raise reader.error("embedding with a computed weight")
    source = value if isinstance(value, Value) and len(value.shape) == 2 else None
    if source is not None and source.draft >= 0 and reader.drafts[source.draft].op == "slice":
        known = reader.is_input(reader.source(source)) and reader.drafts[source.draft].attrs["step"][0] == 1
    else:
        known = source is not None and source.draft < 0
    if source is None or not known:
        raise reader.error("embedding of other numbers than the input's, (N, L),")
    rows, channels = reader.state_shapes[weight.name]
    batch, length, _ = _shape(call)
    attrs = {"rows": rows} | ({"padding": int(padding.number)} if padding.number >= 0 else {})
    made = reader.add("embedding", (source,), (batch, channels, 1, length), {"weight": weight.name}, attrs)
    dims = whole(made.shape)
    return reader.viewed(made, Arrangement((dims["N"], dims["W"], dims["C"])))
