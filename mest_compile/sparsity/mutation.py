"""Elastic Mutation: which units live next. Pure functions on flat masks; randomness is handed in, inputs are left
unchanged.

Source: MEST (arXiv:2110.14032). EM prunes below its target and grows back; EM&S grows beyond it and prunes later. Both
are one prune-to / grow-to routine with two sparsities a phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import CapacityError, InputError, SparsityError


@dataclass(frozen=True, slots=True)
class Phase:
    """What a mutation does in the epochs before `until_epoch` (counted from 0) that no earlier phase covers.

    prune_to, grow_to  sparsities, 0 <= grow_to <= prune_to < 1
    """

    until_epoch: int
    prune_to: float
    grow_to: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "until_epoch", checks.whole("until_epoch", self.until_epoch, 1, error=SparsityError))
        for name in ("prune_to", "grow_to"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name), error=SparsityError))
        if not 0 <= self.grow_to <= self.prune_to < 1:
            raise SparsityError(
                f"a phase needs 0 <= grow_to <= prune_to < 1, not grow_to {self.grow_to}, prune_to {self.prune_to}"
            )


def importance(weights: np.ndarray, gradients: np.ndarray | None, importance_lambda: float) -> np.ndarray:
    """|w| + importance_lambda * |dL/dw|, same shape as `weights`. `gradients` may be None when importance_lambda is
    0."""
    if not importance_lambda:
        return np.abs(weights)
    if gradients is None or gradients.shape != weights.shape:
        raise InputError(
            f"importance_lambda {importance_lambda} needs gradients of shape {weights.shape}, "
            f"not {None if gradients is None else gradients.shape}"
        )
    return np.abs(weights) + np.asarray(importance_lambda, weights.dtype) * np.abs(gradients)


def prune(scores: np.ndarray, live: int, units: int, rng: np.random.Generator) -> np.ndarray:
    """Which live units stay, (alive,) bool: the `live` of highest score; of equal scores the generator chooses.

    scores  (alive,) float, of the live units
    units   live and dead
    Raises SparsityError when fewer than `live` units are alive, InputError when a score is NaN or infinite.
    """
    if not 0 <= live <= scores.size:
        raise SparsityError(f"cannot prune to {live} live units: {scores.size} of {units} are alive")
    _check_scores(scores)
    return _best(scores[None], live, rng)[0]


def prune_filters(
    scores: np.ndarray, live: int, units: int, rng: np.random.Generator, bounds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(places of the live units that stay, filters that none of them lies in), both ascending: `prune`, but no filter
    dies while `live` is enough for all that live, and where it is not none keeps more than one unit.

    bounds  (filters + 1,): the live units of filter n stand from bounds[n] to bounds[n + 1]
    Raises as `prune` does. Ours.
    """
    stay = np.flatnonzero(prune(scores, live, units, rng))
    ends = np.searchsorted(stay, bounds)
    if (ends[1:] > ends[:-1]).all():
        return stay, np.array([], np.intp)
    if ((ends[1:] == ends[:-1]) & (bounds[1:] > bounds[:-1])).any():
        best = _best_of_each(scores, bounds, rng)
        few = live < len(best)
        lifted = np.full(scores.shape, -np.inf) if few else scores.astype(np.float64)
        lifted[best] = scores[best] if few else np.inf
        stay = np.flatnonzero(_best(lifted[None], live, rng))
        ends = np.searchsorted(stay, bounds)
    return stay, np.flatnonzero(ends[1:] == ends[:-1])


def grow(
    alive: np.ndarray, units: int, live: int, rng: np.random.Generator, scores: np.ndarray | None = None
) -> np.ndarray:
    """Dead units that join the live ones until there are `live`, ascending: drawn evenly, or those of highest score.

    A unit that was pruned is as likely to be drawn again as any other dead one, and counts as new.
    alive   the live units, ascending; units: live and dead
    scores  (units,) float; of equal scores the generator chooses. None: it chooses all
    Raises CapacityError when there are fewer than `live` units, SparsityError when more than `live` are alive already,
    InputError when a score is NaN or infinite.
    """
    count = live - alive.size
    if live > units:
        raise CapacityError(f"cannot grow to {live} live units: there are {units}")
    if count < 0:
        raise SparsityError(f"cannot grow to {live} live units: {alive.size} of {units} are alive already; prune first")
    if scores is not None:
        _check_scores(scores)
        dead = np.delete(np.arange(units), alive)
        return dead[_best(scores[dead][None], count, rng)[0]]
    # Listing the dead would cost more than all the rest: the one with n dead before it stands behind the live ones with
    # n or fewer.
    drawn = np.sort(rng.choice(units - alive.size, size=count, replace=False))
    return drawn + np.searchsorted(alive - np.arange(alive.size), drawn, side="right")


