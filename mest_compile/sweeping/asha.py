"""Early stopping by successive halving that waits for nobody (ASHA): the best of those that have come as far go on.

Source: Li et al., arXiv:1810.05934, algorithm 2. Cells pause at a rung and go on bit for bit, so that one that looks
bad at first may still be taken up, and the order of the cells decides little. Ours: a rung that nobody can reach any
more sends at least its best on, so that of any number of cells one reaches the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import UsageError


@dataclass(frozen=True, slots=True)
class AshaRule:
    """first   epochs that every cell is trained for; of a recorded sweep of 24 cells 2 found the winner from ten of ten
           seeds, 1 from two or three (tests/sweeping/test_asha.py)
    factor  of those that have reached a rung, one in so many goes on to the next, which is as many times as far
    seed    of the order in which cells begin
    Raises UsageError.
    """

    first: int = 2
    factor: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in ("first", 1), ("factor", 2), ("seed", 0):
            object.__setattr__(self, name, checks.whole(name, getattr(self, name), low))

    def rungs(self, epochs: int) -> list[int]:
        """Epochs at which cells are compared; the last is the run's end. Raises UsageError where there is nothing to
        spare."""
        if self.first >= epochs:
            raise UsageError(f"asha's first is {self.first} of {epochs} epochs: nothing would be stopped; lower it")
        found = [self.first]
        while found[-1] * self.factor < epochs:
            found.append(found[-1] * self.factor)
        return [*found, epochs]

    def order(self, cells: int) -> list[int]:
        """The order in which cells begin: drawn, for neighbours in a grid are alike."""
        return np.random.default_rng(self.seed).permutation(cells).tolist()

    def next(
        self, order: Sequence[int], rungs: Sequence[int], scores: Sequence[Mapping[int, float]], busy: Collection[int]
    ) -> tuple[int, int] | None:
        """(cell, the rung's epochs that it is to be trained to); None: there is nothing to begin before one of `busy`
        has come to its rung, and with nobody busy nothing any more.

        order   all cells, as they begin
        scores  of each cell {rung: score}, higher is better, -inf of one that diverged or failed, which never goes on
        """
        choices, closed, coming = [], True, set(order)
        for below, here, onward in zip([None, *rungs], rungs, rungs[1:]):
            there = [cell for cell in order if here in scores[cell]]
            on_the_way = any(below is None or below in scores[cell] for cell in busy if here not in scores[cell])
            closed = closed and not on_the_way and coming <= set(there)
            ranked = sorted((cell for cell in there if scores[cell][here] > -inf), key=lambda cell: -scores[cell][here])
            most = len(there) // self.factor
            best = ranked[: max(1, most) if closed else most]
            coming = set(best)
            choices += [(cell, onward) for cell in best if onward not in scores[cell] and cell not in busy][:1]
        if choices:
            return choices[-1]
        return next(((cell, rungs[0]) for cell in order if rungs[0] not in scores[cell] and cell not in busy), None)
