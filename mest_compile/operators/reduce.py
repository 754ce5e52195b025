"""Sums and means of each example over channels, rows or columns; what is summed over keeps its axis, with one element.

Its kernels are those of `combine`: a sum is the gradient of what is spread, and its gradient is spread.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _shape, reads
from mest_compile.frontend.values import Fixed, Value, View
from mest_compile.ir.arrangement import Arrangement, merged, whole
from mest_compile.ir.expressions import Variable
from mest_compile.ir.graph import Node
from mest_compile.ir.wording import as_text
from mest_compile.operators.activation import X
from mest_compile.operators.combine import NAMES, Combine, CombineBackward, Goal, combination
from mest_compile.operators.formulas import combined
from mest_compile.operators.operator import Operator, Trace, operator


@operator("reduce")
class Reduce(Operator):
    """attrs: axes, of (N, C, H, W), that the sum goes over; scale, which it is multiplied by."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        problem = CombineBackward(_scaled(node), x.image, (None,), (Goal(0, y.image),))
        low.call("combine.backward", problem, x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            low.call("combine.forward", Combine(_scaled(node), (dy.image,), dx.image, accumulate), dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        axes = writer.constant(np.array(node.attrs["axes"]), "axes")
        total = writer.call("ReduceSum", [*writer.inputs(node), axes], node.shape, keepdims=1)
        return writer.expression(Variable("x") * node.attrs["scale"], {"x": total}, node.shape)


def _scaled(node: Node) -> str:
    return as_text(Variable(NAMES[0]) * node.attrs["scale"])


@reads("relax.mean", "relax.sum", gives=("mean", "sum"))
def read_reduction(reader: Reader, call: Any, arguments: list) -> Any:
    name, shape = call.op.name.removeprefix("relax."), _shape(call)
    if isinstance(arguments[0], View):
        found, count = _mean(reader, call, arguments[0]), prod(arguments[0].shape) // prod(shape)
        if name == "mean":
            return found
        total = combined(reader, "multiply", reader.bare(found), Fixed(float(count)))
        return reader.viewed(total, reader.arrangement(found))
    image = reader.activation(arguments[0])
    axes = _axes(call, image)
    if name == "mean" and axes == (2, 3) and len(image.shape) == 4:
        return reader.add("global_avg_pool", (image,), shape)
    return reduced(reader, name, image, axes, shape)


def _mean(reader: Reader, call: Any, value: View) -> Any:
    """Over all pixels, once those axes are what pixels are made of."""
    arrangement, dims = value.arrangement, whole(value.bare.shape)
    over, rank = _axes(call, value), len(value.shape)
    summed, left = ([arrangement.axes[k] for k in range(rank) if (k in over) is chosen] for chosen in (True, False))
    pixels, channels = (merged(part for axis in axes for part in axis) for axes in (summed, left))
    if any(part.dim == "N" for part in pixels) or 0 in over:
        raise reader.error(f"mean of {value.shape} over axes {over}, which are not of one example,")
    if not pixels:
        return reader.reshaped(value, _shape(call))
    source = reader.activation(value.bare)
    if sorted(pixels) != sorted(dims["H"] + dims["W"]):
        inside = tuple(part for part in channels if part.dim != "N")
        image = {"N": dims["N"], "C": inside, "H": (), "W": pixels}
        source, arrangement = reader.lay(value, image), arrangement.moved(image)
    dims, kept = whole(source.shape), [k for k in range(rank) if call.attrs.keepdims or k not in over]
    result = Arrangement(tuple(() if k in over else arrangement.axes[k] for k in kept))
    shape = source.shape[:2] if result.axes == (dims["N"], dims["C"]) else (*source.shape[:2], 1, 1)
    return reader.viewed(reader.add("global_avg_pool", (source,), shape), result)


@reads("relax.variance")
def read_variance(reader: Reader, call: Any, arguments: list) -> Any:
    image, shape = reader.activation(arguments[0]), _shape(call)
    axes = _axes(call, image)
    mean = reduced(reader, "mean", image, axes, shape)
    names = [Variable(name) for name in NAMES[:2]]
    away = combination(reader, names[0] - names[1], [image, mean], image.shape)
    square = reader.activation(combined(reader, "square", away, formula=X * X))
    return reduced(reader, "mean", square, axes, shape)


def reduced(reader: Reader, name: str, image: Value, axes: tuple[int, ...], shape: tuple[int, ...]) -> Value:
    """The "sum" or "mean" of an activation. Raises UnsupportedOperator unless that keeps its axes."""
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(image.shape))
    if len(image.shape) != 4 or 0 in axes or shape != kept:
        raise reader.error(
            f"{name} of {image.shape} over axes {axes} to {shape}, which keeps no image with keepdim=True,"
        )
    scale = 1 / prod(image.shape[axis] for axis in axes) if name == "mean" else 1.0
    return reader.add("reduce", (image,), shape, attrs={"axes": axes, "scale": scale})


def _axes(call: Any, image: Value | View) -> tuple[int, ...]:
    rank = len(image.shape)
    return tuple(range(rank) if call.attrs.axis is None else sorted(int(axis) % rank for axis in call.attrs.axis))