def grow_filters(
    alive: np.ndarray,
    units: int,
    live: int,
    rng: np.random.Generator,
    scores: np.ndarray | None,
    dead: np.ndarray,
    each: int,
) -> np.ndarray:
    """`grow`, but filters without a live unit get one each before others grow.

    dead  those filters, ascending; each: units of every filter, of which filter n has those from n * each
    Raises as `grow` does. Ours.
    """
    if not len(dead) or live <= alive.size:
        return grow(alive, units, live, rng, scores)
    if scores is not None:
        _check_scores(scores)
    wanted = rng.random((len(dead), each)) if scores is None else scores.reshape(-1, each)[dead]
    place = choices(wanted, rng)
    chosen = _best(wanted[None, np.arange(len(dead)), place], min(live - alive.size, len(dead)), rng)[0]
    first = (dead * each + place)[chosen]
    return np.sort(np.concatenate([first, grow(np.sort(np.concatenate([alive, first])), units, live, rng, scores)]))


def highest(
    scores: np.ndarray, count: int, rng: np.random.Generator, bounds: np.ndarray, first: np.ndarray
) -> np.ndarray:
    """Places of the `count` highest scores, ascending; of equal ones the generator chooses. The best of some filters
    come before all others.

    bounds  (filters + 1,): the scores of filter n stand from bounds[n] to bounds[n + 1]
    first   those filters, ascending, each of which has a score
    Raises InputError when a score is NaN or infinite.
    """
    _check_scores(scores)
    if len(first):
        best = _best_of_each(scores, bounds, rng)
        best = best[np.isin(np.searchsorted(bounds, best, side="right") - 1, first)]
        few = count < len(best)
        lifted = np.full(scores.shape, -np.inf) if few else scores.astype(np.float64)
        lifted[best] = scores[best] if few else np.inf
        scores = lifted
    return np.flatnonzero(_best(scores[None], count, rng)[0])


def prune_rows(keep: np.ndarray, scores: np.ndarray, live: int, rng: np.random.Generator) -> np.ndarray:
    """A copy of a mask (rows, units) that `prune` was applied to row by row, each to `live` live units. Raises as
    `prune` does."""
    fewest = int(keep.sum(1).min())
    if not 0 <= live <= fewest:
        raise SparsityError(f"cannot prune to {live} live units a row: a row has only {fewest} alive")
    _check_scores(scores[keep])
    return _best(np.where(keep, scores, -np.inf), live, rng)


def grow_rows(keep: np.ndarray, live: int, rng: np.random.Generator, scores: np.ndarray | None = None) -> np.ndarray:
    """A copy of a mask (rows, units) that `grow` was applied to row by row, each to `live` live units. Raises as `grow`
    does."""
    most = int(keep.sum(1).max())
    if live > keep.shape[1]:
        raise CapacityError(f"cannot grow to {live} live units a row: there are {keep.shape[1]}")
    if live < most:
        raise SparsityError(f"cannot grow to {live} live units a row: a row has {most} alive already; prune first")
    if scores is not None:
        _check_scores(scores)
    return _best(np.where(keep, np.inf, rng.random(keep.shape) if scores is None else scores), live, rng)


def choices(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where along the last axis the highest score stands; of equal ones the generator chooses."""
    highest = scores == scores.max(-1, keepdims=True)
    if np.count_nonzero(highest) > highest[..., 0].size:
        return np.where(highest, rng.random(scores.shape), -1.0).argmax(-1)
    return highest.argmax(-1)


def _check_scores(scores: np.ndarray) -> None:
    if scores.size and not np.isfinite(scores.max()):  # the largest is NaN when any is
        raise InputError(
            "a unit's score is NaN or infinite: the weights or gradients have diverged; lower the learning rate"
        )


def _best(scores: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, units) bool: the `count` of highest score in every row; of equal scores the generator chooses, which
    nothing else asks."""
    if count == 0:
        return np.zeros(scores.shape, bool)
    place = scores.shape[1] - count
    worst = np.partition(scores, place, axis=1)[:, place, None]  # of those that are chosen
    chosen = scores >= worst
    if np.count_nonzero(chosen) > count * len(scores):
        equal = scores == worst
        room = count - (chosen.sum(1) - equal.sum(1))
        chosen &= ~equal
        rows, units = np.nonzero(equal)
        order = np.argsort(rows + rng.random(len(rows)))  # shuffled within each row
        order = order[np.arange(len(rows)) - np.searchsorted(rows, rows) < room[rows]]
        chosen[rows[order], units[order]] = True
    return chosen


def _best_of_each(scores: np.ndarray, bounds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Place of the highest score of each stretch, empty ones left out; of equal ones the generator chooses."""
    lengths = np.diff(bounds)
    starts, lengths = bounds[:-1][lengths > 0], lengths[lengths > 0]
    highest = np.flatnonzero(scores == np.repeat(np.maximum.reduceat(scores, starts), lengths))
    stretch = np.searchsorted(starts, highest, side="right") - 1
    order = np.argsort(stretch + rng.random(len(highest))) if len(highest) > len(starts) else np.arange(len(highest))
    return highest[order[np.searchsorted(stretch, np.arange(len(starts)))]]
