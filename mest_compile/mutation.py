"""Elastic Mutation: which units live next. Pure functions on flat masks; randomness is handed in, inputs are left unchanged.

Source: MEST (arXiv:2110.14032). EM prunes below its target and grows back; EM&S grows beyond it and prunes later. Both are one
prune-to / grow-to routine with two sparsities a phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile import checks
from mest_compile.errors import CapacityError, InputError, SparsityError


@dataclass(frozen=True, slots=True)
class Phase:
    """What a mutation does in the epochs before `until_epoch` (counted from 0) that no earlier phase covers.

    prune_to, grow_to  sparsities, 0 <= grow_to <= prune_to < 1
    """

    until_epoch: int
    prune_to: float
    grow_to: float

    def __post_init__(self):
        object.__setattr__(self, "until_epoch", checks.whole("until_epoch", self.until_epoch, 1, error=SparsityError))
        for name in ("prune_to", "grow_to"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name), error=SparsityError))
        if not 0 <= self.grow_to <= self.prune_to < 1:
            raise SparsityError(f"a phase needs 0 <= grow_to <= prune_to < 1, not grow_to {self.grow_to}, prune_to {self.prune_to}")


def importance(weights: np.ndarray, gradients: np.ndarray | None, importance_lambda: float) -> np.ndarray:
    """|w| + importance_lambda * |dL/dw|, same shape as `weights`. `gradients` may be None when importance_lambda is 0."""
    if not importance_lambda:
        return np.abs(weights)
    if gradients is None or gradients.shape != weights.shape:
        raise InputError(f"importance_lambda {importance_lambda} needs gradients of shape {weights.shape}, "
                         f"not {None if gradients is None else gradients.shape}")
    return np.abs(weights) + np.asarray(importance_lambda, weights.dtype) * np.abs(gradients)


def prune(scores: np.ndarray, live: int, units: int) -> np.ndarray:
    """Which live units stay, (alive,) bool: the `live` of highest score; of equal scores the first.

    scores  (alive,) float, of the live units
    units   live and dead
    Raises SparsityError when fewer than `live` units are alive, InputError when a score is NaN.
    """
    if not 0 <= live <= scores.size:
        raise SparsityError(f"cannot prune to {live} live units: {scores.size} of {units} are alive")
    _check_scores(scores)
    return _best(scores[None], live)[0]


def grow(alive: np.ndarray, units: int, live: int, rng: np.random.Generator, scores: np.ndarray | None = None) -> np.ndarray:
    """Dead units that join the live ones until there are `live`, ascending: drawn evenly, or those of highest score.

    A unit that was pruned is as likely to be drawn again as any other dead one. It counts as new: its weights start at 0.
    alive   the live units, ascending; units: live and dead
    scores  (units,) float; of equal scores the lower unit grows. None: the generator chooses
    Raises CapacityError when there are fewer than `live` units, SparsityError when more than `live` are alive already.
    """
    count = live - alive.size
    if live > units:
        raise CapacityError(f"cannot grow to {live} live units: there are {units}")
    if count < 0:
        raise SparsityError(f"cannot grow to {live} live units: {alive.size} of {units} are alive already; prune first")
    if scores is not None:
        dead = np.delete(np.arange(units), alive)
        return np.sort(dead[np.argsort(-scores[dead], kind="stable")[:count]])
    # Listing the dead would cost more than all the rest: the one with n dead before it stands behind the live ones with n or fewer.
    drawn = np.sort(rng.choice(units - alive.size, size=count, replace=False))
    return drawn + np.searchsorted(alive - np.arange(alive.size), drawn, side="right")


def prune_rows(keep: np.ndarray, scores: np.ndarray, live: int) -> np.ndarray:
    """A copy of a mask (rows, units) that `prune` was applied to row by row, each to `live` live units. Raises as `prune` does."""
    fewest = int(keep.sum(1).min())
    if not 0 <= live <= fewest:
        raise SparsityError(f"cannot prune to {live} live units a row: a row has only {fewest} alive")
    _check_scores(scores[keep])
    return _best(np.where(keep, scores, -np.inf), live)


def grow_rows(keep: np.ndarray, live: int, rng: np.random.Generator, scores: np.ndarray | None = None) -> np.ndarray:
    """A copy of a mask (rows, units) that `grow` was applied to row by row, each to `live` live units. Raises as `grow` does."""
    most = int(keep.sum(1).max())
    if live > keep.shape[1]:
        raise CapacityError(f"cannot grow to {live} live units a row: there are {keep.shape[1]}")
    if live < most:
        raise SparsityError(f"cannot grow to {live} live units a row: a row has {most} alive already; prune first")
    return _best(np.where(keep, np.inf, rng.random(keep.shape) if scores is None else scores), live)


def _check_scores(scores: np.ndarray) -> None:
    if scores.size and np.isnan(scores.max()):  # the largest is NaN when any is
        raise InputError("a live unit's score is NaN: the weights or gradients have diverged; lower the learning rate")


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """(rows, units) bool: the `count` of highest score in every row; of equal scores the lower index."""
    if count == 0:
        return np.zeros(scores.shape, bool)
    place = scores.shape[1] - count
    worst = np.partition(scores, place, axis=1)[:, place, None]  # of those that are chosen
    chosen = scores >= worst
    if np.count_nonzero(chosen) > count * len(scores):
        equal = scores == worst
        room = equal.sum(1, keepdims=True) - (chosen.sum(1, keepdims=True) - count)
        chosen &= ~equal | (np.cumsum(equal, axis=1, dtype=np.int32) <= room)
    return chosen
