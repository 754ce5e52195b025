"""Schemes and distributions."""

import numpy as np
import pytest

from mest_compile.errors import SparsityError, StateError, UnknownName, UsageError
from mest_compile.sparsity import parse_scheme, scheme_names
from mest_compile.sparsity.distributions import distribute
from mest_compile.spec import LayerSpec

CONV = LayerSpec("conv", (8, 12, 3, 3), (2, 12, 6, 6), (1, 1), (1, 1))


@pytest.mark.parametrize("name", scheme_names())
def test_masks_survive_the_way_to_units_and_back(name):
    scheme = parse_scheme(name)
    keep = np.random.default_rng(0).random(scheme.grid(CONV)) < 0.3
    np.testing.assert_array_equal(scheme.collapse(CONV, scheme.expand(CONV, keep)), keep)


@pytest.mark.parametrize("name", [name for name in scheme_names() if name != "dense"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95])
def test_pruning_leaves_exactly_the_units_asked_for(name, sparsity):
    scheme = parse_scheme(name)
    weight = np.random.default_rng(1).standard_normal(CONV.weight_shape)
    live = scheme.live_units(CONV, sparsity)
    keep = scheme.prune(CONV, np.ones(scheme.grid(CONV), bool), scheme.scores(CONV, np.abs(weight)), live)
    assert keep.sum() == live
    assert abs(scheme.expand(CONV, keep).mean() - (1 - sparsity)) <= scheme.unit_elems(CONV) / CONV.weight_elems


def test_a_block_scores_the_norm_of_its_four_weights():
    importance = np.zeros(CONV.weight_shape)
    importance[4:8, 2, 1, 0] = [1, 2, 2, 4]
    scores = parse_scheme("block:4x1").scores(CONV, importance)
    assert scores[1, 2, 1, 0] == 5 and np.count_nonzero(scores) == 1


def test_a_block_that_does_not_divide_the_layer_is_refused():
    with pytest.raises(SparsityError, match="multiples of 4 output"):
        parse_scheme("block").check(LayerSpec("fc", (10, 12, 1, 1), (2, 12, 1, 1)))


def test_a_mask_that_cuts_a_block_is_refused():
    mask = np.ones(CONV.weight_shape, bool)
    mask[1, 0, 0, 0] = False
    with pytest.raises(StateError, match="whole units"):
        parse_scheme("block").collapse(CONV, mask)


@pytest.mark.parametrize("text, error", [("blok", UnknownName), ("block:4", UsageError), ("block:0x1", UsageError), ("unstructured:3", UsageError)])
def test_a_scheme_that_does_not_exist_is_refused(text, error):
    with pytest.raises(error):
        parse_scheme(text)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.2])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(SparsityError, match="0 <= sparsity < 1"):
        distribute("uniform", [CONV], sparsity)


def test_erk_meets_the_overall_sparsity_and_spares_small_layers():
    layers = [LayerSpec(f"l{i}", shape, (1, shape[1], 9, 9)) for i, shape in enumerate([(16, 16, 3, 3), (64, 64, 3, 3), (4, 4, 1, 1)])]
    share = distribute("erk", layers, 0.8)
    live = sum((1 - share[layer.name]) * layer.weight_elems for layer in layers)
    assert live == pytest.approx(0.2 * sum(layer.weight_elems for layer in layers))
    assert share["l2"] == 0.0 and share["l0"] < share["l1"]


def test_uniform_gives_every_layer_the_same():
    assert distribute("uniform", [CONV], 0.9) == {"conv": 0.9}
    with pytest.raises(UnknownName, match="erk, uniform"):
        distribute("magic", [CONV], 0.9)
