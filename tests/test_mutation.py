"""Mutation decisions, as properties of any mask, scores and counts."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from masks import grow, prune

from mest_compile.errors import CapacityError, InputError, SparsityError
from mest_compile.mutation import Phase, grow_rows, importance, prune_rows

many = settings(deadline=None, max_examples=60)  # no deadline: the cores are shared


@st.composite
def scored_masks(draw):
    """A mask and scores with many ties, for 1 to 40 units."""
    units = draw(st.integers(1, 40))
    keep = np.array(draw(st.lists(st.booleans(), min_size=units, max_size=units)))
    scores = np.array(draw(st.lists(st.integers(0, 5), min_size=units, max_size=units)), np.float32)
    return keep, scores


@many
@given(scored_masks(), st.data())
def test_prune_keeps_the_best_live_units_and_of_equals_the_first(case, data):
    keep, scores = case
    live = data.draw(st.integers(0, int(keep.sum())))
    before = keep.copy(), scores.copy()
    kept = prune(keep, scores, live)
    wanted = sorted(np.flatnonzero(keep), key=lambda unit: (-scores[unit], unit))[:live]
    assert sorted(wanted) == np.flatnonzero(kept).tolist()
    assert (keep == before[0]).all() and (scores == before[1]).all()


@many
@given(scored_masks(), st.data(), st.integers(0, 2**32))
def test_grow_adds_only_dead_units_and_repeats_with_its_seed(case, data, seed):
    keep, _ = case
    live = data.draw(st.integers(int(keep.sum()), keep.size))
    before = keep.copy()
    grown = grow(keep, live, np.random.default_rng(seed))
    assert grown.sum() == live and grown[keep].all()
    assert (keep == before).all()
    assert (grown == grow(keep, live, np.random.default_rng(seed))).all()


@many
@given(scored_masks(), st.data(), st.integers(0, 2**32))
def test_mutate_meets_its_live_count_and_never_loses_the_best(case, data, seed):
    keep, scores = case
    pruned = data.draw(st.integers(0, int(keep.sum())))
    live = data.draw(st.integers(pruned, keep.size))
    before = keep.copy()
    mutated = grow(prune(keep, scores, pruned), live, np.random.default_rng(seed))
    assert mutated.sum() == live and mutated[prune(keep, scores, pruned)].all()
    assert (keep == before).all()


def test_growth_is_uniform_over_the_dead():
    keep = np.arange(10) < 4
    rng, counts = np.random.default_rng(0), np.zeros(10)
    for _ in range(3000):
        counts += grow(keep, 6, rng) & ~keep
    # 2 of 6 dead units: each is drawn with probability 1/3; five standard deviations of a binomial.
    assert (abs(counts[4:] - 1000) < 5 * np.sqrt(3000 * 2 / 9)).all()
    assert not counts[:4].any()


@many
@given(scored_masks())
def test_impossible_counts_are_errors(case):
    keep, scores = case
    rng, alive = np.random.default_rng(0), int(keep.sum())
    with pytest.raises(SparsityError, match=f"{alive} of {keep.size} are alive"):
        prune(keep, scores, alive + 1)
    with pytest.raises(SparsityError):
        prune(keep, scores, -1)
    with pytest.raises(CapacityError, match=f"there are {keep.size}"):
        grow(keep, keep.size + 1, rng)
    assume(alive)
    with pytest.raises(SparsityError, match="prune first"):
        grow(keep, alive - 1, rng)


def test_nan_scores_of_live_units_are_refused_and_of_dead_ones_ignored():
    keep, scores = np.array([True, True, False]), np.array([1.0, 2.0, np.nan])
    assert prune(keep, scores, 1).tolist() == [False, True, False]
    with pytest.raises(InputError, match="NaN"):
        prune(~keep, scores, 1)


def test_importance_counts_the_gradient_when_asked_to():
    weights, gradients = np.float32([-1, 0.5, 0]), np.float32([0.5, -2, 1])
    assert importance(weights, None, 0.0).tolist() == [1, 0.5, 0]
    assert importance(weights, gradients, 0.5).tolist() == [1.25, 1.5, 0.5]
    assert importance(weights, gradients, 0.5).dtype == np.float32
    with pytest.raises(InputError, match="needs gradients"):
        importance(weights, None, 0.5)


@pytest.mark.parametrize(("until", "prune_to", "grow_to"), [(5, 0.9, 0.95), (5, 1.0, 0.9), (5, 0.9, -0.1), (0, 0.9, 0.9)])
def test_phases_that_cannot_be_are_refused(until, prune_to, grow_to):
    with pytest.raises(SparsityError):
        Phase(until, prune_to, grow_to)


@many
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_rows_are_pruned_and_grown_like_single_masks(data, seed):
    rows, units = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    rng = np.random.default_rng(seed)
    alive = data.draw(st.integers(0, units))
    keep = np.stack([rng.permutation(np.arange(units) < alive) for _ in range(rows)])
    scores = rng.integers(0, 4, keep.shape).astype(float)
    live = data.draw(st.integers(0, alive))
    pruned = prune_rows(keep, scores, live)
    np.testing.assert_array_equal(pruned, [prune(*row, live) for row in zip(keep, scores, strict=True)])
    most = data.draw(st.integers(live, units))
    best = grow_rows(pruned, most, rng, scores)
    np.testing.assert_array_equal(best, [grow(row, most, rng, score) for row, score in zip(pruned, scores, strict=True)])
    drawn = grow_rows(pruned, most, np.random.default_rng(seed))
    assert (drawn.sum(1) == most).all() and (drawn | ~pruned).all()
    np.testing.assert_array_equal(drawn, grow_rows(pruned, most, np.random.default_rng(seed)))


def test_rows_that_cannot_be_are_errors():
    keep, rng = np.array([[True, True, False], [True, False, False]]), np.random.default_rng(0)
    with pytest.raises(SparsityError, match="a row has only 1 alive"):
        prune_rows(keep, np.ones((2, 3)), 2)
    with pytest.raises(InputError, match="NaN"):
        prune_rows(keep, np.array([[1, np.nan, 1], [1, 1, 1]]), 1)
    with pytest.raises(SparsityError, match="prune first"):
        grow_rows(keep, 1, rng)
    with pytest.raises(CapacityError, match="there are 3"):
        grow_rows(keep, 4, rng)
