"""Masks to index arrays and back: where each live unit's weights stand in the value array, forward and transposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mest_compile.operators.gather import GatherConv, Pass
from mest_compile.spec import Image, LayerSpec


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """Index arrays of one layer under one mask.

    order   (cells,) int64: flat position in the grid of each live cell, in the order of the value array
    arrays  part of the layer's held index buffer -> int32 array. In the gather family: pointers, offsets of the forward pass and the
            weight gradient; where there is an input gradient transposed_pointers, transposed_offsets, and permutation (cells,), the
            place of each cell in the transposed order
    """

    order: np.ndarray
    arrays: Mapping[str, np.ndarray]


def parity_passes(layer: LayerSpec) -> tuple[Pass, ...]:
    """The input gradient of a strided convolution, cut by the input pixel's remainder: in each pass every tap is a plain shift."""
    height, width = layer.input_shape[2:]
    passes = [Pass((-(-(height - y) // layer.stride[0]), -(-(width - x) // layer.stride[1])), (y, x), layer.stride)
              for y in range(min(layer.stride[0], height)) for x in range(min(layer.stride[1], width))]
    return tuple(passes)


def shift(start: int, stride: int, padding: int, taps: int) -> tuple[np.ndarray, np.ndarray]:
    """(does tap k reach inputs `start`, `start + stride`, ...; output minus grid position of tap k) for k in range(taps)."""
    distance = start + padding - np.arange(taps)
    return distance % stride == 0, distance // stride


def reaching_passes(layer: LayerSpec) -> tuple[Pass, ...]:
    """`parity_passes` with an empty grid for those that no tap reaches: what is added there is 0."""
    def reached(grid_pass: Pass) -> bool:
        return all(shift(grid_pass.start[axis], layer.stride[axis], layer.padding[axis], layer.weight_shape[2 + axis])[0].any()
                   for axis in (0, 1))

    return tuple(grid_pass if reached(grid_pass) else replace(grid_pass, grid=(0, 0)) for grid_pass in parity_passes(layer))


def source_halo(layer: LayerSpec) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) zero pixels around the input that the forward pass reads."""
    last = [(out - 1) * step + taps - pad - size for out, step, taps, pad, size in
            zip(layer.output_size, layer.stride, layer.weight_shape[2:], layer.padding, layer.input_shape[2:])]
    return layer.padding[0], layer.padding[1], max(0, last[0]), max(0, last[1])


def gradient_halo(layer: LayerSpec) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) zero pixels around the output gradient that the input gradient reads."""
    halo = [0, 0, 0, 0]
    for grid_pass in parity_passes(layer):
        for axis in (0, 1):
            reached, by = shift(grid_pass.start[axis], layer.stride[axis], layer.padding[axis], layer.weight_shape[2 + axis])
            if reached.any():
                last = grid_pass.grid[axis] - 1 + by[reached].max()
                halo[axis] = max(halo[axis], int(-by[reached].min()))
                halo[axis + 2] = max(halo[axis + 2], int(last - layer.output_size[axis] + 1))
    return tuple(halo)  # type: ignore[return-value]


def forward_index(layer: LayerSpec, keep: np.ndarray, problem: GatherConv) -> LayerIndex:
    """Index of the forward pass. keep (groups, sources, kh, kw) bool; problem.source's halo holds at least the padding."""
    order = np.flatnonzero(keep)
    group, source, y, x = np.unravel_index(order, keep.shape)
    cell, offsets = forward_places(layer, problem, group, source * problem.source_block, y, x)
    sort = by_place(cell, offsets)
    return LayerIndex(order[sort], {"pointers": pointers_of(cell, problem.cells), "offsets": offsets[sort].astype(np.int32)})


def with_transposed(index: LayerIndex, layer: LayerSpec, keep: np.ndarray, problem: GatherConv) -> LayerIndex:
    """`index` with the input gradient's arrays; problem.source is the output gradient, problem.passes are `parity_passes(layer)`."""
    channel, row, y, x = np.unravel_index(index.order, keep.shape)  # roles swap: output channels are the source now
    cell, offsets = transposed_places(layer, problem, row, channel * problem.source_block, y, x)
    sort = by_place(cell, offsets)
    permutation = np.empty(len(sort), np.int32)
    permutation[sort] = np.arange(len(sort), dtype=np.int32)
    return LayerIndex(index.order, {**index.arrays, "transposed_pointers": pointers_of(cell, problem.cells),
                                    "transposed_offsets": offsets[sort].astype(np.int32), "permutation": permutation})


def forward_places(layer: LayerSpec, problem: GatherConv, group: np.ndarray, first: np.ndarray, y: np.ndarray,
                   x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cell, offset) of units of row group `group` whose first source channel is `first`, at cell (y, x) of the kernel."""
    image = problem.source
    offsets = (first * image.channel_elems + (y - layer.padding[0] + image.halo[0]) * image.row_elems
               + (x - layer.padding[1] + image.halo[1]) * image.vector)
    return first // problem.section_channels * problem.groups + group, offsets


def transposed_places(layer: LayerSpec, problem: GatherConv, group: np.ndarray, first: np.ndarray, y: np.ndarray,
                      x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same in the input gradient; units whose tap only ever sees padding come behind the last cell."""
    image = problem.source
    number = np.full(len(group), len(problem.passes))
    shift_y, shift_x = np.zeros_like(number), np.zeros_like(number)
    for i, grid_pass in enumerate(problem.passes):
        reached_y, by_y = shift(grid_pass.start[0], layer.stride[0], layer.padding[0], layer.weight_shape[2])
        reached_x, by_x = shift(grid_pass.start[1], layer.stride[1], layer.padding[1], layer.weight_shape[3])
        here = reached_y[y] & reached_x[x]
        number[here], shift_y[here], shift_x[here] = i, by_y[y[here]], by_x[x[here]]
    offsets = first * image.channel_elems + (shift_y + image.halo[0]) * image.row_elems + (shift_x + image.halo[1]) * image.vector
    cell = np.minimum((number * problem.sections + first // problem.section_channels) * problem.groups + group, problem.cells)
    offsets[cell == problem.cells] = 0
    return cell, offsets


def by_place(cell: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The order of units by cell, then by offset. One sort of one key: half the time of `np.lexsort`."""
    if not len(offsets):
        return np.zeros(0, np.int64)
    lowest = int(offsets.min())
    return np.argsort(cell * (int(offsets.max()) - lowest + 1) + (offsets - lowest))


def pointers_of(cell: np.ndarray, cells: int) -> np.ndarray:
    """(cells + 1,) int32 running count of units per cell."""
    return np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=cells)[:cells])]).astype(np.int32)


def gather_units(dense: np.ndarray, order: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Weights (out, in, kh, kw) of the units in `order` as the value array (units, source_block, row_block), float32."""
    rows, sources = dense.shape[0] // grid[0], dense.shape[1] // grid[1]
    cut = dense.reshape(grid[0], rows, grid[1], sources, *grid[2:]).transpose(0, 2, 4, 5, 3, 1)
    return np.ascontiguousarray(cut.reshape(-1, sources, rows)[order], np.float32)


def scatter_units(values: np.ndarray, order: np.ndarray, grid: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The inverse: a dense array of `shape`, 0 at dead units."""
    rows, sources = shape[0] // grid[0], shape[1] // grid[1]
    cut = np.zeros((int(np.prod(grid)), sources, rows), values.dtype)
    cut[order] = values.reshape(-1, sources, rows)
    return np.ascontiguousarray(cut.reshape(*grid, sources, rows).transpose(0, 5, 1, 4, 2, 3).reshape(shape))


def old_places(old_order: np.ndarray, new_order: np.ndarray, grid_units: int) -> np.ndarray:
    """Where each unit of the new order stands in the old one; one place behind its end for those that are not in it."""
    place = np.full(grid_units, len(old_order))
    place[old_order] = np.arange(len(old_order))
    return place[new_order]


def carry_over(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`array` (old units, elems) in the new order that `old_places` told of: units in both keep their entries, new ones start at 0."""
    return np.concatenate([array, np.zeros((1, array.shape[1]), array.dtype)])[places]


def image_of(layer: LayerSpec, halo: tuple[int, int, int, int], vector: int, output: bool) -> Image:
    """The layer's input or output as it lies in memory."""
    batch, channels, height, width = layer.input_shape
    if output:
        channels, (height, width) = layer.weight_shape[0], layer.output_size
    return Image(channels, height, width, batch, halo, vector)
