"""Pooling over windows and over the whole image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError, UnsupportedOperator
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _pair, _shape, padding_attrs, reads
from mest_compile.ir.arrangement import Arrangement, image_shape
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.operator import Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows of `kernel` (y, x) pixels, `stride` apart, over x with `padding` above and left of it and `padding_end`
    below and right (None: as much); sizes of y are rounded down or, with windows that leave the image, up.

    Without a kernel the windows are those of torch's adaptive pools: window i of n goes from floor(i * size / n) up to
    ceil((i + 1) * size / n).
    count_include_pad  whether the mean of a window counts padding; what is beyond that never counts
    Kernels "max_pool2d.forward", "avg_pool2d.forward": x (x.elems,), y (y.elems,). Here and below x, y may be the
    images of the values or of their gradients.
    """

    x: Image
    y: Image
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    count_include_pad: bool = True
    padding_end: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kernel is None:
            return
        spare = tuple(
            size + start + end - window
            for size, start, end, window in zip(self.sizes, self.padding, self.end, self.kernel, strict=True)
        )
        wanted = tuple(room // step + 1 for room, step in zip(spare, self.stride, strict=True))
        upwards = tuple(
            n - ((n - 1) * step >= size + start)  # the last window begins in the image, or above or left of it
            for n, step, size, start in (
                (-(-room // step) + 1, step, size, start)
                for room, step, size, start in zip(spare, self.stride, self.sizes, self.padding, strict=True)
            )
        )
        made = self.y.height, self.y.width
        if min(made) < 1 or any(got not in pair for got, *pair in zip(made, wanted, upwards, strict=True)):
            padding = self.padding if self.end == self.padding else f"{self.padding} and {self.end}"
            raise SpecError(
                f"pooling {self.x.height}x{self.x.width} pixels with kernel {self.kernel}, stride {self.stride}, "
                f"padding {padding} gives {wanted[0]}x{wanted[1]}, not {made[0]}x{made[1]}"
            )
        if any(2 * pad > window for pad, window in zip((*self.padding, *self.end), self.kernel * 2, strict=True)):
            raise SpecError(f"pooling's padding {self.padding} is more than half its kernel {self.kernel}")

    @property
    def sizes(self) -> tuple[int, int]:
        """Of x, pixels (y, x)."""
        return self.x.height, self.x.width

    @property
    def counts(self) -> tuple[int, int]:
        """Of windows (y, x)."""
        return self.y.height, self.y.width

    @property
    def end(self) -> tuple[int, int]:
        """Padding below and right."""
        return self.padding if self.padding_end is None else self.padding_end

    def fits(self, axis: int) -> bool:
        """Whether every window is as large as the kernel and within the image."""
        return self.kernel is not None and self.padding[axis] == 0 and self.overhang(axis) <= 0

    def overhang(self, axis: int) -> int:
        """Pixels from the image's end to that of the last window; below 0 when it ends before."""
        assert self.kernel, "adaptive windows end with the image"
        last = (self.counts[axis] - 1) * self.stride[axis] - self.padding[axis]
        return last + self.kernel[axis] - self.sizes[axis]

    def window(self, axis: int, number: int) -> tuple[int, int, int]:
        """(first pixel, the one behind the last, how many count in a mean), of the image."""
        size = self.sizes[axis]
        if self.kernel is None:
            first, end = number * size // self.counts[axis], -(-(number + 1) * size // self.counts[axis])
            return first, end, end - first
        start = number * self.stride[axis] - self.padding[axis]
        first, end = max(start, 0), min(start + self.kernel[axis], size)
        padded = min(start + self.kernel[axis], size + self.end[axis]) - start
        return first, end, padded if self.count_include_pad else end - first


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


def _windows(problem: Pool) -> Iterator[tuple[int, int, slice, slice, int]]:
    """(y, x, rows, columns, elements that count in a mean) of every window, clipped to the image."""
    for y in range(problem.y.height):
        for x in range(problem.y.width):
            (top, bottom, tall), (left, right, wide) = problem.window(0, y), problem.window(1, x)
            yield y, x, slice(top, bottom), slice(left, right), tall * wide


def max_forward_reference(problem: Pool, x: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    out = np.empty((len(x), problem.y.height, problem.y.width, x.shape[-1]))
    for row, column, rows, columns, _ in _windows(problem):
        out[:, row, column] = x[:, rows, columns].max((1, 2))
    return out


def max_backward_reference(problem: Pool, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx (C, H, W, N) in float64."""
    out = np.zeros(x.shape)
    channels, examples = np.indices((len(x), x.shape[-1]))
    for row, column, rows, columns, _ in _windows(problem):
        width = columns.stop - columns.start
        taps = x[:, rows, columns].reshape(len(x), -1, x.shape[-1])
        lost = np.isnan(taps)
        first = np.where(lost.any(1), taps.shape[1] - 1 - lost[:, ::-1].argmax(1), taps.argmax(1))
        out[channels, rows.start + first // width, columns.start + first % width, examples] += dy[:, row, column]
    return out


def avg_forward_reference(problem: Pool, x: np.ndarray) -> np.ndarray:
    """y (C, H, W, N) in float64."""
    out = np.empty((len(x), problem.y.height, problem.y.width, x.shape[-1]))
    for row, column, rows, columns, count in _windows(problem):
        out[:, row, column] = x[:, rows, columns].astype(np.float64).sum((1, 2)) / count
    return out


def avg_backward_reference(problem: Pool, dy: np.ndarray) -> np.ndarray:
    """dx (C, H, W, N) in float64."""
    out = np.zeros((len(dy), problem.x.height, problem.x.width, dy.shape[-1]))
    for row, column, rows, columns, count in _windows(problem):
        out[:, rows, columns] += dy[:, row, column].astype(np.float64)[:, None, None] / count
    return out


def global_forward_reference(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64).mean((1, 2), keepdims=True)


def global_backward_reference(problem: GlobalPool, dy: np.ndarray) -> np.ndarray:
    shape = len(dy), problem.x.height, problem.x.width, dy.shape[-1]
    return np.broadcast_to(dy.astype(np.float64) / (shape[1] * shape[2]), shape)


def _in_onnx(node: Node, writer: Writer, operator: str, **attrs: Any) -> str:
    """Writes one of ONNX's pools. Windows that leave the image are told by padding, as versions of ONNX differ in what
    `ceil_mode` means; what lies beyond the padding that counts never does."""
    (value,) = writer.inputs(node)
    height, width = writer.shape(value)[2:]
    pool = Pool(Image(1, height, width, 1), Image(1, node.shape[2], node.shape[3], 1), **node.attrs)
    assert pool.kernel
    start, end = list(pool.padding), [max(pool.overhang(axis), pool.end[axis]) for axis in (0, 1)]
    if attrs.get("count_include_pad") and any(over > counted for over, counted in zip(end, pool.end, strict=True)):
        if any((*pool.padding, *pool.end)):
            pads = writer.constant(np.array((0, 0, *pool.padding, 0, 0, *pool.end)), "pads")
            height, width = (sum(sizes) for sizes in zip(pool.sizes, pool.padding, pool.end, strict=True))
            value = writer.call("Pad", [value, pads], (*node.shape[:2], height, width))
        end = [over - counted for over, counted in zip(end, pool.end, strict=True)]
        start, attrs = [0, 0], {"count_include_pad": 0}
    named: dict[str, Any] = {"kernel_shape": pool.kernel, "strides": pool.stride, "pads": [*start, *end]}
    return writer.call(operator, [value], node.shape, **named, **attrs)


def _mean_matrix(size: int, count: int) -> np.ndarray:
    """(size, count) float32: what multiplies rows of `size` pixels into the means of `count` adaptive windows."""
    made, pool = np.zeros((size, count), np.float32), Pool(Image(1, 1, size, 1), Image(1, 1, count, 1))
    for number in range(count):
        first, end, elems = pool.window(1, number)
        made[first:end, number] = 1 / elems
    return made


@operator("max_pool2d")
class MaxPool(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("max_pool2d.forward", Pool(x.image, y.image, **node.attrs), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy, x = low.gradient(node), low.value(node.inputs[0])
            dx, accumulate = low.contribute(node.inputs[0])
            low.call(
                "max_pool2d.backward",
                MaxPoolBackward(Pool(x.image, dy.image, **node.attrs), dy.image, dx.image, accumulate),
                dy,
                x,
                dx,
            )

    def onnx(self, node: Node, writer: Writer) -> str:
        if "kernel" not in node.attrs:
            raise UnsupportedOperator(f"{node.name!r} cannot be written to ONNX, which has no adaptive max pool")
        return _in_onnx(node, writer, "MaxPool")


@operator("avg_pool2d")
class AvgPool(Operator):
    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        low.call("avg_pool2d.forward", Pool(x.image, y.image, **node.attrs), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            dy = low.gradient(node)
            dx, accumulate = low.contribute(node.inputs[0])
            low.call(
                "avg_pool2d.backward",
                AvgPoolBackward(Pool(dx.image, dy.image, **node.attrs), dy.image, dx.image, accumulate),
                dy,
                dx,
            )

    def onnx(self, node: Node, writer: Writer) -> str:
        if "kernel" in node.attrs:
            counted = int(node.attrs.get("count_include_pad", True))
            return _in_onnx(node, writer, "AveragePool", count_include_pad=counted)
        (value,) = writer.inputs(node)
        (height, width), (rows, columns) = writer.shape(value)[2:], node.shape[2:]
        across = writer.constant(_mean_matrix(width, columns), "windows of a row")
        down = writer.constant(np.ascontiguousarray(_mean_matrix(height, rows).T), "windows of a column")
        value = writer.call("MatMul", [value, across], (*node.shape[:2], height, columns))
        return writer.call("MatMul", [down, value], node.shape)


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


@reads(
    "relax.nn.max_pool2d",
    "relax.nn.avg_pool2d",
    "relax.nn.max_pool1d",
    "relax.nn.avg_pool1d",
    gives=("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
)
def read_pool(reader: Reader, call: Any, arguments: list) -> Any:
    attrs, op = call.attrs, call.op.name.removeprefix("relax.nn.").replace("1d", "2d")
    image, shape = reader.image(arguments[0]), image_shape(_shape(call))
    kernel, stride, dilation = _pixels(attrs.pool_size), _pixels(attrs.strides), _pixels(attrs.dilation)
    if dilation != (1, 1):
        raise reader.error(f"dilated {call.op.name.rpartition('.')[2]} (dilation={dilation})")
    pool: dict[str, Any] = {"kernel": kernel, "stride": stride, **padding_attrs(attrs.padding)}
    if op == "avg_pool2d":
        pool["count_include_pad"] = bool(attrs.count_include_pad)
    return reader.viewed(reader.add(op, (image,), shape, attrs=pool), Arrangement.plain(_shape(call)))


def _pixels(sizes: Any) -> tuple[int, int]:
    """(y, x) of one or two sizes."""
    return _pair((1, *sizes) if len(sizes) == 1 else sizes)


@reads("relax.nn.adaptive_avg_pool2d", gives=("global average pooling",))
def read_adaptive_pool2d(reader: Reader, call: Any, arguments: list) -> Any:
    """The maximum comes as this, too: what was called tells."""
    image, shape = reader.activation(arguments[0]), _shape(call)
    op = "max_pool2d" if reader.called == "adaptive_max_pool2d" else "avg_pool2d"
    if shape[2:] == (1, 1) and op == "avg_pool2d":
        return reader.add("global_avg_pool", (image,), shape)
    if any(size % out for size, out in zip(image.shape[2:], shape[2:], strict=True)):
        return reader.add(op, (image,), shape)
    window = _pair(size // out for size, out in zip(image.shape[2:], shape[2:], strict=True))
    return reader.add(op, (image,), shape, attrs={"kernel": window, "stride": window, "padding": (0, 0)})
