"""A part of an activation: a range of its channels, rows and columns, each, every second, every third, ..."""

from __future__ import annotations

from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _shape, reads
from mest_compile.frontend.values import Value
from mest_compile.ir.graph import Node
from mest_compile.operators.concat import extents
from mest_compile.operators.conversion import Grid, ImagePart
from mest_compile.operators.operator import Operator, Trace, operator


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


def part(reader: Reader, image: Value, start: list[int], step: list[int], shape: tuple[int, ...]) -> Value:
    """That part of an activation; start, step: of every axis, the batch first. A part of a part is one."""
    if shape == image.shape:
        return image
    if len(shape) not in (2, 4) or shape[0] != image.shape[0]:
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
    image, shape = reader.activation(arguments[0]), _shape(call)
    axes, begins, steps = ([int(one.number) for one in arguments[place]] for place in (1, 2, 4))
    start, step = [0] * len(image.shape), [1] * len(image.shape)
    for axis, begin, by in zip(axes, begins, steps, strict=True):
        size = image.shape[axis]
        start[axis], step[axis] = min(begin + size if begin < 0 else begin, size), by
    if min(step) < 1:
        raise reader.error(f"slice with step {min(step)}")
    return part(reader, image, start, step, shape)


@reads("relax.split", gives=("split", "chunk"))
def read_split(reader: Reader, call: Any, arguments: list) -> Any:
    image = reader.activation(arguments[0])
    axis, first, parts = int(call.attrs.axis) % len(image.shape), 0, []
    for kind in call.ty.fields:
        shape = tuple(int(size) for size in kind.shape)
        start = [0] * len(shape)
        start[axis] = first
        parts.append(part(reader, image, start, [1] * len(shape), shape))
        first += shape[axis]
    return tuple(parts)
