"""Sum of two activations of one size, where no batch_norm could take it in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _shape, reads
from mest_compile.frontend.values import Fixed, Parameter, Picked, Value
from mest_compile.ir.graph import LAYERS, Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.conversion import ImageCopy
from mest_compile.operators.formulas import operation
from mest_compile.operators.operator import Operator, Trace, operator
from mest_compile.operators.rearrange import picked
from mest_compile.operators.table import plus_picked


@dataclass(frozen=True, slots=True)
class AddForward:
    """Kernel "add.forward": a (a.elems,), b (b.elems,), y (y.elems,)."""

    a: Image
    b: Image
    y: Image


def forward_reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) + b


@operator("add")
class Add(Operator):
    """Its gradient goes to both inputs as it is."""

    def forward(self, node: Node, low: Trace) -> None:
        a, b = (low.value(name) for name in node.inputs)
        y = low.output(node)
        low.call("add.forward", AddForward(a.image, b.image, y.image), a, b, y)

    def backward(self, node: Node, low: Trace) -> None:
        dy = low.gradient(node)
        names = [name for name in node.inputs if low.needs_gradient(name)]
        # The last one may adopt dy, because later contributions may then be added to dy in place.
        for name in names:
            if name is names[-1] and low.adopt(name, dy):
                continue
            result, accumulate = low.contribute(name)
            low.call("image.copy", ImageCopy(dy.image, result.image, accumulate), dy, result)

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("Add", writer.inputs(node), node.shape)


def _biased(reader: Reader, held: Parameter | Picked, constant: Fixed) -> Picked:
    """Numbers of a parameter and a constant: what an attention adds to its scores."""
    table, array = picked(reader, held), np.array(constant.number) if constant.array is None else constant.array
    shape = np.broadcast_shapes(table.shape, array.shape)
    before = 0 if table.added is None else table.added
    return Picked(table.name, np.broadcast_to(table.places, shape), np.broadcast_to(before + array, shape))


@reads("relax.add", gives=("add",), pointwise=True)
def read_add(reader: Reader, call: Any, arguments: list) -> Any:
    left, right = arguments
    if any(isinstance(one, Parameter | Picked) for one in arguments) and any(
        isinstance(one, Fixed) for one in arguments
    ):
        return _biased(reader, *sorted(arguments, key=lambda one: isinstance(one, Fixed)))
    if isinstance(left, Value) and isinstance(right, Value) and left.shape == right.shape:
        return reader.add("add", (left, right), left.shape)
    if isinstance(left, Picked) or isinstance(right, Picked):
        value, held = (right, left) if isinstance(left, Picked) else (left, right)
        return plus_picked(reader, reader.activation(value), held)
    value, bias = (right, left) if isinstance(left, Parameter) else (left, right)
    if isinstance(value, Value) and isinstance(bias, Parameter) and value.draft >= 0:
        layer, held = reader.drafts[value.draft], reader.shape_of(bias)
        # As broadcasting lines it up: a channel's number for images, a feature's otherwise.
        wanted = (1, value.shape[1], *[1] * (len(value.shape) - 2))
        fits = held == wanted[len(wanted) - len(held) :] and prod(held) == value.shape[1]
        if layer.op in LAYERS and fits and "bias" not in layer.params:
            # A second draft of the same layer: should its result without the bias be used as well, the shared weight is
            # noticed.
            reader.drafts.append(replace(layer, params={**layer.params, "bias": bias.name}))
            return Value(len(reader.drafts) - 1, value.shape)
    return operation(reader, "add", left, right, _shape(call))
