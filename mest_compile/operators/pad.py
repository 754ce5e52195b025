"""A number around an activation: rows and columns, or channels. Convolutions take in zeros around their input."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _shape, reads
from mest_compile.frontend.values import Value
from mest_compile.ir.arrangement import Arrangement, as_image
from mest_compile.ir.graph import Node
from mest_compile.operators.concat import extents, image_axes
from mest_compile.operators.conversion import Grid, ImagePart
from mest_compile.operators.operator import Operator, Trace, operator
from mest_compile.operators.slice import part


@operator("pad")
class Pad(Operator):
    """attrs: before and after, (channels, rows, columns) each; fill, the number."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        put, fill = Grid(node.attrs["before"]), node.attrs["fill"]
        low.call("image.part", ImagePart(x.image, y.image, extents(x.image), put=put, fill=fill), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            taken = Grid(node.attrs["before"])
            problem = ImagePart(dy.image, dx.image, extents(dx.image), taken, accumulate=accumulate)
            low.call("image.part", problem, dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        axes = len(node.shape) - 1
        pads = [0, *node.attrs["before"][:axes], 0, *node.attrs["after"][:axes]]
        inputs = [writer.constant(np.array(pads), "pads"), writer.number(node.attrs["fill"])]
        return writer.call("Pad", [*writer.inputs(node), *inputs], node.shape)


def without_padding(reader: Reader, image: Value) -> tuple[Value, tuple[int, int, int, int]]:
    """(an activation as it is before zeros were put around its pixels, (top, left, bottom, right) of these)."""
    draft = reader.drafts[image.draft] if image.draft >= 0 else None
    if draft is None or draft.op != "pad" or draft.attrs["fill"]:
        return image, (0, 0, 0, 0)
    (first, top, left), (last, bottom, right) = draft.attrs["before"], draft.attrs["after"]
    return (image, (0, 0, 0, 0)) if first or last else (reader.source(image), (top, left, bottom, right))


@reads("relax.nn.pad", gives=("pad",))
def read_pad(reader: Reader, call: Any, arguments: list) -> Any:
    """What is padded by less than nothing is cut."""
    image, shape, mode = reader.image(arguments[0]), _shape(call), str(call.attrs.pad_mode)
    fill, axes = float(call.attrs.pad_value), image_axes(len(shape))
    if mode != "constant" or not isfinite(fill):
        raise reader.error(f"pad with {mode if mode != 'constant' else fill}")
    widths = [[0] * len(image.shape), [0] * len(image.shape)]
    for place, width in enumerate(call.attrs.pad_width):
        widths[place % 2][axes[place // 2]] = int(width)
    before, after = widths
    if before[0] or after[0]:
        raise reader.error(f"pad from {image.shape} to {shape}")
    kept = tuple(
        size + min(first, 0) + min(last, 0) for size, first, last in zip(image.shape, before, after, strict=True)
    )
    made = part(reader, image, [max(-width, 0) for width in before], [1] * len(kept), kept)
    if as_image(shape) != kept:
        before, after = ([max(width, 0) for width in [*side[1:], *[0] * (4 - len(kept))]] for side in widths)
        attrs = {"before": tuple(before), "after": tuple(after), "fill": fill}
        made = reader.add("pad", (made,), as_image(shape), attrs=attrs)
    return reader.viewed(made, Arrangement.plain(shape))
