"""Depthwise convolution between two normalisations, each way in one pass: what it takes is normalised where it reads it
and lies in memory only as what the normalisation before took; the gradients of both normalisations are its own.

`before` is the normalisation whose value is the source, `behind` the one that takes the result. Both with the
activations behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.batch_norm import backward_reference, forward_reference
from mest_compile.operators.layers.depthwise import (
    DepthwiseForward,
    DepthwiseGradInput,
    DepthwiseGradWeight,
    Window,
    depthwise_forward_reference,
    depthwise_grad_input_reference,
    depthwise_grad_weight_reference,
)

Reads = Callable[[int, int], Iterator[tuple[int, int, int]]]


@dataclass(frozen=True, slots=True)
class NormedDepthwiseForward:
    """result[c, q] = sum over taps of values[c, tap] * activation(normalised source[c, pixel of the tap]), of pixels
    beside the image 0.

    Kernel "normed_depthwise.forward", arguments in order, all flat:
      values      (channels * taps,) float32
      moments, affine  of the normalisation before, as batch_norm has them
      source      (source.elems,): what that takes
      result      (result.elems,); the halo is not touched
      statistics  only if `statistics`, as "depthwise.forward" has them
    """

    source: Image
    result: Image
    window: Window
    activation: str | None = None
    statistics: bool = False

    @property
    def padded(self) -> Image:
        """A channel as the taps reach it, in the lanes of a slice."""
        return _padded(self.source, self.window.reached, self.result)


@dataclass(frozen=True, slots=True)
class NormedDepthwiseBackward:
    """From the gradient behind both normalisations to that before both, with all there is to be learned between.

    Kernel "normed_depthwise.backward", arguments in order, all flat:
      values      (channels * taps,) float32
      moments, affine  of the normalisation before
      source      (source.elems,): what that takes; it becomes dz where that is no argument
      moments, affine  of the normalisation behind
      z           (z.elems,): what that takes
      dy          (dy.elems,): the gradient of what that gives, behind its activation
      gradients   (channels * taps,) float32: of the values
      sums, sums  (2, channels) float32: of affine, before and behind, as batch_norm has them
      dz          (dz.elems,), only if `dz`: the gradient of the source; its halo is not touched
    """

    source: Image
    z: Image
    dy: Image
    dz: Image | None
    window: Window
    before: str | None = None
    behind: str | None = None

    @property
    def padded(self) -> Image:
        """A channel of what the convolution takes as its taps reach it, in the lanes of a slice."""
        return _padded(self.source, self.window.reached, self.dy)

    @property
    def padded_delta(self) -> Image:
        """A channel of the gradient of what the convolution gives, likewise."""
        return _padded(self.dy, self.window.reaching, self.source)


def _padded(image: Image, reads: Reads, of: Image) -> Image:
    """One channel and slice of `image`, in float32, with the halo that `of`'s pixels read of it."""

    def beyond(axis: int, size: int, pixels: int) -> tuple[int, int]:
        places = [place for _, _, place in reads(axis, pixels)]
        return max(0, -min(places, default=0)), max(0, max(places, default=0) - size + 1)

    (top, bottom), (left, right) = beyond(0, image.height, of.height), beyond(1, image.width, of.width)
    return Image(1, image.height, image.width, image.vector, (top, left, bottom, right), image.vector)


def _convolution(
    problem: NormedDepthwiseForward | NormedDepthwiseBackward,
    moments: np.ndarray,
    affine: np.ndarray,
    source: np.ndarray,
) -> tuple[Image, np.ndarray]:
    """What the convolution takes, and how it lies in its array, in float64. Of all lanes."""
    activation = problem.activation if isinstance(problem, NormedDepthwiseForward) else problem.before
    image = problem.source
    y = forward_reference(image.unpack(source, True), moments, affine[1], affine[0], None, activation)
    taken = replace(problem.padded, channels=image.channels, batch=image.lanes)
    return taken, taken.pack(y)


def normed_depthwise_forward_reference(
    problem: NormedDepthwiseForward,
    values: np.ndarray,
    moments: np.ndarray,
    affine: np.ndarray,
    source: np.ndarray,
    result: np.ndarray,
) -> np.ndarray:
    """The result array in float64, shape `problem.result.shape`; `result` before it, whose halo stays. affine (2,
    channels)."""
    taken, y = _convolution(problem, moments, affine, source)
    return depthwise_forward_reference(DepthwiseForward(taken, problem.result, problem.window), values, y, result)


def normed_depthwise_backward_reference(
    problem: NormedDepthwiseBackward,
    values: np.ndarray,
    moments: np.ndarray,
    affine: np.ndarray,
    source: np.ndarray,
    moments_behind: np.ndarray,
    affine_behind: np.ndarray,
    z: np.ndarray,
    dy: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(gradients (channels, taps), sums before (2, channels), sums behind, dz (C, H, W, N)) in float64."""

    def through(
        dy: np.ndarray, z: np.ndarray, moments: np.ndarray, affine: np.ndarray, activation: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        taken = forward_reference(z, moments, affine[1], affine[0])
        _, sums, dz = backward_reference(dy, z, moments, affine[1], activation, taken)
        return sums, dz

    examples = problem.dy.unpack(dy), problem.z.unpack(z)
    sums_behind, delta = through(*examples, moments_behind, affine_behind, problem.behind)
    taken, y = _convolution(problem, moments, affine, source)
    given = replace(problem.padded_delta, channels=problem.dy.channels, batch=problem.dy.batch)
    packed, window = given.pack(delta), problem.window
    gradients = depthwise_grad_weight_reference(DepthwiseGradWeight(taken, given, window), y, packed)
    plain = replace(problem.source, halo=(0, 0, 0, 0))
    inner = depthwise_grad_input_reference(
        DepthwiseGradInput(given, plain, window), values, packed, np.zeros(plain.shape)
    )
    sums, dz = through(plain.unpack(inner), problem.source.unpack(source), moments, affine, problem.before)
    return gradients, sums, sums_behind, dz
