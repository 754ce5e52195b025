"""Pooling over windows and over the whole image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _padding, _pair, _shape, reads
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows of `kernel` (y, x) pixels, `stride` apart, over x with `padding` around it; sizes of y as torch rounds
    them (down).

    Kernels "max_pool2d.forward", "avg_pool2d.forward": x (x.elems,), y (y.elems,). Here and below x, y may be the
    images of the values or of their gradients.
    """

    x: Image
    y: Image
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        wanted = tuple(
            (size + 2 * pad - window) // step + 1
            for size, pad, window, step in zip(
                (self.x.height, self.x.width), self.padding, self.kernel, self.stride, strict=True
            )
        )
        if wanted != (self.y.height, self.y.width) or min(wanted) < 1:
            raise SpecError(
                f"pooling {self.x.height}x{self.x.width} pixels with kernel {self.kernel}, stride {self.stride}, "
                "padding "
                f"{self.padding} gives {wanted[0]}x{wanted[1]}, not {self.y.height}x{self.y.width}"
            )
        if any(2 * pad > window for pad, window in zip(self.padding, self.kernel, strict=True)):
            raise SpecError(f"pooling's padding {self.padding} is more than half its kernel {self.kernel}")


@dataclass(frozen=True, slots=True)
class MaxPoolBackward:
    """Kernel "max_pool2d.backward": dy (dy.elems,), x (forward.x.elems,), dx (dx.elems,).

    The gradient of a window goes to its first largest value in reading order, where there are NaN to the last of them,
    as torch has it.
    accumulate  dx +=
    """

    forward: Pool
    dy: Image
    dx: Image
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class AvgPoolBackward:
    """Kernel "avg_pool2d.backward": dy (dy.elems,), dx (dx.elems,). accumulate: dx +="""

    forward: Pool
    dy: Image
    dx: Image
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class GlobalPool:
    """Kernels "global_avg_pool.forward": x (x.elems,), y (y.elems,) of 1x1 pixels; "global_avg_pool.backward": dy like
    y, dx like x.

    accumulate  backward only: dx +=
    """

    x: Image
    y: Image
    accumulate: bool = False


def _windows(problem: Pool) -> Iterator[tuple[int, int, slice, slice]]:
    """(y, x, rows, columns) of every window, clipped to the image."""
    for y in range(problem.y.height):
        for x in range(problem.y.width):
            top, left = y * problem.stride[0] - problem.padding[0], x * problem.stride[1] - problem.padding[1]
            yield (
                y,
                x,
                slice(max(top, 0), min(top + problem.kernel[0], problem.x.height)),
                slice(max(left, 0), min(left + problem.kernel[1], problem.x.width)),
            )


def _divisor(problem: Pool, rows: slice, columns: slice) -> int:
    if problem.count_include_pad:
        return problem.kernel[0] * problem.kernel[1]
    return (rows.stop - rows.start) * (columns.stop - columns.start)


