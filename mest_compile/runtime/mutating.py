"""What a change of masks did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of one layer: its live cells that stay, told by their places in the list of them, new ones, and what these start at; None: 0.
Change = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, slots=True)
class MutationReport:
    """What a mutation did, and what it took of the thread that trains.

    layers           {weight name: "unchanged" | "re-indexed" | "recompiled"}
    seconds          of the whole mutation
    reindex_seconds  of these, once all units were chosen: for the index arrays and what moves with them, weights, momentum and gradients
    uploaded_bytes   what went to another device, 0 where there is none
    """

    layers: dict[str, str]
    seconds: float
    reindex_seconds: float
    uploaded_bytes: int = 0
