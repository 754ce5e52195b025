"""A part of an activation: a range of its channels, rows and columns, each, every second, every third, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _shape, reads
from mest_compile.frontend.values import Fixed, Parameter, Picked, Value, View
from mest_compile.ir.arrangement import Arrangement, as_image, merged, size_of, whole
from mest_compile.ir.graph import Node
from mest_compile.operators.concat import extents, image_axes
from mest_compile.operators.conversion import Grid, ImagePart
from mest_compile.operators.operator import Operator, Trace, operator
from mest_compile.operators.rearrange import picked


@operator("slice")
class Slice(Operator):
    """attrs: start, step, (channels, rows, columns) each."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("image.part", ImagePart(x.image, y.image, extents(y.image), Grid(**node.attrs)), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            fill = None if accumulate else 0.0
            problem = ImagePart(
                dy.image, dx.image, extents(dy.image), put=Grid(**node.attrs), accumulate=accumulate, fill=fill
            )
            low.call("image.part", problem, dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        axes = range(1, len(node.shape))
        start, step = (np.array(node.attrs[name][: len(axes)]) for name in ("start", "step"))
        end = start + (np.array(node.shape[1:]) - 1) * step + 1
        named = {"starts": start, "ends": end, "axes": np.array(axes), "steps": step}
        inputs = [writer.constant(array, name) for name, array in named.items()]
        return writer.call("Slice", [*writer.inputs(node), *inputs], node.shape)


def part(reader: Reader, image: Value, start: Sequence[int], step: Sequence[int], shape: tuple[int, ...]) -> Value:
    """That part of an activation; start, step: of every axis, the batch first. A part of a part is one."""
    if shape == image.shape:
        return image
    if shape[0] != image.shape[0]:
        raise reader.error(f"slice from {image.shape} to {shape}")
    more = [1] * (4 - len(shape))
    first, apart = [*start[1:], *(0 for _ in more)], [*step[1:], *more]
    draft = reader.drafts[image.draft] if image.draft >= 0 else None
    if draft and draft.op == "slice":
        before = draft.attrs
        first = [begin + by * at for begin, by, at in zip(before["start"], before["step"], first, strict=True)]
        apart = [by * at for by, at in zip(before["step"], apart, strict=True)]
        image = reader.source(image)
    return reader.add("slice", (image,), shape, attrs={"start": tuple(first), "step": tuple(apart)})


@reads("relax.strided_slice", gives=("slice",))
def read_strided_slice(reader: Reader, call: Any, arguments: list) -> Any:
    held, shape = arguments[0], _shape(call)
    if isinstance(held, Parameter | Picked) or (isinstance(held, Fixed) and held.array is not None):
        axes, begins, ends, steps = ([int(one.number) for one in arguments[place]] for place in (1, 2, 3, 4))
        ranges = {axis: slice(*cut) for axis, *cut in zip(axes, begins, ends, steps, strict=True)}
        cut = tuple(ranges.get(axis, slice(None)) for axis in range(len(shape)))
        if isinstance(held, Fixed):
            return Fixed(array=None if held.array is None else held.array[cut])
        return picked(reader, held).seen_as(lambda array: array[cut])
    value = reader.seen(held)
    axes, begins, steps = ([int(one.number) for one in arguments[place]] for place in (1, 2, 4))
    start, step = [0] * len(value.shape), [1] * len(value.shape)
    for axis, begin, by in zip(axes, begins, steps, strict=True):
        size = value.shape[axis]
        start[axis], step[axis] = min(begin + size if begin < 0 else begin, size), by
    if min(step) < 1:
        raise reader.error(f"slice with step {min(step)}")
    if min(shape) < 1:
        raise reader.error(f"slice to {shape}, which has no elements")
    if isinstance(value, View):
        return _range(reader, value, start, step, shape)
    return part(reader, reader.activation(value), start, step, shape)


def _of_image(reader: Reader, value: View, start: list[int], step: list[int], shape: tuple[int, ...]) -> Any:
    """A part of a view with steps, or along several axes: of an image that it is laid in as it is."""
    image = reader.plainly(value)
    first, apart = [0] * len(image.shape), [1] * len(image.shape)
    for mine, axis in enumerate(image_axes(len(shape))):
        first[axis], apart[axis] = start[mine], step[mine]
    return reader.viewed(part(reader, image, first, apart, as_image(shape)), Arrangement.plain(shape))


def _range(reader: Reader, value: View, start: list[int], step: list[int], shape: tuple[int, ...]) -> Any:
    """A range of one axis of a view: where that is no dimension's slowest part, it is laid so."""
    (axis, *more) = [k for k in range(len(shape)) if shape[k] != value.shape[k]] or [0]
    if more or step[axis] > 1:
        return _of_image(reader, value, start, step, shape)
    if shape == value.shape:
        return value
    arrangement, dims = value.arrangement, whole(value.bare.shape)
    chosen = arrangement.axes[axis]
    if not chosen or chosen[0].dim == "N":
        raise reader.error(f"slice from {value.shape} to {shape}, which is of examples,")
    source = reader.activation(value.bare)
    outer = len(chosen) == 1 and chosen[0].size * chosen[0].stride == size_of(dims[chosen[0].dim])
    if not outer:
        parts = [part for k, one in enumerate(arrangement.axes) if k != axis for part in one]
        pixels = any(part.dim == "C" for part in chosen) is False
        behind = {dim: merged(part for part in parts if part.dim == dim) for dim in "CHW"}
        image = {**behind, "N": dims["N"], "C": chosen + behind["C"]}
        if pixels:
            image = {"N": dims["N"], "C": behind["C"], "H": (), "W": chosen + behind["H"] + behind["W"]}
        source, arrangement = reader.lay(value, image), arrangement.moved(image)
        chosen = arrangement.axes[axis]
    (whole_part,) = chosen
    dim, by = "NCHW".index(whole_part.dim), whole_part.stride
    sizes, first = list(source.shape), [0] * len(source.shape)
    sizes[dim], first[dim] = shape[axis] * by, start[axis] * by
    found = part(reader, source, first, [1] * len(sizes), tuple(sizes))
    axes = list(arrangement.axes)
    axes[axis] = merged([whole_part._replace(size=shape[axis])])
    return reader.viewed(found, Arrangement(tuple(axes)))


@reads("relax.take")
def read_take(reader: Reader, call: Any, arguments: list) -> Any:
    """One place of an axis, which goes: x[:, 0]. Of a parameter any places."""
    value, index = arguments
    if isinstance(value, Parameter | Picked) and isinstance(index, Fixed):
        places = index.array if index.number is None else np.array(index.number)
        axis = None if call.attrs.axis is None else int(call.attrs.axis)
        if places is not None:
            return picked(reader, value).seen_as(lambda array: np.take(array, places.astype(int), axis))
    value = reader.seen(value)
    number = index.number if isinstance(index, Fixed) else None
    if number is None or call.attrs.axis is None:
        raise reader.error("take of places that are no constant")
    axis = int(call.attrs.axis) % len(value.shape)
    place = int(number) + (value.shape[axis] if number < 0 else 0)
    start, shape = [0] * len(value.shape), list(value.shape)
    start[axis], shape[axis] = place, 1
    view = value if isinstance(value, View) else View(value, reader.arrangement(value))
    found = _range(reader, view, start, [1] * len(shape), tuple(shape))
    return reader.reshaped(found, tuple(shape[:axis] + shape[axis + 1 :]))


@reads("relax.split", gives=("split", "chunk"))
def read_split(reader: Reader, call: Any, arguments: list) -> Any:
    value = reader.seen(arguments[0])
    image = value if isinstance(value, View) else reader.activation(value)
    axis, first, parts = int(call.attrs.axis) % len(image.shape), 0, []
    for kind in call.ty.fields:
        shape = tuple(int(size) for size in kind.shape)
        start = [0] * len(shape)
        start[axis] = first
        steps = [1] * len(shape)
        if isinstance(image, View):
            parts.append(_range(reader, image, start, steps, shape))
        else:
            parts.append(part(reader, image, start, steps, shape))
        first += shape[axis]
    return tuple(parts)