def max_forward_reference(problem: Pool, x: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    out = np.empty((len(x), problem.y.height, problem.y.width, x.shape[-1]))
    for row, column, rows, columns in _windows(problem):
        out[:, row, column] = x[:, rows, columns].max((1, 2))
    return out


def max_backward_reference(problem: Pool, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx (C, H, W, N) in float64."""
    out = np.zeros(x.shape)
    channels, examples = np.indices((len(x), x.shape[-1]))
    for row, column, rows, columns in _windows(problem):
        width = columns.stop - columns.start
        taps = x[:, rows, columns].reshape(len(x), -1, x.shape[-1])
        lost = np.isnan(taps)
        first = np.where(lost.any(1), taps.shape[1] - 1 - lost[:, ::-1].argmax(1), taps.argmax(1))
        out[channels, rows.start + first // width, columns.start + first % width, examples] += dy[:, row, column]
    return out


def avg_forward_reference(problem: Pool, x: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    out = np.empty((len(x), problem.y.height, problem.y.width, x.shape[-1]))
    for row, column, rows, columns in _windows(problem):
        out[:, row, column] = x[:, rows, columns].astype(np.float64).sum((1, 2)) / _divisor(problem, rows, columns)
    return out


def avg_backward_reference(problem: Pool, dy: np.ndarray) -> np.ndarray:
    """dx (C, H, W, N) in float64."""
    out = np.zeros((len(dy), problem.x.height, problem.x.width, dy.shape[-1]))
    for row, column, rows, columns in _windows(problem):
        out[:, rows, columns] += dy[:, row, column].astype(np.float64)[:, None, None] / _divisor(problem, rows, columns)
    return out


def global_forward_reference(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64).mean((1, 2), keepdims=True)


def global_backward_reference(problem: GlobalPool, dy: np.ndarray) -> np.ndarray:
    shape = len(dy), problem.x.height, problem.x.width, dy.shape[-1]
    return np.broadcast_to(dy.astype(np.float64) / (shape[1] * shape[2]), shape)


def _pool(node: Node, x: Image, y: Image) -> Pool:
    attrs = node.attrs
    return Pool(x, y, attrs["kernel"], attrs["stride"], attrs["padding"], attrs.get("count_include_pad", True))


def _windows_in_onnx(node: Node) -> dict[str, Any]:
    padding = node.attrs["padding"]
    return {"kernel_shape": node.attrs["kernel"], "strides": node.attrs["stride"], "pads": [*padding, *padding]}


@operator("max_pool2d")
class MaxPool(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("max_pool2d.forward", _pool(node, x.image, y.image), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy, x = low.gradient(node), low.value(node.inputs[0])
            dx, accumulate = low.contribute(node.inputs[0])
            low.call(
                "max_pool2d.backward",
                MaxPoolBackward(_pool(node, x.image, dy.image), dy.image, dx.image, accumulate),
                dy,
                x,
                dx,
            )

    def onnx(self, node: Node, writer: Writer) -> str:
        return writer.call("MaxPool", writer.inputs(node), node.shape, **_windows_in_onnx(node))


@operator("avg_pool2d")
class AvgPool(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("avg_pool2d.forward", _pool(node, x.image, y.image), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            low.call(
                "avg_pool2d.backward",
                AvgPoolBackward(_pool(node, dx.image, dy.image), dy.image, dx.image, accumulate),
                dy,
                dx,
            )

    def onnx(self, node: Node, writer: Writer) -> str:
        attrs = _windows_in_onnx(node) | {"count_include_pad": int(node.attrs.get("count_include_pad", True))}
        return writer.call("AveragePool", writer.inputs(node), node.shape, **attrs)


@operator("global_avg_pool")
class GlobalAvgPool(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("global_avg_pool.forward", GlobalPool(x.image, y.image), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            low.call("global_avg_pool.backward", GlobalPool(dx.image, dy.image, accumulate), dy, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        pooled = writer.call("GlobalAveragePool", writer.inputs(node), (*node.shape[:2], 1, 1))
        return pooled if len(node.shape) == 4 else writer.call("Flatten", [pooled], node.shape)


@reads("relax.nn.max_pool2d", "relax.nn.avg_pool2d", gives=("max_pool2d", "avg_pool2d"))
def read_pool(reader: Reader, call: Any, arguments: list) -> Any:
    attrs, op = call.attrs, call.op.name.removeprefix("relax.nn.")
    image, shape = reader.activation(arguments[0]), _shape(call)
    kernel, stride = _pair(attrs.pool_size), _pair(attrs.strides)
    if _pair(attrs.dilation) != (1, 1):
        raise reader.error(f"dilated {op} (dilation={_pair(attrs.dilation)})")
    padding = _padding(reader, attrs)
    whole = tuple(
        (size + 2 * pad - width) // step + 1
        for size, pad, width, step in zip(image.shape[2:], padding, kernel, stride, strict=True)
    )
    if shape[2:] != whole:
        raise reader.error(f"{op} with ceil_mode=True, whose last window leaves the image,")
    pool: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
    if op == "avg_pool2d":
        pool["count_include_pad"] = bool(attrs.count_include_pad)
    return reader.add(op, (image,), shape, attrs=pool)


@reads("relax.nn.adaptive_avg_pool2d", gives=("global average pooling",))
def read_adaptive_avg_pool2d(reader: Reader, call: Any, arguments: list) -> Any:
    image, shape = reader.activation(arguments[0]), _shape(call)
    if shape[2:] == (1, 1):
        return reader.add("global_avg_pool", (image,), shape)
    if any(size % out for size, out in zip(image.shape[2:], shape[2:], strict=True)):
        raise reader.error(f"adaptive_avg_pool2d from {image.shape[2:]} to {shape[2:]}, whose windows differ in size,")
    window = _pair(size // out for size, out in zip(image.shape[2:], shape[2:], strict=True))
    return reader.add(
        "avg_pool2d",
        (image,),
        shape,
        attrs={"kernel": window, "stride": window, "padding": (0, 0), "count_include_pad": True},
    )
