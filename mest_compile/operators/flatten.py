"""(C, H, W) to C * H * W channels of one pixel, in torch's order, and features as maps of one pixel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Fixed, Parameter, Reader, Spread, _shape, reads
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Halo, Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Flatten:
    """Kernel "flatten.forward": x (x.elems,), y (y.elems,); "flatten.backward": dy (y.elems,), dx (x.elems,).

    accumulate  backward only: dx +=
    """

    x: Image
    y: Image
    accumulate: bool = False


def forward_reference(x: np.ndarray) -> np.ndarray:
    """(C * H * W, 1, 1, N) of x (C, H, W, N)."""
    return x.reshape(-1, 1, 1, x.shape[-1])


@operator("flatten")
class FlattenOperator(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x = low.value(node.inputs[0])
        if x.image.height == x.image.width == 1:
            low.alias(node, node.inputs[0])
            return
        y = low.output(node)
        low.call("flatten.forward", Flatten(x.image, y.image), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        x = low.value(node.inputs[0])
        if x.image.height == x.image.width == 1 or not low.needs_gradient(node.inputs[0]):
            return
        dy = low.gradient(node)
        dx, accumulate = low.contribute(node.inputs[0])
        low.call("flatten.backward", Flatten(dx.image, dy.image, accumulate), dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("Flatten", writer.inputs(node), node.shape)


@operator("unflatten")
class Unflatten(Operator):
    """(N, C) as (N, C, 1, 1), which lie in memory alike."""

    def source_halo(self, node: Node, low: Trace) -> Halo:
        return low.value_halo(node.name)

    def forward(self, node: Node, low: Trace) -> None:
        low.alias(node, node.inputs[0])

    def backward(self, node: Node, low: Trace) -> None:
        """Nothing: the gradient is its input's."""

    def onnx(self, node: Node, writer: Writer) -> str:
        shape = writer.constant(np.array((0, -1, 1, 1)), "one pixel")
        return writer.call("Reshape", [*writer.inputs(node), shape], node.shape)


@reads("relax.broadcast_to")
def read_broadcast_to(reader: Reader, call: Any, arguments: list) -> Any:
    """What spreads operands does it itself."""
    value, shape = arguments[0], _shape(call)
    if isinstance(value, Parameter | Fixed):
        return value
    value = reader.activation(value)
    return value if value.shape == shape else Spread(value, shape)


@reads(
    "relax.reshape",
    "relax.squeeze",
    "relax.flatten",
    "relax.nn.batch_flatten",
    "relax.expand_dims",
    gives=("flatten",),
)
def read_reshape(reader: Reader, call: Any, arguments: list) -> Any:
    value, shape = arguments[0], _shape(call)
    if isinstance(value, Parameter):
        held = reader.state_shapes[value.name]
        if value.form == "transposed":
            raise reader.error(f"reshape of {value.name}")
        channel = len(held) == 1 and shape == (1, held[0], 1, 1)
        return Parameter(value.name, "channel") if channel else Parameter(value.name, "shaped", shape)
    if isinstance(value, Fixed) and value.array is not None:
        return Fixed(array=value.array.reshape(shape))
    image = reader.activation(value)
    if shape == image.shape:
        return image
    if shape == (image.shape[0], prod(image.shape[1:])):
        return reader.add("flatten", (image,), shape)
    if len(image.shape) == 2 and shape == (*image.shape, 1, 1):
        return reader.add("unflatten", (image,), shape)
    raise reader.error(f"reshape from {image.shape} to {shape}, which is not a flatten,")
