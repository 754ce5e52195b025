"""Copies of a layer's values in the order in which another kernel of it reads them, made right before it does.

All layers that train have one array for them, as large as the largest needs it: between two steps nothing reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TURNED = ":transposed"  # name of that array


@dataclass(frozen=True, slots=True)
class TurnUnits:
    """Kernel "values.turn": values (n,), n = units * source_block * row_block, permutation (units,) int32, turned (m,).

    turned[permutation[u], j, k] = values[u, k, j] for k < source_block, j < row_block; what is behind them stays. units
    and m, which is n or more, are symbolic.
    """

    source_block: int
    row_block: int


@dataclass(frozen=True, slots=True)
class CopyValues:
    """Kernel "values.copy": values (n,), places (m,) int32, copies (m or more,). copies[i] = values[places[i]]; what is
    behind them stays. All sizes are symbolic."""


def turned_reference(problem: TurnUnits, values: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """(n,): the first of what `turned` holds."""
    units = values.reshape(-1, problem.source_block, problem.row_block)
    out = np.empty((len(units), problem.row_block, problem.source_block), values.dtype)
    out[permutation] = units.transpose(0, 2, 1)
    return out.ravel()
