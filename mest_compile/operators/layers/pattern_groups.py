"""Sparse convolution in units of several taps that have one of a few shapes: units are sorted by shape, so that the
code knows the taps.

A *shape* is where the taps of a unit lie, as distances (rows, columns) from its first one in reading order. One offset
serves them all, and what one tap reads for a pixel, another reads for the pixel below: kernels that know the shape load
it once. Layout: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.layers.gather import GatherConv, GatherGrad, gather_conv_reference, gather_grad_reference

Shape = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class GroupedConv:
    """Kernel "pattern_groups.conv": arguments and result as "gather.conv" has them for `gather`, but every cell of the
    index has a run of units for each shape: pointers (gather.cells * len(shapes) + 1,), offsets (units,) of the first
    tap, values (units * taps or more,).

    gather  of blocks of 1 x 1, stride 1
    shapes  of equally many taps each; the first distance is (0, 0)
    """

    gather: GatherConv
    shapes: tuple[Shape, ...]

    def __post_init__(self) -> None:
        _check(self)

    @property
    def taps(self) -> int:
        return len(self.shapes[0])

    @property
    def runs(self) -> int:
        return self.gather.cells * len(self.shapes)


@dataclass(frozen=True, slots=True)
class GroupedGrad:
    """Kernel "pattern_groups.grad": arguments as "gather.grad" has them for `gather`, with an index as `GroupedConv`
    has it; gradients (units * taps,).
    """

    gather: GatherGrad
    shapes: tuple[Shape, ...]

    def __post_init__(self) -> None:
        _check(self)

    @property
    def taps(self) -> int:
        return len(self.shapes[0])

    @property
    def runs(self) -> int:
        return self.gather.cells * len(self.shapes)


def _check(problem: GroupedConv | GroupedGrad) -> None:
    gather = problem.gather
    assert gather.row_block == gather.source_block == gather.taps == 1 and gather.source_step == (1, 1), (
        "units are single weights' taps"
    )
    assert all(len(shape) == problem.taps and shape[0] == (0, 0) for shape in problem.shapes), (
        "shapes differ in taps, or lack the first"
    )


def shape_of(taps: np.ndarray) -> Shape:
    """The shape of taps (y, x), an array (taps, 2) in reading order."""
    return tuple((int(y), int(x)) for y, x in taps - taps[0])


def single_taps(
    problem: GroupedConv | GroupedGrad, pointers: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(pointers, offsets) of the same weights as units of one tap each."""
    source: Image = problem.gather.source
    places = np.array([[y * source.row_elems + x * source.vector for y, x in shape] for shape in problem.shapes])
    shape = np.repeat(np.arange(problem.runs) % len(problem.shapes), np.diff(pointers))
    return pointers[:: len(problem.shapes)] * problem.taps, (offsets[:, None] + places[shape]).ravel()


def grouped_conv_reference(
    problem: GroupedConv,
    pointers: np.ndarray,
    offsets: np.ndarray,
    values: np.ndarray,
    source: np.ndarray,
    result: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """As gather_conv_reference."""
    return gather_conv_reference(problem.gather, *single_taps(problem, pointers, offsets), values, source, result, bias)


def grouped_grad_reference(
    problem: GroupedGrad, pointers: np.ndarray, offsets: np.ndarray, source: np.ndarray, delta: np.ndarray
) -> np.ndarray:
    """Gradients (units * taps,) in float64."""
    return gather_grad_reference(problem.gather, *single_taps(problem, pointers, offsets), source, delta).ravel()
