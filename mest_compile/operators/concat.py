"""Activations one behind another: channels, rows or columns of the result are those of its inputs in turn."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _shape, reads
from mest_compile.frontend.values import Parameter, Value, View
from mest_compile.ir.arrangement import Arrangement, as_image, whole
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.combine import standing
from mest_compile.operators.conversion import Grid, ImagePart
from mest_compile.operators.operator import Operator, Trace, operator


def extents(image: Image) -> tuple[int, int, int]:
    return image.channels, image.height, image.width


def image_axes(rank: int) -> tuple[int, ...]:
    """Axes of the image that a tensor (N, F), (N, C, L) or (N, C, H, W) lies in as it is, for each of its own."""
    return {2: (0, 1), 3: (0, 1, 3), 4: (0, 1, 2, 3)}[rank]


@operator("concat")
class Concat(Operator):
    """attrs: axis, 1 for channels, 2 for rows, 3 for columns; sizes, the inputs' along it. A copy an input."""

    def forward(self, node: Node, low: Trace) -> None:
        values = [low.value(name) for name in node.inputs]
        y = low.output(node)
        for x, grid in zip(values, _grids(node), strict=True):
            low.call("image.part", ImagePart(x.image, y.image, extents(x.image), put=grid), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        dy = low.gradient(node)
        for name, grid in zip(node.inputs, _grids(node), strict=True):
            if low.needs_gradient(name):
                dx, accumulate = low.contribute(name)
                problem = ImagePart(dy.image, dx.image, extents(dx.image), grid, accumulate=accumulate)
                low.call("image.part", problem, dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("Concat", writer.inputs(node), node.shape, axis=node.attrs["axis"])


def _grids(node: Node) -> Iterator[Grid]:
    """Where each input lies in the result."""
    first = 0
    for size in node.attrs["sizes"]:
        start = [0, 0, 0]
        start[node.attrs["axis"] - 1] = first
        yield Grid((start[0], start[1], start[2]))
        first += size


def _where_they_lie(reader: Reader, values: list[Any], axis: int) -> View | None:
    """Views with the same axes, that along which they are joined being a dimension of the images that they lie in; None
    where they are something else."""
    if not all(isinstance(one, View) and isinstance(one.bare, Value) for one in values):
        return None
    first, along = values[0].arrangement, values[0].arrangement.axes[axis]
    dim = along[0].dim if len(along) == 1 else "N"
    for one in values:
        others = [mine for place, mine in enumerate(one.arrangement.axes) if place != axis]
        if dim == "N" or one.arrangement.axes[axis] != whole(one.bare.shape)[dim]:
            return None
        if others != [mine for place, mine in enumerate(first.axes) if place != axis]:
            return None
    place = "NCHW".index(dim)
    sizes = tuple(one.bare.shape[place] for one in values)
    shape = (*values[0].bare.shape[:place], sum(sizes), *values[0].bare.shape[place + 1 :])
    made = reader.add("concat", tuple(one.bare for one in values), shape, attrs={"axis": place, "sizes": sizes})
    axes = list(first.axes)
    axes[axis] = whole(shape)[dim]
    return View(made, Arrangement(tuple(axes)))


def _before_examples(reader: Reader, values: list[Any], shape: tuple[int, ...]) -> Any:
    """Along the first axis, behind which one of examples comes, as of the last states of several recurrent layers:
    joined as each example's features."""
    flat, place = [], 0
    for value in map(reader.seen, values):
        axes, examples = reader.arrangement(value).axes, whole(reader.bare(value).shape)["N"]
        place = next((place for place, axis in enumerate(axes) if place and axis == examples), 0)
        if not place:
            raise reader.error(f"concat of values of shape {value.shape} along axis 0")
        order = (place, *(other for other in range(len(shape)) if other != place))
        turned = reader.viewed(reader.bare(value), reader.arrangement(value).permuted(order))
        flat.append(reader.activation(reader.reshaped(turned, (shape[place], prod(value.shape) // shape[place]))))
    sizes = tuple(one.shape[1] for one in flat)
    made = reader.add("concat", tuple(flat), (shape[place], sum(sizes)), attrs={"axis": 1, "sizes": sizes})
    sizes = (shape[place], *(size for other, size in enumerate(shape) if other != place))
    result = reader.reshaped(made, sizes)
    back = (*range(1, place + 1), 0, *range(place + 1, len(shape)))
    return reader.viewed(reader.bare(result), reader.arrangement(result).permuted(back))


@reads("relax.concat", gives=("concat",))
def read_concat(reader: Reader, call: Any, arguments: list) -> Any:
    values, shape = list(arguments[0]), _shape(call)
    axis = (0 if call.attrs.axis is None else int(call.attrs.axis)) % len(shape)
    if len(values) == 1:
        return values[0]
    if axis and (found := _where_they_lie(reader, values, axis)) is not None:
        return found
    if axis == 0:
        return _before_examples(reader, values, shape)
    images = [
        standing(reader, value, shape) if isinstance(value, Parameter) else reader.image(value) for value in values
    ]
    axis = image_axes(len(shape))[axis]
    sizes = tuple(image.shape[axis] for image in images)
    made = reader.add("concat", tuple(images), as_image(shape), attrs={"axis": axis, "sizes": sizes})
    return reader.viewed(made, Arrangement.plain(shape))
