"""Images of another size, by their nearest pixels or by lines between neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _shape, reads
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Operator, Trace, operator

# (what is added to a result's pixel before it is scaled, and after) for where it lies in the source.
COORDINATES = {
    "asymmetric": (0.0, 0.0),
    "align_corners": (0.0, 0.0),
    "half_pixel": (0.5, -0.5),
    "pytorch_half_pixel": (0.5, -0.5),
}
# What is added for floor to give the nearest pixel; halves go to the pixel before by `round_prefer_floor`.
ROUNDING = {"floor": 0.0, "round_prefer_ceil": 0.5, "round_prefer_floor": 0.5 - 2.0**-12}


@dataclass(frozen=True, slots=True)
class Resize:
    """Kernel "resize.forward": x (x.elems,), y (y.elems,); "resize.backward": dy like y, dx like x.

    linear       between the two nearest pixels of each axis; else the nearest one
    coordinates  as ONNX calls them, a key of COORDINATES
    rounding     of the nearest one, a key of ROUNDING
    scale        (y, x): pixels of x from one pixel of y to the next, float32, as torch and ONNX compute with them
    accumulate   backward only: dx +=
    """

    x: Image
    y: Image
    linear: bool
    coordinates: str
    rounding: str
    scale: tuple[float, float]
    accumulate: bool = False

    def sizes(self, axis: int) -> tuple[int, int]:
        """(of x, of y), pixels; 0 is y."""
        return ((self.x.height, self.y.height), (self.x.width, self.y.width))[axis]

    def place(self, axis: int) -> tuple[float, float, float]:
        """(before, scale, after): where pixel i lies is (i + before) * scale + after; nearest is that, rounded down."""
        before, after = COORDINATES[self.coordinates]
        if self.coordinates == "pytorch_half_pixel" and self.sizes(axis)[1] == 1:
            return 0.0, 0.0, 0.0
        return before, self.scale[axis], after + (0.0 if self.linear else ROUNDING[self.rounding])

    def taps(self, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first, second pixel of x, share of the second) of every pixel of y; computed in float32 as kernels do."""
        size, count = self.sizes(axis)
        before, scale, after = map(np.float32, self.place(axis))
        lies = (np.arange(count, dtype=np.float32) + before) * scale + after
        if not self.linear:
            nearest = np.clip(np.floor(lies), 0, size - 1).astype(int)
            return nearest, nearest, np.zeros(count, np.float32)
        lies = np.maximum(lies, np.float32(0))
        first = np.minimum(np.floor(lies), size - 1).astype(int)
        return first, np.minimum(first + 1, size - 1), np.minimum(lies - first.astype(np.float32), np.float32(1))


def forward_reference(problem: Resize, x: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    (top, bottom, down), (left, right, across) = (problem.taps(axis) for axis in (0, 1))
    down, across = down.astype(np.float64)[:, None, None], across.astype(np.float64)[:, None]
    rows = [x[:, taken].astype(np.float64) for taken in ((top, bottom) if problem.linear else (top,))]
    made = [
        row[:, :, left] * (1 - across) + row[:, :, right] * across if problem.linear else row[:, :, left]
        for row in rows
    ]
    return made[0] * (1 - down) + made[1] * down if problem.linear else made[0]


def backward_reference(problem: Resize, dy: np.ndarray) -> np.ndarray:
    """dx (C, H, W, N) in float64."""
    (top, bottom, down), (left, right, across) = (problem.taps(axis) for axis in (0, 1))
    down, across = down.astype(np.float64)[:, None, None], across.astype(np.float64)[:, None]
    out: Any = np.zeros((len(dy), problem.x.height, problem.x.width, dy.shape[-1]))
    for rows, tall in ((top, 1 - down), (bottom, down)) if problem.linear else ((top, 1.0),):
        for columns, wide in ((left, 1 - across), (right, across)) if problem.linear else ((left, 1.0),):
            index: Any = slice(None), rows[:, None], columns
            np.add.at(out, index, dy.astype(np.float64) * tall * wide)
    return out


@operator("resize")
class ResizeOperator(Operator):
    """attrs: linear, coordinates, rounding and scale of `Resize`."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("resize.forward", Resize(x.image, y.image, **node.attrs), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            problem = Resize(dx.image, dy.image, **node.attrs, accumulate=accumulate)
            low.call("resize.backward", problem, dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        (value,) = writer.inputs(node)
        mode, coordinates = "linear" if node.attrs["linear"] else "nearest", node.attrs["coordinates"]
        named = {"mode": mode, "coordinate_transformation_mode": coordinates, "nearest_mode": node.attrs["rounding"]}
        if coordinates == "align_corners" or node.attrs["scale"] == _ratio(writer.shape(value)[2:], node.shape[2:]):
            batch = writer.call("Shape", [value], (1,), "int64", start=0, end=1)
            writer.sizes[batch] = (1,), "int64"
            sizes = writer.call(
                "Concat", [batch, writer.constant(np.array(node.shape[1:]), "sizes")], (4,), "int64", axis=0
            )
            writer.sizes[sizes] = (4,), "int64"
            return writer.call("Resize", [value, "", "", sizes], node.shape, **named)
        scales = np.array((1, 1, *(1 / scale for scale in node.attrs["scale"])), np.float32)
        return writer.call("Resize", [value, "", writer.constant(scales, "scales")], node.shape, **named)


def _ratio(sizes: tuple[int, ...], made: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(float(np.float32(size) / np.float32(count)) for size, count in zip(sizes, made, strict=True))


@reads("relax.image.resize2d", gives=("upsample (nearest, bilinear)",))
def read_resize2d(reader: Reader, call: Any, arguments: list) -> Any:
    """As the importers' own conversions have it: `roi` ends with the scale, where the sizes do not tell it."""
    image, shape, attrs = reader.activation(arguments[0]), _shape(call), call.attrs
    method, coordinates = str(attrs.method), str(attrs.coordinate_transformation_mode)
    rounding, linear = str(attrs.rounding_method), method == "linear"
    if len(shape) != 4 or shape[:2] != image.shape[:2]:
        raise reader.error(f"resize from {image.shape} to {shape}")
    if method not in ("linear", "nearest_neighbor"):
        raise reader.error(f"resize with method {method}")
    if coordinates not in COORDINATES or rounding not in ROUNDING:
        raise reader.error(f"resize with coordinates {coordinates}, rounded by {rounding},")
    pairs = list(zip(image.shape[2:], shape[2:], strict=True))
    if coordinates == "align_corners":
        scale = [float(np.float32(size - 1) / np.float32(count - 1)) if count > 1 else 0.0 for size, count in pairs]
    else:
        given = [float(value) for value in attrs.roi][2:]
        scale = [told or ratio for told, ratio in zip(given, _ratio(image.shape[2:], shape[2:]), strict=True)]
    how = {"linear": linear, "coordinates": coordinates, "rounding": "floor" if linear else rounding}
    return reader.add("resize", (image,), shape, attrs=how | {"scale": (scale[0], scale[1])})
