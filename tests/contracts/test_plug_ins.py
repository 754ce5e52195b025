"""What every scheme keeps, whoever wrote it: the registry is walked, so that one file is tried the day it is added.

What losses, optimizers and activations keep is in the tests of operators, which walk their registries as well.
"""

import inspect

import numpy as np
import pytest
from masks import grow_grid, prune_grid

import mest_compile as mest
from mest_compile.base.errors import SparsityError, StateError
from mest_compile.hardware.backend import BACKENDS
from mest_compile.ir.graph import LayerSpec
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.scheme import SCHEMES

LAYERS = [
    LayerSpec("square", (16, 8, 3, 3), (2, 8, 6, 6), (1, 1), (1, 1)),
    LayerSpec("strided", (8, 16, 3, 3), (2, 16, 6, 6), (2, 2), (1, 1)),
    LayerSpec("point", (24, 16, 1, 1), (2, 16, 6, 6), (1, 1), (0, 0)),
]
SPARSE = [name for name in SCHEMES.names() if name != "dense"]
every = pytest.mark.parametrize("kind", [SCHEMES.find(name) for name in SCHEMES.names()])


@every
def test_a_scheme_is_whole(kind):
    assert SCHEMES.find(kind.name) is kind and getattr(mest, kind.__name__) is kind and inspect.getdoc(kind)
    assert parse_scheme(kind.name) == parse_scheme(str(parse_scheme(kind.name)))
    for layer in LAYERS:
        families = parse_scheme(kind.name).kernels(layer)
        for device in BACKENDS.load().values():
            assert any(device.has(f"{family}.conv") for family in families), f"no kernels for {layer.name}"
        assert set(families) <= set(FAMILIES.load())


def lives(scheme, layer):
    """Live units that the scheme can have in the layer: sparse, sparser."""
    return [scheme.live_units(layer, sparsity) for sparsity in (0.6, 0.75, 0.85)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("name", SPARSE)
def test_mutations_keep_whole_units_and_exactly_as_many_as_asked_for(name, layer):
    scheme, rng = parse_scheme(name), np.random.default_rng(3)
    try:
        scheme.check(layer)
    except SparsityError as refused:
        assert layer.name in str(refused) and layer.weight_shape[2:] == (1, 1), "only 1x1 kernels may be refused"
        return
    dense, start, sparse = lives(scheme, layer)
    assert 0 < sparse <= start <= dense

    def check(keep, live):
        mask = scheme.expand(layer, keep)
        assert keep.shape == scheme.grid(layer) and mask.shape == layer.weight_shape
        assert scheme.count(layer, keep) == live and keep.sum() == live * scheme.unit_cells(layer)
        assert mask.sum() == keep.sum() * scheme.cell_elems(layer)
        np.testing.assert_array_equal(scheme.collapse(layer, mask), keep)

    for share in (-0.1, 1.0, np.nan):
        with pytest.raises(SparsityError, match=layer.name):
            scheme.live_units(layer, share)
    weight = rng.standard_normal(layer.weight_shape)
    assert (scheme.energy(layer, (1e-30 * weight).astype(np.float32)) > 0).all()  # small importances stay apart
    energy = scheme.energy(layer, weight)
    keep = scheme.start(layer, energy, start, np.random.default_rng(1))
    check(keep, start)
    for turn in range(3):
        energy = scheme.energy(layer, rng.standard_normal(layer.weight_shape))
        pruned = prune_grid(scheme, layer, keep, energy, sparse, rng)
        check(pruned, sparse)
        assert not (pruned & ~keep).any()
        grown = grow_grid(scheme, layer, pruned, dense, rng, None if turn else energy)
        check(grown, dense)
        assert not (pruned & ~grown).any()
        keep = prune_grid(scheme, layer, grown, energy, start, rng)
        check(keep, start)


@pytest.mark.parametrize("name", SPARSE)
def test_the_seed_decides_between_equals(name):
    scheme, layer = parse_scheme(name), LAYERS[0]
    energy, live = np.ones(scheme.grid(layer)), lives(scheme, layer)[1]
    one, same, other = (scheme.start(layer, energy, live, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("name", SPARSE)
def test_masks_that_no_unit_lives_in_are_refused(name):
    with pytest.raises(StateError, match="square"):
        parse_scheme(name).collapse(LAYERS[0], np.zeros(LAYERS[0].weight_shape, bool))
