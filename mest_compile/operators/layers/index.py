"""Masks to index arrays and back: where each live unit's weights stand in the value array, forward and transposed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mest_compile.ir.graph import LayerSpec
from mest_compile.operators.layers.gather import GatherConv, GatherGrad
from mest_compile.operators.layers.geometry import shift

PLACE = 32  # bits of a sorted key that say where what it belongs to stood


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """Index arrays of one layer under one mask.

    sort    which of the live cells, listed by place in the grid, stands at each place of the value array
    places  (live cells,), the narrowest unsigned type: where in it each stands, the last of its places where kernels
            hold it twice
    arrays  part of the layer's held index buffer -> int32 array. In the gather family: pointers, offsets of the forward
            pass and the weight gradient; where there is an input gradient transposed_pointers, transposed_offsets, and
            permutation (cells,), the place of each cell in the transposed order
    """

    sort: np.ndarray
    places: np.ndarray
    arrays: Mapping[str, np.ndarray]


class Places:
    """Where each unit of a problem would stand, whatever the mask: its place in the sorted index, and its offset.

    Both are sums of three numbers: one for the unit's group of result channels, one for its block of source channels
    and one for its tap, so that the tables are small and a mask becomes an index by a few additions and one sort.

    group_key (groups,), block_key (blocks,), tap_key (taps,) int64: a unit's rank is their sum >> PLACE; ranks grow
    with (cell, offset) block_offset (blocks,), tap_offset (taps,) int32: a unit's offset is their sum
    starts (cells + 1,): the keys at which cells begin. Units whose tap only ever sees padding rank behind the last
    cell, at offset 0.
    """

    def __init__(self, problem: GatherConv | GatherGrad, taps: list[list[tuple[int, int, int]]], unreached: list[int]):
        """taps: for every pass (tap number, y, x), the tap's shift in source pixels, by shift; unreached: taps that no
        pass has."""
        image, groups = problem.source, problem.groups
        blocks = -(-image.channels // problem.source_block)
        each = -(-problem.section_channels // problem.source_block)  # blocks of a section
        most = max(len(unreached), *(len(reached) for reached in taps))
        cell_ranks, pass_ranks = each * most, problem.sections * groups * each * most
        self.group_key = np.arange(groups) * cell_ranks << PLACE
        section, within = np.divmod(np.arange(blocks), each)
        self.block_key = section * (groups * cell_ranks) + within * most << PLACE
        self.block_offset = (np.arange(blocks) * (problem.source_block * image.channel_elems)).astype(np.int32)
        count = sum(map(len, taps)) + len(unreached)
        self.tap_key, self.tap_offset = np.zeros(count, np.int64), np.zeros(count, np.int32)
        for number, reached in enumerate(taps):
            for turn, (tap, y, x) in enumerate(reached):
                self.tap_key[tap] = number * pass_ranks + turn << PLACE
                self.tap_offset[tap] = image.origin + y * image.row_elems + image.column(x)
        for turn, tap in enumerate(unreached):
            self.tap_key[tap] = len(taps) * pass_ranks + turn << PLACE
        self.starts = np.arange(problem.cells + 1) * cell_ranks << PLACE
        self._all_reached = not unreached

    @classmethod
    def forward(cls, layer: LayerSpec, problem: GatherConv | GatherGrad) -> Places:
        """Of a forward pass; problem.source's halo holds at least the padding."""
        width = layer.weight_shape[3]
        return cls(
            problem,
            [
                [
                    (
                        tap,
                        tap // width * layer.dilation[0] - layer.padding[0],
                        tap % width * layer.dilation[1] - layer.padding[1],
                    )
                    for tap in range(layer.weight_shape[2] * width)
                ]
            ],
            [],
        )

    @classmethod
    def transposed(cls, layer: LayerSpec, problem: GatherConv) -> Places:
        """Of an input gradient: problem.source is the output gradient, problem.passes are `parity_passes(layer)`."""
        width, taps, left = layer.weight_shape[3], [], set(range(layer.weight_shape[2] * layer.weight_shape[3]))
        for grid_pass in problem.passes:
            rows, columns = (shift(layer, axis, grid_pass.start[axis]) for axis in (0, 1))
            reached = [
                (int(rows[1][tap // width]), int(columns[1][tap % width]), tap)
                for tap in sorted(left)
                if rows[0][tap // width] and columns[0][tap % width]
            ]
            taps.append([(tap, y, x) for y, x, tap in sorted(reached)])
            left -= {tap for _, _, tap in reached}
        return cls(problem, taps, sorted(left))

    def sort(self, keys: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order that sorts units of such keys and offsets, pointers, offsets in that order)."""
        # One sort of numbers that carry their own place takes a third of the time of argsort.
        ranked = keys + np.arange(len(keys))
        ranked.sort()
        order = ranked & (1 << PLACE) - 1
        offsets = offsets.take(order)
        pointers = np.searchsorted(ranked, self.starts).astype(np.int32)
        if not self._all_reached:
            offsets[pointers[-1] :] = 0
        return order, pointers, offsets

    def of_swapped(
        self, groups: int = 1
    ) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`sort` for cells told by their row of the grid, which is a block of source channels here, and their place in
        that row. groups: of the layer's channels; a row's cells are of the result channels of its own."""
        width, rows = len(self.group_key) // groups, len(self.block_key) // groups
        row_key = self.block_key + self.group_key.take(np.arange(len(self.block_key)) // rows * width)
        rest_key = (self.group_key[:width, None] + self.tap_key).ravel()
        rest_offset = np.tile(self.tap_offset, width)
        return lambda row, rest: self.sort(
            row_key.take(row) + rest_key.take(rest), self.block_offset.take(row) + rest_offset.take(rest)
        )


class Runs:
    """The forward pass's order of cells, section by section: runs of neighbours in the grid move as a whole, so nothing
    is sorted.

    row_cells  cells of a row of the grid
    offsets    (row_cells,) int32: the offset of a unit that is the cell there, in a row of the first group of channels
    starts     (rows,) int32: what a row's offsets are beyond that; None where there is one group
    """

    def __init__(self, layer: LayerSpec, problem: GatherConv | GatherGrad):
        places = Places.forward(layer, problem)
        width = layer.weight_shape[1] // problem.source_block
        self.offsets = (places.block_offset[:width, None] + places.tap_offset).ravel()
        self.row_cells = len(self.offsets)
        self.starts: np.ndarray | None = None
        if layer.groups > 1:
            rows = problem.groups // layer.groups
            self.starts = places.block_offset.take(np.arange(problem.groups) // rows * width)
        section_cells = -(-problem.section_channels // problem.source_block) * len(places.tap_offset)
        firsts = np.arange(problem.groups)[:, None] * self.row_cells + np.arange(problem.sections) * section_cells
        self._shape, self._bounds = firsts.shape, np.append(firsts, problem.groups * self.row_cells).astype(np.int32)

    def sort(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(order that sorts ascending cells, pointers); cells may be the first ones of units that lie within a run."""
        bounds = np.searchsorted(cells, self._bounds)
        starts, counts = (array.reshape(self._shape).T.ravel() for array in (bounds[:-1], bounds[1:] - bounds[:-1]))
        pointers = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=pointers[1:])
        order = np.repeat(starts - pointers[:-1], counts)
        order += np.arange(len(cells))
        return order, pointers


def divide(cells: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """divmod of int32, which NumPy divides ten times as fast as int64."""
    quotient = cells // size
    return quotient, cells - quotient * size


def inverse(order: np.ndarray) -> np.ndarray:
    """int32: where each of what `order` sorts stands afterwards."""
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    return places


def places_of(sort: np.ndarray, cells: int) -> np.ndarray:
    """`LayerIndex.places` of a `LayerIndex.sort` of so many cells."""
    dtype = np.min_scalar_type(len(sort))
    places = np.empty(cells, dtype)
    places[sort] = np.arange(len(sort), dtype=dtype)  # of a cell that is held twice NumPy keeps the last
    return places


def expand(units: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Places of the cells of units that have len(cells) each, a few: `cells` says which of its own comes when."""
    first, places = units * len(cells), np.empty((len(units), len(cells)), units.dtype)
    for turn, cell in enumerate(cells.tolist()):  # NumPy adds columns several times as fast as so short rows
        np.add(first, cell, out=places[:, turn])
    return places.ravel()
