"""Schemes and distributions."""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import grow_grid, prune_grid

import mest_compile as mest
from mest_compile.base.errors import InputError, SparsityError, StateError, UnknownName, UsageError
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.distributions import distribute
from mest_compile.sparsity.scheme import loads_shared
from mest_compile.sparsity.schemes.pattern import PATTERNS

CONV = LayerSpec("conv", (8, 12, 3, 3), (2, 12, 6, 6), (1, 1), (1, 1))
SPARSE = [
    "unstructured",
    "block:4x1",
    "block:1x4",
    "block:4x4",
    "block:8x1",
    "block:2x2",
    "pattern",
    "filter",
    "channel",
    "2:4",
    "1:4",
]


def spec(out, inputs, kernel):
    return LayerSpec("layer", (out, inputs, kernel, kernel), (2, inputs, 6, 6), (1, 1), (kernel // 2, kernel // 2))


def unit_sums(name, array):
    """Sums of a weight-shaped array over the scheme's units, (sets that are ranked apart, units): written without the
    schemes."""
    if name == "pattern":
        return array.sum((2, 3))
    if name == "filter":
        return array.sum((1, 2, 3))[None]
    if name == "channel":
        return array.sum((0, 2, 3))[None]
    rows, columns = map(int, name.partition(":")[2].split("x")) if "x" in name else (1, 1)
    out, inputs, *kernel = array.shape
    return array.reshape(out // rows, rows, inputs // columns, columns, *kernel).sum((1, 3)).reshape(1, -1)


def only_unit(name, layer, mask):
    """Weights of filters that have no more than one unit alive."""
    rows = int(name.partition(":")[2].partition("x")[0]) if "x" in name else 1
    groups = mask.reshape(layer.weight_shape[0] // rows, -1).sum(1)
    return np.repeat(groups <= live_unit_elems(name, layer), rows)[:, None, None, None]


def live_unit_elems(name, layer):
    """Live weights of one unit."""
    return 4 if name == "pattern" else int(unit_sums(name, np.ones(layer.weight_shape))[0, 0])


def test_every_scheme_of_the_package_but_dense_is_tested_below():
    """Those that somebody adds are in contracts/test_plug_ins.py alone, which walks the registry."""
    block = next(node for node in ast.parse(Path(mest.__file__).read_text()).body if isinstance(node, ast.If))
    homes = [node.module for node in block.body if isinstance(node, ast.ImportFrom) and ".schemes." in node.module]
    assert {parse_scheme(name).name for name in SPARSE} == {home.rpartition(".")[2] for home in homes} - {"dense"}


@pytest.mark.parametrize("name", [*SPARSE, "dense"])
def test_a_scheme_is_what_its_text_says(name):
    assert str(parse_scheme(name)) == name and parse_scheme(str(parse_scheme(name))) == parse_scheme(name)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(SPARSE),
    out=st.sampled_from([8, 16, 24]),
    inputs=st.sampled_from([4, 8, 12]),
    kernel=st.sampled_from([1, 3]),
    sparsities=st.lists(st.floats(0.0, 0.99), min_size=2, max_size=2),
    seed=st.integers(0, 1000),
)
def test_mutations_keep_whole_units_the_best_of_them_and_exactly_as_many_as_asked_for(
    name, out, inputs, kernel, sparsities, seed
):
    if name == "pattern":
        kernel, sparsities = 3, [max(sparsity, 5 / 9) for sparsity in sparsities]
    if name[0].isdigit():
        sparsities = [max(sparsity, parse_scheme(name).fixed) for sparsity in sparsities]
    scheme, layer, rng = parse_scheme(name), spec(out, inputs, kernel), np.random.default_rng(seed)
    scheme.check(layer)
    grow_live, prune_live = sorted((scheme.live_units(layer, sparsity) for sparsity in sparsities), reverse=True)
    assert scheme.unit_cells(layer) * scheme.cell_elems(layer) == live_unit_elems(name, layer)
    assert scheme.live_cells(layer, max(sparsities)) == scheme.unit_cells(layer) * prune_live

    def check(keep, live):
        mask = scheme.expand(layer, keep)
        elems = unit_sums(name, mask)
        assert scheme.count(layer, keep) == np.count_nonzero(elems) == live
        assert set(np.unique(elems)) <= {0, live_unit_elems(name, layer)}
        assert len(set(np.count_nonzero(elems, axis=1))) == 1  # sets are balanced
        np.testing.assert_array_equal(scheme.collapse(layer, mask), keep)
        return mask

    def check_best(before, after, importance):
        """No unit that died had more energy than one of its set that stayed, but for the last ones of their filters."""
        energy = unit_sums(name, np.where(before, importance**2, 0.0))
        alive, stayed = unit_sums(name, before) > 0, unit_sums(name, after) > 0
        spare = (
            stayed
            if len(stayed) > 1 or scheme.spans
            else stayed & ~unit_sums(name, after & only_unit(name, layer, after)).astype(bool)
        )
        worst = np.where(spare, energy, np.inf).min(1)
        assert (np.where(alive & ~stayed, energy, -np.inf).max(1) <= worst * (1 + 1e-12)).all()

    weight = rng.standard_normal(layer.weight_shape)
    keep = scheme.start(layer, scheme.energy(layer, weight), grow_live, rng)
    mask = check(keep, grow_live)
    if name != "pattern" and not name[0].isdigit():
        check_best(np.ones(layer.weight_shape, bool), mask, weight)
    for _ in range(2):
        weight = rng.standard_normal(layer.weight_shape)
        pruned = prune_grid(scheme, layer, keep, scheme.energy(layer, weight), prune_live, rng)
        smaller = check(pruned, prune_live)
        assert not (smaller & ~mask).any()
        check_best(mask, smaller, weight)
        keep = grow_grid(scheme, layer, pruned, grow_live, rng)
        mask = check(keep, grow_live)
        grown = unit_sums(name, mask & ~smaller)  # only whole units are new: a live kernel keeps its pattern
        assert not (smaller & ~mask).any() and set(np.unique(grown)) <= {0, live_unit_elems(name, layer)}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("sparsity", [0.75, 0.8, 0.9, 0.95])
def test_a_sparsity_is_converted_to_units_exactly_once(name, sparsity):
    layer, scheme = spec(64, 128, 3), parse_scheme(name)
    share = scheme.live_units(layer, sparsity) * live_unit_elems(name, layer) / layer.weight_elems
    step = live_unit_elems(name, layer) / layer.weight_elems * (64 if name == "pattern" else 1)
    assert abs(share - (1 - sparsity)) <= step / 2 + 1e-12
    assert scheme.live_units(spec(8, 8, 3), 0.9999) == (8 if name == "pattern" else 1)


def test_a_dense_layer_lives_whole_whatever_its_kernels_sides():
    dense = parse_scheme("dense")
    wide = LayerSpec("wide", (8, 12, 3, 5), (2, 12, 6, 6), (1, 1), (1, 2))
    assert dense.live_cells(wide, 0.0) * dense.cell_elems(wide) == 8 * 12 * 3 * 5
    depthwise = LayerSpec("deep", (6, 1, 5, 3), (2, 6, 6, 6), (1, 1), (2, 1), groups=6)
    assert dense.block(depthwise) == (1, 1) and dense.live_units(depthwise, 0.0) == 6 * 15


def test_what_is_offered_in_the_place_of_a_scheme_has_at_most_sixteen_weights_a_block_and_whole_vectors_a_group():
    assert {str(one) for one in parse_scheme("block").variants()} == {
        f"block:{rows}x{columns}"
        for rows, columns in [
            *[(1, 2), (1, 4), (1, 8), (1, 16), (2, 1), (2, 2), (2, 4), (2, 8)],
            *[(4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (16, 1)],
        ]
    }
    assert {str(one) for one in parse_scheme("nm").variants()} == {"2:4", "1:4", "1:2", "4:8", "2:8", "1:8"}


def test_a_block_scores_the_norm_of_its_four_weights():
    importance = np.zeros(CONV.weight_shape)
    importance[4:8, 2, 1, 0] = [1, 2, 2, 4]
    energy = parse_scheme("block:4x1").energy(CONV, importance)
    assert energy[1, 2, 1, 0] == 5**2 and np.count_nonzero(energy) == 1


def test_the_eight_patterns_are_two_pairs_in_rows_with_the_centre_and_stay_a_set_when_mirrored():
    codes = {tuple(pattern.ravel()) for pattern in PATTERNS}
    assert len(codes) == 8 and PATTERNS.shape == (8, 3, 3)
    assert (PATTERNS.sum((1, 2)) == 4).all() and PATTERNS[:, 1, 1].all()
    assert {tuple(row) for row in PATTERNS.reshape(-1, 3)} == {(1, 1, 0), (0, 1, 1), (0, 0, 0)}
    for mirrored in (PATTERNS[:, ::-1], PATTERNS[:, :, ::-1]):
        assert {tuple(pattern.ravel()) for pattern in mirrored} == codes


def test_a_kernel_starts_with_the_pattern_that_keeps_most_and_a_filter_with_its_largest_kernels():
    scheme, weight = parse_scheme("pattern"), np.random.default_rng(0).standard_normal(CONV.weight_shape)
    live = scheme.live_units(CONV, 0.8)
    keep = scheme.start(CONV, scheme.energy(CONV, weight), live, np.random.default_rng(0))
    kept = np.array(
        [[[np.sum(weight[o, i][pattern] ** 2) for pattern in PATTERNS] for i in range(12)] for o in range(8)]
    )
    for o in range(8):
        alive = keep[o].any((1, 2))
        assert set(np.flatnonzero(alive)) == set(np.argsort(-kept[o].max(1))[: live // 8])
        for i in np.flatnonzero(alive):
            np.testing.assert_array_equal(keep[o, i], PATTERNS[kept[o, i].argmax()])


def test_grown_kernels_are_drawn_evenly_and_so_are_their_patterns():
    scheme, layer, rng = parse_scheme("pattern"), spec(400, 5, 3), np.random.default_rng(5)
    keep = np.zeros(scheme.grid(layer), bool)
    keep[:, 0] = PATTERNS[3]
    grown = grow_grid(scheme, layer, keep, 800, rng)
    assert np.array_equal(grown[:, 0], keep[:, 0])
    places = grown[:, 1:].any((2, 3)).sum(0)
    patterns = np.array([(grown[:, 1:] == pattern).all((2, 3)).sum() for pattern in PATTERNS])
    for counts in (places, patterns):  # binomial: five standard deviations
        share = 1 / len(counts)
        assert counts.sum() == 400 and (abs(counts - 400 * share) < 5 * np.sqrt(400 * share * (1 - share))).all()


def test_channels_share_loads_as_far_as_they_go_into_fours_or_pairs():
    assert [loads_shared(channels) for channels in (3, 6, 8)] == [1, 2, 4]


def test_an_energy_that_is_not_one_a_cell_is_refused():
    with pytest.raises(InputError, match="one energy a cell"):
        parse_scheme("unstructured").prune(CONV, np.arange(9, dtype=np.int32), np.ones(8), 4, np.random.default_rng(0))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.55])
def test_pattern_refuses_a_sparsity_that_would_leave_more_than_four_of_nine(sparsity):
    with pytest.raises(SparsityError, match="starts at 1 - 4/9 = 0.556"):
        parse_scheme("pattern").live_units(CONV, sparsity)
    assert parse_scheme("pattern").live_units(CONV, 5 / 9) == 8 * 12


def test_pattern_refuses_a_layer_that_is_not_3x3_by_name():
    with pytest.raises(
        SparsityError,
        match="layer: scheme pattern is for 3x3 kernels, the layer's are 1x1; .* the layer in dense_layers",
    ):
        parse_scheme("pattern").check(spec(8, 8, 1))


def test_pattern_refuses_a_number_of_kernels_that_filters_cannot_share():
    scheme = parse_scheme("pattern")
    keep = scheme.start(CONV, scheme.energy(CONV, np.ones(CONV.weight_shape)), 16, np.random.default_rng(0))
    with pytest.raises(SparsityError, match="17 kernels cannot be shared evenly by 8 filters"):
        grow_grid(scheme, CONV, keep, 17, np.random.default_rng(0))


def test_a_block_that_does_not_divide_the_layer_is_refused():
    with pytest.raises(SparsityError, match="multiples of 4 output"):
        parse_scheme("block").check(LayerSpec("fc", (10, 12, 1, 1), (2, 12, 1, 1)))


def change(where, value):
    def changed(mask):
        mask[where] = value
        return mask

    return changed


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("block", change((1, 0, 0, 0), False), "whole units of scheme block:4x1"),
        ("filter", change((1, 0, 0, 0), False), "whole units of scheme filter"),
        ("filter", change((slice(None), 4), False), "whole units of scheme filter"),
        ("channel", change((0, 1, 2, 2), False), "whole units of scheme channel"),
        ("channel", change(slice(0, 4), False), "whole units of scheme channel"),
        ("pattern", change((2, 3, 0, 0), False), r"1 of 96 kernels with none of the eight .*, kernel \(2, 3\) first"),
        ("pattern", change((2, 3), True), r"1 of 96 kernels with none of the eight .*, kernel \(2, 3\) first"),
        ("pattern", change((2, 3), False), "filters that keep 11 to 12 kernels"),
        *[(name, change(..., False), "no live weight") for name in SPARSE],
        *[(name, lambda mask: mask[:4], "the mask has shape") for name in SPARSE],
    ],
)
def test_a_mask_that_a_scheme_cannot_have_is_refused(name, spoil, message):
    mask = np.ones(CONV.weight_shape, bool)
    if name == "pattern":
        mask[:] = PATTERNS[0]
    if name[0].isdigit():
        mask[:, np.arange(12) % 4 > 0] = False
    parse_scheme(name).collapse(CONV, mask)
    with pytest.raises(StateError, match=message) as caught:
        parse_scheme(name).collapse(CONV, spoil(mask))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("blok", UnknownName),
        ("block:4", UsageError),
        ("block:0x1", UsageError),
        ("unstructured:3", UsageError),
        ("pattern:4", UsageError),
    ],
)
def test_a_scheme_that_does_not_exist_is_refused(text, error):
    with pytest.raises(error):
        parse_scheme(text)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.2])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(SparsityError, match="0 <= sparsity < 1"):
        distribute("uniform", [CONV], sparsity)


