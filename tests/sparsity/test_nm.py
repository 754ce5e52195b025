"""N of every M consecutive input channels: groups never hold more, whatever mutates."""

import numpy as np
import pytest
from masks import grow_grid, prune_grid

import mest_compile as mest
from mest_compile.base.errors import CapacityError, InputError, SparsityError, StateError, UnknownName, UsageError
from mest_compile.ir.graph import LayerSpec
from mest_compile.options import StepOptions
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.distributions import rescaled, together

LAYER = LayerSpec("conv", (6, 16, 3, 3), (2, 16, 6, 6), (1, 1), (1, 1))


def live_of_groups(keep, m):
    """Written element by element: (out, groups, kh, kw)."""
    out, inputs, height, width = keep.shape
    return np.array(
        [
            [
                [[sum(keep[o, g * m + k, y, x] for k in range(m)) for x in range(width)] for y in range(height)]
                for g in range(inputs // m)
            ]
            for o in range(out)
        ]
    )


def energy(seed=0):
    return np.random.default_rng(seed).random(LAYER.weight_shape)


def start(scheme, seed=0):
    live = scheme.live_units(LAYER, scheme.fixed)
    return scheme.start(LAYER, energy(seed), live, np.random.default_rng(seed))


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:8", "1:2", "nm"])
def test_a_start_keeps_the_largest_of_every_group(text):
    scheme = parse_scheme(text)
    keep = start(scheme)
    assert (live_of_groups(keep, scheme.m) == scheme.n).all()
    groups = energy().reshape(6, 16 // scheme.m, scheme.m, 3, 3)
    worst = np.where(keep.reshape(groups.shape), groups, np.inf).min(2)
    assert (np.where(keep.reshape(groups.shape), -np.inf, groups).max(2) < worst).all()


@pytest.mark.parametrize("by_gradient", [False, True])
def test_groups_lose_by_importance_and_grow_where_there_is_room(by_gradient):
    scheme, rng = parse_scheme("2:4"), np.random.default_rng(1)
    keep = start(scheme)
    for turn in range(3):
        fewer, between, full = (scheme.live_units(LAYER, sparsity) for sparsity in (0.7, 0.6, 0.5))
        pruned = prune_grid(scheme, LAYER, keep, energy(turn), fewer, rng)
        assert len(set(live_of_groups(pruned, 4).ravel())) == 3  # by the layer's ranks, not group by group
        grown = grow_grid(scheme, LAYER, pruned, between, rng, energy(turn + 9) if by_gradient else None)
        assert live_of_groups(grown, 4).max() == 2 and grown.sum() == between and (grown >= pruned).all()
        keep = grow_grid(scheme, LAYER, grown, full, rng)
        assert (live_of_groups(keep, 4) == 2).all()
        if by_gradient:  # what grew beats what could have grown and did not
            new, room = grown & ~pruned, np.repeat(live_of_groups(grown, 4) < 2, 4, axis=1)
            assert energy(turn + 9)[room & ~grown].max() < energy(turn + 9)[new].min()


def test_room_is_drawn_evenly():
    scheme = parse_scheme("1:4")
    counts = np.zeros(LAYER.weight_shape)
    keep = start(scheme)
    keep[:, 4:] = False
    for seed in range(200):
        grown = grow_grid(scheme, LAYER, keep, keep.sum() + 81, np.random.default_rng(seed))
        counts += grown & ~keep
    assert not counts[:, :4].any()
    mean = counts[:, 4:].mean()  # binomial, 200 draws: five standard deviations
    assert abs(counts[:, 4:] - mean).max() < 5.5 * np.sqrt(mean)


def test_a_dead_filter_gets_a_weight_before_others_grow():
    scheme = parse_scheme("2:4")
    keep = start(scheme)
    keep[[1, 4]] = False
    for count, dead in ((1, 1), (2, 0), (9, 0)):
        grown = grow_grid(scheme, LAYER, keep, keep.sum() + count, np.random.default_rng(0))
        assert (~grown.any((1, 2, 3))).sum() == dead


def test_what_has_no_room_is_refused():
    scheme, rng = parse_scheme("2:4"), np.random.default_rng(0)
    keep = start(scheme)
    full = scheme.live_units(LAYER, 0.5)
    with pytest.raises(
        CapacityError, match=f"conv: cannot grow to {full + 1} live units: scheme 2:4 has room for {full}"
    ):
        grow_grid(scheme, LAYER, keep, full + 1, rng)
    with pytest.raises(SparsityError, match="are alive; prune first"):
        grow_grid(scheme, LAYER, keep, full - 1, rng)
    with pytest.raises(InputError, match="NaN or infinite"):
        grow_grid(scheme, LAYER, np.zeros_like(keep), 9, rng, np.full(LAYER.weight_shape, np.nan))
    with pytest.raises(SparsityError, match="scheme 2:4 has room for 0.5 and more: .* as method em_s does"):
        scheme.live_units(LAYER, 0.45)
    keep[2, :4, 1, 1] = True
    with pytest.raises(StateError, match="has 1 of 216 groups of 4 input channels in which more than 2 weights live"):
        scheme.collapse(LAYER, keep)


def test_channels_that_fall_into_no_groups_are_refused_by_name():
    with pytest.raises(SparsityError, match="odd: scheme 2:4 needs a multiple of 4 input .* has 6; .* dense_layers"):
        parse_scheme("2:4").check(LayerSpec("odd", (8, 6, 1, 1), (2, 6, 4, 4)))


def test_the_sparsity_follows_from_the_scheme():
    assert StepOptions("1:4").sparsity == 0.75 == StepOptions("1:4", 0.75).sparsity
    assert StepOptions("dense").sparsity == 0 and StepOptions("pattern").sparsity == 0.9
    with pytest.raises(SparsityError, match="scheme 1:4 has sparsity 0.75, not 0.9; leave sparsity out, or choose"):
        StepOptions("1:4", 0.9)
    assert mest.NM(2, 4) == parse_scheme("2:4") == parse_scheme("nm:2:4") == parse_scheme("nm")
    with pytest.raises(UsageError, match="NM: m"):
        mest.NM(2, 4.5)
    for text, error in (("4:4", UsageError), ("0:4", UsageError), ("nm:4x4", UsageError), ("2:", UnknownName)):
        with pytest.raises(error):
            parse_scheme(text)


def test_beyond_its_own_sparsity_a_scheme_keeps_the_share_that_is_asked_for():
    layer = LayerSpec("conv", (10, 16, 1, 1), (2, 16, 6, 6))
    assert [parse_scheme("3:4").live_units(layer, sparsity) for sparsity in (0.25, 0.4, 0.8)] == [120, 96, 32]


@pytest.mark.parametrize("text", ["1:3", "2:3", "1:6", "5:6"])
def test_rounding_of_the_sparsity_of_all_layers_does_not_move_a_full_mask(text):
    scheme, layer = parse_scheme(text), LayerSpec("a", (400, 600, 3, 3), (2, 600, 6, 6))
    elems = {"a": layer.weight_elems, "b": 12345}
    share = {"a": scheme.fixed, "b": 0.9}
    again = rescaled(share, elems, together(share, elems))["a"]
    assert scheme.live_units(layer, again) == layer.weight_elems // scheme.m * scheme.n
