"""Value arrays of live cells and the dense weights they stand for."""

from __future__ import annotations

import numpy as np


def cells_of(keep: np.ndarray) -> np.ndarray:
    """Places of the live cells of a grid, int32, ascending."""
    return np.flatnonzero(keep).astype(np.int32)


def cell_type(grid: tuple[int, ...]) -> np.dtype:
    """The smallest type that places of a grid's cells fit into."""
    return np.min_scalar_type(int(np.prod(grid)) - 1)


def merge(cells: np.ndarray, places: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ascending cells and new ones, ascending too, as one list; where each stood): `places` of the old ones, -1 of the
    new ones."""
    keys, count = np.empty(len(cells) + len(new), "<i8"), len(cells)
    place, cell = keys.view("<i4").reshape(-1, 2).T  # the cell is the upper half, which sorts
    cell[:count], place[:count], cell[count:], place[count:] = cells, places, new, -1
    keys.sort(kind="stable")  # of two ascending runs this is a merge
    return cell.copy(), place.astype(np.intp)


def gather_units(dense: np.ndarray, order: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Weights (out, in, kh, kw) of the units in `order` as the value array (units, source_block, row_block),
    float32."""
    rows, sources = dense.shape[0] // grid[0], dense.shape[1] // grid[1]
    cut = dense.reshape(grid[0], rows, grid[1], sources, *grid[2:]).transpose(0, 2, 4, 5, 3, 1)
    return np.ascontiguousarray(cut.reshape(-1, sources, rows)[order], np.float32)


def scatter_units(values: np.ndarray, order: np.ndarray, grid: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The inverse: a dense array of `shape`, 0 at dead units."""
    rows, sources = shape[0] // grid[0], shape[1] // grid[1]
    cut = np.zeros((int(np.prod(grid)), sources, rows), values.dtype)
    cut[order] = values.reshape(-1, sources, rows)
    return np.ascontiguousarray(cut.reshape(*grid, sources, rows).transpose(0, 5, 1, 4, 2, 3).reshape(shape))


def carry_over(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The units of `array` (units, elems) at `places`, in that order; at -1 are new ones, which start at 0."""
    return np.concatenate([array, np.zeros((1, array.shape[1]), array.dtype)]).take(places, axis=0)