def test_erk_meets_the_overall_sparsity_and_spares_small_layers():
    layers = [
        LayerSpec(f"l{i}", shape, (1, shape[1], 9, 9))
        for i, shape in enumerate([(16, 16, 3, 3), (64, 64, 3, 3), (4, 4, 1, 1)])
    ]
    share = distribute("erk", layers, 0.8)
    live = sum((1 - share[layer.name]) * layer.weight_elems for layer in layers)
    assert live == pytest.approx(0.2 * sum(layer.weight_elems for layer in layers))
    assert share["l2"] == 0.0 and share["l0"] < share["l1"]


@pytest.mark.parametrize("live", [(980, 700, 420), (2048, 1750, 1050)])
def test_erk_counts_the_kernels_sides_as_well_as_the_channels(live):
    """Live weights in proportion to out + in + kh + kw, by hand: 98, 70 and 42. Ten of each; 25 are more than "one"
    has."""
    shapes = {"one": (64, 32, 1, 1), "three": (32, 32, 3, 3), "five": (16, 16, 5, 5)}
    elems = {"one": 2048, "three": 9216, "five": 6400}
    layers = [LayerSpec(name, shape, (1, shape[1], 9, 9)) for name, shape in shapes.items()]
    share = distribute("erk", layers, 1 - sum(live) / 17664)
    assert {name: (1 - share[name]) * elems[name] for name in shapes} == pytest.approx(
        dict(zip(shapes, live, strict=True))
    )


def test_uniform_gives_every_layer_the_same():
    assert distribute("uniform", [CONV], 0.9) == {"conv": 0.9}
    assert distribute("uniform", [CONV], 0.0) == {"conv": 0.0}
    with pytest.raises(UnknownName, match="erk, uniform"):
        distribute("magic", [CONV], 0.9)
