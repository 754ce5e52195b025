"""Mutation decisions, as properties of any mask, scores and counts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from masks import grow, prune

from mest_compile.base.errors import CapacityError, InputError, SparsityError
from mest_compile.sparsity import mutation
from mest_compile.sparsity.mutation import Phase, choices, grow_rows, importance, prune_rows

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
def test_prune_keeps_the_best_live_units_and_repeats_with_its_seed(case, data):
    keep, scores = case
    live = data.draw(st.integers(0, int(keep.sum())))
    before = keep.copy(), scores.copy()
    kept = prune(keep, scores, live, np.random.default_rng(3))
    assert kept.sum() == live and not (kept & ~keep).any()
    assert sorted(scores[kept]) == sorted(scores[keep])[keep.sum() - live :]
    assert (kept == prune(keep, scores, live, np.random.default_rng(3))).all()
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
    kept = prune(keep, scores, pruned, np.random.default_rng(seed))
    mutated = grow(kept, live, np.random.default_rng(seed))
    assert mutated.sum() == live and mutated[kept].all()
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
        prune(keep, scores, alive + 1, rng)
    with pytest.raises(SparsityError):
        prune(keep, scores, -1, rng)
    with pytest.raises(CapacityError, match=f"there are {keep.size}"):
        grow(keep, keep.size + 1, rng)
    assume(alive)
    with pytest.raises(SparsityError, match="prune first"):
        grow(keep, alive - 1, rng)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused_of_live_units_and_of_those_that_may_grow(bad):
    keep, scores, rng = np.array([True, True, False]), np.array([1.0, 2.0, bad]), np.random.default_rng(0)
    assert prune(keep, scores, 1, rng).tolist() == [False, True, False]
    for refused in (
        lambda: prune(~keep, scores, 1, rng),
        lambda: grow(keep, 3, rng, scores),
        lambda: grow_rows(keep[None], 3, rng, scores[None]),
    ):
        with pytest.raises(InputError, match="NaN or infinite"):
            refused()


def test_importance_counts_the_gradient_when_asked_to():
    weights, gradients = np.float32([-1, 0.5, 0]), np.float32([0.5, -2, 1])
    assert importance(weights, None, 0.0).tolist() == [1, 0.5, 0]
    assert importance(weights, gradients, 0.5).tolist() == [1.25, 1.5, 0.5]
    assert importance(weights, gradients, 0.5).dtype == np.float32
    with pytest.raises(InputError, match="needs gradients"):
        importance(weights, None, 0.5)


@pytest.mark.parametrize(
    ("until", "prune_to", "grow_to"), [(5, 0.9, 0.95), (5, 1.0, 0.9), (5, 0.9, -0.1), (0, 0.9, 0.9)]
)
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
    pruned = prune_rows(keep, scores, live, rng)
    assert (pruned.sum(1) == live).all() and not (pruned & ~keep).any()
    most = data.draw(st.integers(live, units))
    best = grow_rows(pruned, most, rng, scores)
    assert (best.sum(1) == most).all() and (best | ~pruned).all()
    for row, kept, grown, score in zip(keep, pruned, best, scores, strict=True):
        assert sorted(score[kept]) == sorted(score[prune(row, score, live, rng)])
        assert sorted(score[grown]) == sorted(score[grow(kept, most, rng, score)])
    drawn = grow_rows(pruned, most, np.random.default_rng(seed))
    assert (drawn.sum(1) == most).all() and (drawn | ~pruned).all()
    np.testing.assert_array_equal(drawn, grow_rows(pruned, most, np.random.default_rng(seed)))


def test_rows_that_cannot_be_are_errors():
    keep, rng = np.array([[True, True, False], [True, False, False]]), np.random.default_rng(0)
    with pytest.raises(SparsityError, match="a row has only 1 alive"):
        prune_rows(keep, np.ones((2, 3)), 2, rng)
    with pytest.raises(InputError, match="NaN"):
        prune_rows(keep, np.array([[1, np.nan, 1], [1, 1, 1]]), 1, rng)
    with pytest.raises(SparsityError, match="prune first"):
        grow_rows(keep, 1, rng)
    with pytest.raises(CapacityError, match="there are 3"):
        grow_rows(keep, 4, rng)


# Ties, and filters.

EVEN = 5 * np.sqrt(2000 * 0.25 * 0.75)  # five standard deviations of a binomial: of 2000 draws of 2 out of 8


def test_equal_scores_are_drawn_evenly_whatever_decides():
    scores, keep, rng = np.array([5.0, 1, 1, 1, 1, 1, 1, 1, 1, 0]), np.ones(10, bool), np.random.default_rng(0)
    dead = np.arange(10) == 9
    decisions = {
        "prune": lambda: prune(keep, scores, 3, rng),
        "prune_rows": lambda: prune_rows(keep[None], scores[None], 3, rng)[0],
        "grow": lambda: grow(dead, 4, rng, scores) & ~dead,
        "grow_rows": lambda: grow_rows(dead[None], 4, rng, scores[None])[0] & ~dead,
    }
    for name, decide in decisions.items():
        counts = sum(decide().astype(int) for _ in range(2000))
        assert counts[0] == 2000 and counts[9] == 0, name
        assert (abs(counts[1:9] - 500) < EVEN).all(), (name, counts)
    scores, filters = np.array([1.0, 1, 0, 1]), (np.array([0, 4]), np.array([0]))
    for decide in (lambda: choices(scores[None], rng), lambda: mutation.highest(scores, 1, rng, *filters)):
        counts = np.bincount([int(decide()[0]) for _ in range(3000)], minlength=4)
        assert counts[2] == 0 and (abs(counts[[0, 1, 3]] - 1000) < 5 * np.sqrt(3000 * 2 / 9)).all()


def test_where_no_scores_are_equal_the_generator_is_not_asked():
    scores, rng = np.random.default_rng(1).permutation(40).astype(float), np.random.default_rng(0)
    before = rng.bit_generator.state
    mutation.prune_filters(scores, 30, 40, rng, np.array([0, 10, 25, 40]))
    prune_rows(np.ones((4, 10), bool), scores.reshape(4, 10), 3, rng)
    grow(scores < 20, 30, rng, scores)
    choices(scores.reshape(4, 10), rng)
    assert rng.bit_generator.state == before


@many
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.data(), st.integers(0, 2**32))
def test_no_filter_dies_while_there_are_units_for_all(lengths, data, seed):
    """lengths: live units of each filter of 6 units. The counts are exact, and of the rest the best stay."""
    rng = np.random.default_rng(seed)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    scores = rng.integers(0, 9, bounds[-1]).astype(float)
    live = data.draw(st.integers(0, int(bounds[-1])))
    stay = np.zeros(len(scores), bool)
    places, dead = mutation.prune_filters(scores, live, 6 * len(lengths), rng, bounds)
    stay[places] = True
    each = np.array([stay[start:end].sum() for start, end in pairwise(bounds)])
    alive = np.count_nonzero(lengths)
    assert (
        stay.sum() == live == each.sum() and (np.diff(places) > 0).all() and (np.flatnonzero(each == 0) == dead).all()
    )
    assert np.count_nonzero(each) == min(live, alive)
    for start, end in pairwise(bounds):
        if stay[start:end].any():
            assert scores[start:end][stay[start:end]].max() == scores[start:end].max()
    others = [score for start, end in pairwise(bounds) for score in sorted(scores[start:end][stay[start:end]])[:-1]]
    assert not others or stay.all() or min(others) >= scores[~stay].max()  # those beside each filter's best


@many
@given(st.integers(1, 6), st.integers(1, 5), st.booleans(), st.data(), st.integers(0, 2**32))
def test_a_dead_filter_grows_first(filters, each, scored, data, seed):
    rng = np.random.default_rng(seed)
    keep = rng.random((filters, each)) < 0.3
    live = data.draw(st.integers(int(keep.sum()), keep.size))
    scores = rng.integers(0, 3, keep.size).astype(float) if scored else None
    new = mutation.grow_filters(np.flatnonzero(keep), keep.size, live, rng, scores, np.flatnonzero(~keep.any(1)), each)
    grown = keep.copy()
    grown.ravel()[new] = True
    assert (np.diff(new) > 0).all() and not keep.ravel()[new].any()
    assert grown.sum() == live
    assert grown.any(1).sum() == min(filters, keep.any(1).sum() + live - keep.sum())
