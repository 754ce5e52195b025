"""Sparse convolution as a gather: the forward pass, the input gradient and the weight gradient at live units only.

A *unit* is `source_block` x `row_block` weights: consecutive source channels times consecutive result channels, at one
tap. The index of a unit is one int32: the distance in elements from the start of the source array to the source pixel
that the grid's first pixel reads. Units are sorted by (pass, section of source channels, group of result channels,
offset). A dense layer is one whose units all live; a linear layer is a 1x1 convolution of a 1x1 image. Layout: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import rounded
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.operators.activation import activation_of


@dataclass(frozen=True, slots=True)
class Pass:
    """A regular grid of result pixels that one index serves.

    grid   (rows, columns) of result pixels, 0 or more
    start  (y, x) of the first result pixel, halo not counted
    step   (y, x) distance between result pixels
    """

    grid: tuple[int, int]
    start: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What follows the sums of a convolution in its kernel: activation(scale * sum + shift + residual), with a
    channel's scale and shift.

    activation  name of the one that follows; None: none
    residual    how what is added before it lies in memory; None: nothing is
    """

    activation: str | None = None
    residual: Image | None = None


def _groups(channels: int, row_block: int, rows_live: int) -> int:
    """Groups of rows; of listed rows there may be one more, when the live and the dead ones both end in a group that is
    not full."""
    return -(-channels // row_block) + 1 if rows_live else channels // row_block


@dataclass(frozen=True, slots=True)
class GatherConv:
    """result[r, q] = (bias[r] | result[r, q] if accumulate | 0) + sum over live units of value * source[offset + q *
    source_step].

    Kernel "gather.conv", arguments in order, all flat:
      pointers   (passes * sections * groups + 1,) int32: units of (pass, section, group) are pointers[i] .. pointers[i
                 + 1]
      offsets    (units,) int32, in the first slice
      values     (units * source_block * row_block or more,) float32, [unit, source channel, result channel]
      channels   (groups * row_block,) int32, live_groups (1,) int32, only if `rows_live`: row j of group g is result
                 channel channels[g * row_block + j]; groups from live_groups on are left out, their results are not
                 written
      sources    (source.channels,) int32, only if `sources_live`: the channels that units read; it only says what to
                 prefetch
      bias       (result.channels,) float32, only if `bias`
      scaling    (2, result.channels) float32: shift and scale; residual (residual.elems,) float32 if there is one: only
                 with an `epilogue`
      source     (source.elems,) float32
      result     (result.elems,) float32; the halo is not touched; pixels that no pass covers are not touched
      statistics (slices * grid rows, 2, result.channels, floats) float32, only if `statistics` (then there is one pass,
      no accumulate,
                 and batch is a multiple of vector): per slice, grid row and lane the sum and the sum of squares of the
                 row's results
    taps: a unit reads that many pixels of a row, each by its own value, which stands where the source channel's would;
    1: it reads source_block channels. More than 1 only where source_block is 1.
    rows_live, sources_live: how many are expected to live, 0 where all do and are not listed. A list is filled up with
    live channels: a row listed twice in a group, with equal values, is written twice alike.
    result.abreast: how many grid pixels a vector has. The last one of a row may end in the result's right halo, which
    becomes 0 there, and reads as far of the source's row, at no pixel behind its right halo.
    A source in bfloat16 is multiplied by values that are rounded to that.
    `units` is symbolic: one build serves every mask. result.channels is a multiple of row_block, source.channels of
    source_block. Groups without units, and sections without units, are legal: their results are the start value.
    """

    source: Image
    result: Image
    row_block: int
    source_block: int
    source_step: tuple[int, int]
    passes: tuple[Pass, ...]
    section_channels: int = field(metadata=SIZE)
    accumulate: bool = False
    bias: bool = False
    statistics: bool = False
    taps: int = 1
    rows_live: int = field(default=0, metadata=SIZE)
    sources_live: int = field(default=0, metadata=SIZE)
    epilogue: Epilogue | None = field(default=None, metadata=ASIDE)

    def __post_init__(self) -> None:
        assert not (self.epilogue and (self.statistics or self.accumulate)), (
            "an epilogue ends a value of the forward pass"
        )

    @property
    def groups(self) -> int:
        return _groups(self.result.channels, self.row_block, self.rows_live)

    @property
    def unit(self) -> tuple[int, int]:
        return _unit(self)

    @property
    def sections(self) -> int:
        return -(-self.source.channels // self.section_channels)

    @property
    def cells(self) -> int:
        """(pass, section, group) triples, each with its own run of units."""
        return len(self.passes) * self.sections * self.groups


@dataclass(frozen=True, slots=True)
class GatherGrad:
    """gradient[u, k, j] = sum over pixels q and examples of delta[row, q] * source[offset(u) + k * channel + q * step],
    where row = row_block * group(u) + j.

    Kernel "gather.grad", arguments in order, all flat: pointers (sections * groups + 1,) int32, offsets (units,) int32,
    channels, live_groups and sources where rows or sources are listed, as "gather.conv" has them, then
    source (source.elems,), delta (delta.elems,), gradients (units * source_block * row_block,) [unit, source channel,
    result channel]. Index as in the forward pass of the same layer. `delta` may have a halo (zero); lanes beyond batch
    are 0 in it. delta.abreast: as result.abreast there.
    adds: to what is in `gradients`.
    """

    source: Image
    delta: Image
    row_block: int
    source_block: int
    source_step: tuple[int, int]
    section_channels: int = field(metadata=SIZE)
    taps: int = 1
    rows_live: int = field(default=0, metadata=SIZE)
    sources_live: int = field(default=0, metadata=SIZE)
    adds: bool = field(default=False, metadata=ASIDE)

    @property
    def groups(self) -> int:
        return _groups(self.delta.channels, self.row_block, self.rows_live)

    @property
    def unit(self) -> tuple[int, int]:
        return _unit(self)

    @property
    def sections(self) -> int:
        return -(-self.source.channels // self.section_channels)

    @property
    def cells(self) -> int:
        """(section, group) pairs, each with its own run of units."""
        return self.sections * self.groups


def _unit(problem: GatherConv | GatherGrad) -> tuple[int, int]:
    """(source elements that a unit reads for one result, distance of one from the next): neighbouring channels or
    pixels."""
    if problem.taps > 1:
        return problem.taps, problem.source.vector
    return problem.source_block, problem.source.channel_elems


def _pixels(flat: np.ndarray, image: Image, start: int, grid: tuple[int, int], step: tuple[int, int]) -> np.ndarray:
    """View (slices, grid rows, grid columns, vector) of `flat` from element `start`, a grid pixel `step` pixels from
    the next."""
    unit = flat.itemsize
    strides = (image.slice_elems * unit, step[0] * image.row_elems * unit, image.apart(step[1], 1) * unit, unit)
    return np.lib.stride_tricks.as_strided(flat[start:], (image.slices, *grid, image.vector), strides)


def _units_of(problem: GatherConv | GatherGrad, pointers: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(pass, group, unit) of every unit."""
    for cell in range(len(pointers) - 1):
        for unit in range(pointers[cell], pointers[cell + 1]):
            yield cell // (problem.sections * problem.groups), cell % problem.groups, unit


def gather_conv_reference(
    problem: GatherConv,
    pointers: np.ndarray,
    offsets: np.ndarray,
    values: np.ndarray,
    source: np.ndarray,
    result: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    scaling: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """The result array in float64, shape `problem.result.shape`. `result` holds the start values; its halo stays.
    scaling, residual: what an epilogue takes."""
    out = np.zeros(problem.result.shape) if result is None else problem.result.view(result.astype(np.float64))
    flat, top, left = source.astype(np.float64).ravel(), problem.result.halo[0], problem.result.halo[1]

    def pixels(grid_pass: Pass) -> tuple[slice, slice]:
        first = left + problem.result.column(grid_pass.start[1]) // problem.result.vector
        step = problem.result.apart(grid_pass.step[1], 1) // problem.result.vector
        return (
            slice(
                top + grid_pass.start[0],
                top + grid_pass.start[0] + grid_pass.grid[0] * grid_pass.step[0],
                grid_pass.step[0],
            ),
            slice(first, first + grid_pass.grid[1] * step, step),
        )

    if not problem.accumulate:
        for grid_pass in problem.passes:
            start = np.zeros(problem.result.channels) if bias is None else bias.astype(np.float64)
            out[(slice(None), slice(None), *pixels(grid_pass))] = start[:, None, None, None]
    depth, distance = problem.unit
    if problem.source.dtype == "bfloat16":
        values = rounded(values, "bfloat16")
    values = values.astype(np.float64).reshape(-1, depth, problem.row_block)
    for index, group, unit in _units_of(problem, pointers):
        grid_pass = problem.passes[index]
        for k in range(depth):
            window = _pixels(flat, problem.source, offsets[unit] + k * distance, grid_pass.grid, problem.source_step)
            for j in range(problem.row_block):
                out[(slice(None), group * problem.row_block + j, *pixels(grid_pass))] += values[unit, k, j] * window
    return out if problem.epilogue is None else finished(problem.epilogue, problem.result, out, scaling, residual)


def finished(
    epilogue: Epilogue, image: Image, out: np.ndarray, scaling: np.ndarray | None, residual: np.ndarray | None
) -> np.ndarray:
    """What an epilogue makes of the sums in `out`, an array of `image`; its halo stays."""
    assert scaling is not None
    shift, scale = scaling.astype(np.float64).reshape(2, 1, -1, 1, 1, 1)
    value = out[image.interior] * scale + shift
    if epilogue.residual is not None and residual is not None:
        value = value + epilogue.residual.view(residual.astype(np.float64))[epilogue.residual.interior]
    if epilogue.activation:
        value = activation_of(epilogue.activation).forward_reference(value)
    out[image.interior] = value
    return out


def gather_grad_reference(
    problem: GatherGrad,
    pointers: np.ndarray,
    offsets: np.ndarray,
    source: np.ndarray,
    delta: np.ndarray,
    before: np.ndarray | None = None,
) -> np.ndarray:
    """Gradients (units, values of a unit for one row, row_block) in float64. before: what is in `gradients`, where the
    problem adds."""
    flat = source.astype(np.float64).ravel()
    image = problem.delta
    inner = image.view(delta.astype(np.float64))[image.interior]
    depth, distance = problem.unit
    out = np.zeros((len(offsets), depth, problem.row_block))
    for _, group, unit in _units_of(problem, pointers):
        for k in range(depth):
            window = _pixels(
                flat, problem.source, offsets[unit] + k * distance, (image.height, image.width), problem.source_step
            )
            for j in range(problem.row_block):
                out[unit, k, j] = np.vdot(inner[:, group * problem.row_block + j], window)
    return out + before.astype(np.float64).reshape(out.shape) if problem.adds and before is not None else out
