"""Elastic Mutation: which units live next. Pure functions on flat masks; randomness is handed in, inputs are left unchanged.

Source: MEST (arXiv:2110.14032). EM prunes below its target and grows back; EM&S grows beyond it and prunes later. Both are one
prune-to / grow-to routine with two sparsities a phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        if not 0 <= self.grow_to <= self.prune_to < 1:
            raise SparsityError(f"a phase needs 0 <= grow_to <= prune_to < 1, not grow_to {self.grow_to}, prune_to {self.prune_to}")
        if self.until_epoch < 1:
            raise SparsityError(f"a phase ends at epoch 1 or later, not {self.until_epoch}")


def importance(weights: np.ndarray, gradients: np.ndarray | None, importance_lambda: float) -> np.ndarray:
    """|w| + importance_lambda * |dL/dw|, same shape as `weights`. `gradients` may be None when importance_lambda is 0."""
    if not importance_lambda:
        return np.abs(weights)
    if gradients is None or gradients.shape != weights.shape:
        raise InputError(f"importance_lambda {importance_lambda} needs gradients of shape {weights.shape}, "
                         f"not {None if gradients is None else gradients.shape}")
    return np.abs(weights) + np.asarray(importance_lambda, weights.dtype) * np.abs(gradients)


def prune(keep: np.ndarray, scores: np.ndarray, live: int) -> np.ndarray:
    """A copy of `keep` in which only the `live` live units of highest score stay; of equal scores the lower index stays.

    keep    (units,) bool
    scores  (units,) float; those of dead units are not looked at
    live    units that stay alive
    Raises SparsityError when fewer than `live` units are alive, InputError when a live unit's score is NaN.
    """
    alive = np.flatnonzero(keep)
    if not 0 <= live <= alive.size:
        raise SparsityError(f"cannot prune to {live} live units: {alive.size} of {keep.size} are alive")
    if scores.shape != keep.shape:
        raise InputError(f"prune needs one score a unit: {keep.shape}, not {scores.shape}")
    _check_scores(scores[alive])
    kept = np.zeros_like(keep)
    if live:
        found = scores[alive]
        worst = np.partition(found, alive.size - live)[alive.size - live]  # of those that stay
        kept[alive[found > worst]] = True
        kept[alive[np.flatnonzero(found == worst)[:live - int(kept.sum())]]] = True
    return kept


def grow(keep: np.ndarray, live: int, rng: np.random.Generator, scores: np.ndarray | None = None) -> np.ndarray:
    """A copy of `keep` with `live` units alive, the new ones drawn evenly from the dead, or those of highest score.

    keep    (units,) bool
    scores  (units,) float; of equal scores the lower index grows. None: the generator chooses
    Raises CapacityError when there are fewer than `live` units, SparsityError when more than `live` are alive already.
    """
    alive = int(keep.sum())
    if live > keep.size:
        raise CapacityError(f"cannot grow to {live} live units: there are {keep.size}")
    if live < alive:
        raise SparsityError(f"cannot grow to {live} live units: {alive} of {keep.size} are alive already; prune first")
    grown, dead = keep.copy(), np.flatnonzero(~keep)
    if scores is None:
        grown[rng.choice(dead, size=live - alive, replace=False)] = True
    else:
        grown[dead[np.argsort(-scores[dead], kind="stable")[:live - alive]]] = True
    return grown


def prune_rows(keep: np.ndarray, scores: np.ndarray, live: int) -> np.ndarray:
    """`prune` of every row of `keep` (rows, units) at once, each to `live` live units. Raises as `prune` does."""
    fewest = int(keep.sum(1).min())
    if not 0 <= live <= fewest:
        raise SparsityError(f"cannot prune to {live} live units a row: a row has only {fewest} alive")
    _check_scores(scores[keep])
    return _best(np.where(keep, scores, -np.inf), live)


def grow_rows(keep: np.ndarray, live: int, rng: np.random.Generator, scores: np.ndarray | None = None) -> np.ndarray:
    """`grow` of every row of `keep` (rows, units) at once, each to `live` live units. Raises as `grow` does."""
    most = int(keep.sum(1).max())
    if live > keep.shape[1]:
        raise CapacityError(f"cannot grow to {live} live units a row: there are {keep.shape[1]}")
    if live < most:
        raise SparsityError(f"cannot grow to {live} live units a row: a row has {most} alive already; prune first")
    return _best(np.where(keep, np.inf, rng.random(keep.shape) if scores is None else scores), live)


def _check_scores(scores: np.ndarray) -> None:
    if np.isnan(scores).any():
        raise InputError("a live unit's score is NaN: the weights or gradients have diverged; lower the learning rate")


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """(rows, units) bool: the `count` of highest score in every row; of equal scores the lower index."""
    if count == 0:
        return np.zeros(scores.shape, bool)
    place = scores.shape[1] - count
    worst = np.partition(scores, place, axis=1)[:, place, None]  # of those that are chosen
    chosen, equal = scores > worst, scores == worst
    room = count - chosen.sum(1, keepdims=True)
    return chosen | equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= room)


def mutate(keep: np.ndarray, scores: np.ndarray, prune_live: int, grow_live: int, rng: np.random.Generator) -> np.ndarray:
    """`keep` pruned to `prune_live` live units, then grown to `grow_live`.

    A pruned unit is as likely to be drawn again as any other dead one. It counts as new: who holds weights resets those of
    units that `prune` drops, not only of those that differ between `keep` and the result.
    """
    return grow(prune(keep, scores, prune_live), grow_live, rng)
