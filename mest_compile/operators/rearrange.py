"""Images of other sizes with the same numbers: flattened, shuffled, with pixels for channels; and how models say so.

Reshaping and permuting are bookkeeping (`ir/arrangement.py`). A copy is made where an operator wants its input
otherwise than it lies: a linear layer one pixel, a convolution behind a pixel shuffle channels that were pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _is_stored, _shape, reads
from mest_compile.frontend.values import Fixed, Parameter, Picked, Scores, Spread
from mest_compile.ir.arrangement import Axis, Part, inverse, whole
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Halo, Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Rearrange:
    """Kernel "rearrange.forward": x (x.elems,), y (y.elems,): y's channels, rows and columns are those parts of x's
    dimensions. The gradient takes the `inverse` way.

    accumulate  y += instead
    """

    x: Image
    y: Image
    channels: Axis
    rows: Axis
    columns: Axis
    accumulate: bool = False

    @property
    def parts(self) -> dict[str, Axis]:
        """By y's dimension."""
        return {"C": self.channels, "H": self.rows, "W": self.columns}


def reference(problem: Rearrange, x: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) of x (C, H, W, N)."""
    y = problem.y
    numbers = dict(zip("CHW", np.ogrid[: y.channels, : y.height, : y.width], strict=True))
    places: dict[str, Any] = dict.fromkeys("CHW", 0)
    for dim, axis in problem.parts.items():
        apart = 1
        for part in reversed(axis):
            places[part.dim] = places[part.dim] + numbers[dim] // apart % part.size * part.stride
            apart *= part.size
    return x[places["C"], places["H"], places["W"]]


class Arranging(Operator):
    def parts(self, node: Node, source: Image) -> dict[str, Axis]:
        """What the dimensions of the node's value are made of, by dimension."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def source_halo(self, node: Node, low: Trace) -> Halo:
        """What its consumers read, where its value is its input's."""
        return low.value_halo(node.name)

    def forward(self, node: Node, low: Trace) -> None:
        x = low.value(node.inputs[0])
        parts = self.parts(node, x.image)
        if _as_it_is(x.image, parts):
            low.alias(node, node.inputs[0])
            return
        y = low.output(node)
        low.call("rearrange.forward", _problem(x.image, y.image, parts), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        image = low.value(node.inputs[0]).image
        parts = self.parts(node, image)
        if low.needs_gradient(node.inputs[0]) and not _as_it_is(image, parts):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            low.call("rearrange.forward", _problem(dy.image, dx.image, inverse(parts), accumulate), dy, dx)


def _problem(x: Image, y: Image, parts: Mapping[str, Axis], accumulate: bool = False) -> Rearrange:
    return Rearrange(x, y, parts["C"], parts["H"], parts["W"], accumulate)


def _dims(image: Image) -> dict[str, Axis]:
    return whole((1, image.channels, image.height, image.width))


def _as_it_is(image: Image, parts: Mapping[str, Axis]) -> bool:
    return {**parts, "N": ()} == _dims(image)


@operator("flatten")
class Flatten(Arranging):
    """(N, C, H, W) as (N, C * H * W), in torch's order."""

    def parts(self, node: Node, source: Image) -> dict[str, Axis]:
        dims = _dims(source)
        return {"C": dims["C"] + dims["H"] + dims["W"], "H": (), "W": ()}

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("Flatten", writer.inputs(node), node.shape)


@operator("unflatten")
class Unflatten(Arranging):
    """(N, C) as (N, C, 1, 1), which lie in memory alike."""

    def parts(self, node: Node, source: Image) -> dict[str, Axis]:
        return {dim: axis for dim, axis in _dims(source).items() if dim != "N"}

    def onnx(self, node: Node, writer: Writer) -> str:
        shape = writer.constant(np.array((0, -1, 1, 1)), "one pixel")
        return writer.call("Reshape", [*writer.inputs(node), shape], node.shape)


@operator("rearrange")
class Rearranged(Arranging):
    """attrs: channels, rows, columns: the parts of the input's dimensions that its own are made of."""

    def source_halo(self, node: Node, low: Trace) -> Halo:
        return (0, 0, 0, 0)

    def parts(self, node: Node, source: Image) -> dict[str, Axis]:
        names = ("C", "channels"), ("H", "rows"), ("W", "columns")
        return {dim: tuple(Part(*part) for part in node.attrs[name]) for dim, name in names}

    def onnx(self, node: Node, writer: Writer) -> str:
        """Cut into the parts, permuted, put together."""
        after = [Part(*part) for name in ("channels", "rows", "columns") for part in node.attrs[name]]
        before = sorted(after, key=lambda part: ("CHW".index(part.dim), -part.stride))
        sizes = [part.size for part in before]
        apart = writer.constant(np.array((-1, *sizes)), "parts")
        value = writer.call("Reshape", [*writer.inputs(node), apart], (node.shape[0], *sizes))
        order = [before.index(part) for part in after]
        turned = (node.shape[0], *(sizes[place] for place in order))
        value = writer.call("Transpose", [value], turned, perm=[0, *(place + 1 for place in order)])
        joined = writer.constant(np.array((-1, *node.shape[1:])), "sizes")
        return writer.call("Reshape", [value, joined], node.shape)


@reads(
    "relax.reshape",
    "relax.squeeze",
    "relax.flatten",
    "relax.nn.batch_flatten",
    "relax.expand_dims",
    gives=("reshape", "flatten", "squeeze", "unsqueeze"),
    scores=True,
)
def read_reshape(reader: Reader, call: Any, arguments: list) -> Any:
    value, shape = arguments[0], _shape(call)
    if isinstance(value, Parameter):
        held = reader.state_shapes[value.name]
        if value.form == "transposed":
            return _repeated(reader, value, shape)
        channel = len(held) == 1 and shape == (1, held[0], 1, 1)
        return Parameter(value.name, "channel") if channel else Parameter(value.name, "shaped", shape)
    if isinstance(value, Fixed) and value.array is not None:
        return Fixed(array=value.array.reshape(shape))
    if isinstance(value, Picked):
        return value.seen_as(lambda array: array.reshape(shape))
    if isinstance(value, Scores) and (arrangement := value.arrangement.reshaped(shape)) is not None:
        return replace(value, arrangement=arrangement)
    return reader.reshaped(reader.seen(value), shape)


def picked(reader: Reader, held: Parameter | Picked) -> Picked:
    """A parameter in the order in which it is stored. Raises UnsupportedOperator."""
    if isinstance(held, Picked):
        return held
    if held.form in ("transposed", "laid"):
        raise reader.error(f"{reader.called} of {held.name}")
    sizes = reader.shape_of(held)
    return Picked(held.name, np.arange(prod(sizes)).reshape(sizes))


def _repeated(reader: Reader, weight: Parameter, shape: tuple[int, ...]) -> Parameter:
    """A weight that is repeated for every example, as torch writes its product with a value that is not contiguous: it
    is as good as once."""
    if shape[-2:] != reader.shape_of(weight):
        raise reader.error(f"{reader.called} of {weight.name}")
    return weight


@reads("relax.broadcast_to", scores=True)
def read_broadcast_to(reader: Reader, call: Any, arguments: list) -> Any:
    """What spreads operands does it itself; before a product of matrices torch writes it of the size that is there."""
    value, shape = arguments[0], _shape(call)
    if isinstance(value, Parameter) and value.form == "transposed":
        return _repeated(reader, value, shape)
    if isinstance(value, Picked):
        return value.seen_as(lambda array: np.broadcast_to(array, shape))
    if isinstance(value, Parameter | Fixed) or (isinstance(value, Scores) and value.shape == shape):
        return value
    value = reader.seen(value)
    return value if value.shape == shape else Spread(value, shape)


@reads("relax.permute_dims", gives=("permute",), scores=True)
def read_permute_dims(reader: Reader, call: Any, arguments: list) -> Any:
    value, shape = arguments[0], _shape(call)
    if _is_stored(value) and len(reader.state_shapes[value.name]) == 2:
        return Parameter(value.name, "transposed")
    axes = call.attrs.axes
    order = range(len(shape))[::-1] if axes is None else [int(axis) % len(shape) for axis in axes]
    if isinstance(value, Fixed) and value.array is not None:
        return Fixed(array=value.array.transpose(order))
    if isinstance(value, Parameter | Picked):
        return picked(reader, value).seen_as(lambda array: array.transpose(order))
    if isinstance(value, Scores):
        return replace(value, arrangement=value.arrangement.permuted(order))
    value = reader.seen(value)
    return reader.viewed(reader.bare(value), reader.arrangement(value).permuted(order))
