"""Depthwise convolution: every channel by itself. Three kernels on dense weights, with their float64 references.

A weight is (out, 1, kh, kw); `out` is a multiple of the input's channels, and result channel `c` reads source channel
`c // multiplier`. Values lie as torch has them, so there is no index. Layout: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import ASIDE
from mest_compile.operators.layers.gather import Epilogue, finished


@dataclass(frozen=True, slots=True)
class Window:
    """What a result pixel reads of its channel: tap (ky, kx) of result pixel (h, w) is source pixel (h * stride +
    ky * dilation - padding, and so for w). All (y, x), pixels."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def reached(self, axis: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(tap, result pixel, source pixel that it reads by that tap) of an axis's first `size` result pixels; 0 is
        y."""
        for pixel in range(size):
            for tap in range(self.kernel[axis]):
                yield tap, pixel, pixel * self.stride[axis] + tap * self.dilation[axis] - self.padding[axis]

    def reaching(self, axis: int, size: int) -> Iterator[tuple[int, int, int]]:
        """The same the other way: (tap, source pixel, result pixel that reads it by that tap) of the first `size`
        source pixels."""
        for pixel in range(size):
            for tap in range(self.kernel[axis]):
                distance = pixel + self.padding[axis] - tap * self.dilation[axis]
                if distance % self.stride[axis] == 0:
                    yield tap, pixel, distance // self.stride[axis]


@dataclass(frozen=True, slots=True)
class DepthwiseForward:
    """result[c, q] = (bias[c] | 0) + sum over taps of values[c, tap] * source[c // multiplier, pixel of the tap].

    Kernel "depthwise.forward", arguments in order, all flat:
      values     (result.channels * taps,) float32
      bias       (result.channels,) float32, only if `bias`
      scaling, residual  only with an `epilogue`, as "gather.conv" has them
      source     (source.elems,); its halo, zeros, holds whatever taps reach
      result     (result.elems,); the halo is not touched
      statistics (slices * rows, 2, result.channels, vector) float32, only if `statistics` (then batch is a multiple of
                 vector): per slice, row and lane the sum and the sum of squares of the row's results
    """

    source: Image
    result: Image
    window: Window
    bias: bool = False
    statistics: bool = False
    epilogue: Epilogue | None = field(default=None, metadata=ASIDE)

    @property
    def multiplier(self) -> int:
        return self.result.channels // self.source.channels


@dataclass(frozen=True, slots=True)
class DepthwiseGradInput:
    """result[c, p] = (result[c, p] if accumulate | 0) + sum over the channels m and taps that read (c, p) of values[m,
    tap] * delta[m, pixel].

    Kernel "depthwise.grad_input": values (delta.channels * taps,) float32, delta (delta.elems,), whose halo, zeros,
    holds whatever is read beside it, result (result.elems,), whose halo is not touched.
    """

    delta: Image
    result: Image
    window: Window
    accumulate: bool = False

    @property
    def multiplier(self) -> int:
        return self.delta.channels // self.result.channels


@dataclass(frozen=True, slots=True)
class DepthwiseGradWeight:
    """gradients[c, tap] = sum over pixels and examples of delta[c, q] * source[c // multiplier, pixel of the tap].

    Kernel "depthwise.grad_weight": gradients (delta.channels * taps,) float32, source (source.elems,), delta
    (delta.elems,), whose lanes beyond batch are 0.
    """

    source: Image
    delta: Image
    window: Window

    @property
    def multiplier(self) -> int:
        return self.delta.channels // self.source.channels


def _read(window: Window, source: np.ndarray, image: Image, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """(tap, what all result pixels read by it (slices, channels, *size, vector)) in float64."""
    array = image.view(source.astype(np.float64))
    for tap in range(window.taps):
        first = [
            halo + at * dilation - pad
            for halo, at, dilation, pad in zip(
                image.halo, divmod(tap, window.kernel[1]), window.dilation, window.padding, strict=False
            )
        ]
        rows, columns = (
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(first, size, window.stride, strict=True)
        )
        yield tap, array[:, :, rows, columns]


def depthwise_forward_reference(
    problem: DepthwiseForward,
    values: np.ndarray,
    source: np.ndarray,
    result: np.ndarray,
    bias: np.ndarray | None = None,
    scaling: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """The result array in float64, shape `problem.result.shape`; `result` before it, whose halo stays."""
    image, weights = problem.result, values.astype(np.float64).reshape(-1, problem.window.taps, 1, 1, 1)
    total = np.zeros((image.slices, image.channels, image.height, image.width, image.vector))
    if bias is not None:
        total += bias.astype(np.float64)[:, None, None, None]
    for tap, read in _read(problem.window, source, problem.source, (image.height, image.width)):
        total += weights[:, tap] * np.repeat(read, problem.multiplier, axis=1)
    out = image.view(result.astype(np.float64))
    out[image.interior] = total
    return out if problem.epilogue is None else finished(problem.epilogue, image, out, scaling, residual)


def depthwise_grad_input_reference(
    problem: DepthwiseGradInput, values: np.ndarray, delta: np.ndarray, result: np.ndarray
) -> np.ndarray:
    """The result array in float64, shape `problem.result.shape`; `result` before it, whose halo stays."""
    image, window, (top, left) = problem.result, problem.window, problem.delta.halo[:2]
    given = problem.delta.view(delta.astype(np.float64))
    weights = values.astype(np.float64).reshape(-1, window.taps, 1)
    out = image.view(result.astype(np.float64))
    total = out[image.interior]
    if not problem.accumulate:
        total[...] = 0
    for ky, y, row in window.reaching(0, image.height):
        for kx, x, column in window.reaching(1, image.width):
            read = weights[:, ky * window.kernel[1] + kx] * given[:, :, top + row, left + column]
            total[:, :, y, x] += read.reshape(image.slices, image.channels, -1, image.vector).sum(2)
    return out


def depthwise_grad_weight_reference(problem: DepthwiseGradWeight, source: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Gradients (channels, taps) in float64."""
    image = problem.delta
    inner = image.view(delta.astype(np.float64))[image.interior]
    out = np.zeros((image.channels, problem.window.taps))
    for tap, read in _read(problem.window, source, problem.source, (image.height, image.width)):
        out[:, tap] = (inner * np.repeat(read, problem.multiplier, axis=1)).sum((0, 2, 3, 4))
    return out
