"""A step whose memory is planned for its densest phase: what mutations keep, whatever the scheme, and what they are
refused."""

import tracemalloc

import numpy as np
import pytest
import torch
from masks import assert_starts, survivors
from test_schemes_step import Small
from test_sparsity import live_unit_elems, unit_sums
from test_step import make_batches

import mest_compile as mest
from mest_compile.base.errors import BudgetError, CapacityError, UsageError
from mest_compile.models.catalog import build_model
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.operators.layers.values import cells_of
from mest_compile.sparsity.mutation import Phase
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe

SHAPE, START, DENSEST = (8, 3, 8, 8), 0.8, 0.65
SCHEMES = ["unstructured", "block:4x1", "block:2x2", "pattern", "filter", "channel"]


def make(scheme, **options):
    torch.manual_seed(5)
    dense = None if scheme == "pattern" else ["conv1", "fc"]
    return mest.compile(
        Small(8),
        SHAPE,
        scheme=scheme,
        **{"sparsity": START, "dense_layers": dense, "threads": 1, "grow_to": DENSEST, **options},
    )


def state_of(step):
    """(weights, momentum, masks), copies."""
    return (
        {name: value.copy() for name, value in step.state_dict().items()},
        step._state.collect(":momentum"),
        step.masks(),
    )


def assert_same(one, other):
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name], name)


def conv(weight):
    return weight.reshape(*weight.shape, *(1,) * (4 - weight.ndim))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_whatever_phases_come_units_are_exact_legal_within_capacity_and_only_survivors_keep_their_state(scheme):
    step, batches = make(scheme), make_batches(SHAPE, 10, 8)
    rng = np.random.default_rng(seed := np.random.SeedSequence().entropy % 2**32)
    print("seed", seed)
    planned, units = step.memory(at_capacity=True), None
    for batch in batches:
        step(*batch, lr=0.002)
        filled = {
            name: rng.standard_normal(mask.shape).astype(np.float32) * mask for name, mask in step.masks().items()
        }
        step.load_state_dict(step.state_dict() | filled)  # no live weight is 0, so that what stays can be told
        weights, momentum, masks = state_of(step)
        grow_to, prune_to = sorted(rng.uniform(DENSEST, 0.95, 2))
        grow_to = DENSEST if rng.random() < 0.3 else grow_to
        step.mutate(prune_to, grow_to, importance_lambda=rng.choice([0.0, 0.5]), rng=rng)
        after, moved, grown = state_of(step)
        units, stay = {}, survivors(weights, masks, after, grown)
        for name, mask in grown.items():
            layer = step.layers[name]
            elems, before = unit_sums(scheme, conv(mask)), unit_sums(scheme, conv(masks[name]))
            units[name] = np.count_nonzero(elems)
            wanted = [layer.scheme.live_units(layer.spec, sparsity) for sparsity in (prune_to, grow_to)]
            stayed = unit_sums(scheme, conv(stay[name])) > 0
            assert units[name] == wanted[1] <= layer.capacity, name
            assert np.count_nonzero(stayed) == min(wanted[0], np.count_nonzero(before)), name
            assert set(np.unique(elems)) == {0, live_unit_elems(scheme, layer.spec)}, name
            layer.scheme.collapse(layer.spec, conv(mask))  # patterns are of the eight, filters balanced
            assert_starts(after[name], mask, stay[name])
            np.testing.assert_array_equal(moved[name], np.where(stay[name], momentum[name], 0))
            assert not after[name][~mask].any(), name
        for name in weights.keys() - grown.keys():  # biases, batch_norm, dense layers
            np.testing.assert_array_equal(after[name], weights[name])
        for name in momentum.keys() - grown.keys():
            np.testing.assert_array_equal(moved[name], momentum[name])
        assert all(step.memory()[kind] <= planned[kind] == size for kind, size in step.memory(at_capacity=True).items())
    assert {name.rpartition(".")[2] for name in grown} == {"weight"} and not {
        "conv1.weight",
        "fc.weight",
        "bn1.weight",
    } & grown.keys()
    step.mutate(0.9, DENSEST, rng=rng)
    assert step.memory() == planned


def denser(layer, weight, sparsity):
    """A mask of the layer that is legal and of another sparsity than its step's."""
    scheme, spec = layer.scheme, layer.spec
    keep = scheme.start(
        spec, scheme.energy(spec, conv(weight)), scheme.live_units(spec, sparsity), np.random.default_rng(0)
    )
    return scheme.expand(spec, keep).reshape(weight.shape)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_has_no_room_is_refused_and_changes_nothing(scheme):
    step = make(scheme)
    step(*make_batches(SHAPE, 10, 1)[0], lr=0.01)
    before = state_of(step)
    with pytest.raises(
        CapacityError,
        match=r"conv\d.weight: \d+ units live at a sparsity of 0.57, but memory is planned for \d+; compile",
    ):
        step.mutate(0.8, 0.57, rng=np.random.default_rng(0))
    other = {name: denser(step.layers[name], before[0][name], 0.57) for name in step.masks()}
    with pytest.raises(CapacityError, match="compile the step with grow_to="):
        step.set_masks(other)
    with pytest.raises(CapacityError, match="grow_to=0.57"):
        Trainer(step, Recipe(4, "em_s", phases=(Phase(4, 0.8, 0.57),)))
    assert_same(state_of(step), before)


def test_a_checkpoint_keeps_the_capacity(tmp_path):
    step = make("block:4x1")
    step.save(tmp_path / "a.safetensors")
    loaded = mest.load(tmp_path / "a.safetensors")
    assert loaded.memory(at_capacity=True) == step.memory(at_capacity=True) != step.memory()
    with pytest.raises(CapacityError):
        loaded.mutate(0.8, 0.6)


def test_without_a_bound_a_step_grows_as_it_likes():
    step = make("unstructured", grow_to=None)
    assert step.memory(at_capacity=True) == step.memory()
    step.mutate(0.8, 0.1)
    assert step.sparsity()["conv2.weight"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("scheme", ["unstructured", "filter"])
def test_a_budget_holds_in_the_densest_phase(scheme):
    plain = make(scheme)
    needs = plain.memory(at_capacity=True)["total"]
    assert needs > plain.memory()["total"]
    just = make(scheme, memory_budget=needs)
    usual = plain.describe()["recomputed"]
    assert just.describe()["recomputed"] == usual and just.memory(at_capacity=True)["total"] == needs
    assert len(make(scheme, memory_budget=needs - 1).describe()["recomputed"]) > len(usual)
    lean = make(scheme, memory_budget=int(0.9 * needs), lower_density=True)
    raised = lean.describe()["sparsity"]["conv2.weight"]
    assert lean.memory(at_capacity=True)["total"] <= 0.9 * needs and raised > START
    lean.mutate(raised, round(raised - (START - DENSEST), 6))
    assert lean.memory() == lean.memory(at_capacity=True)
    with pytest.raises(BudgetError, match="the step, 0.15 denser than it starts, needs at least"):
        make(scheme, memory_budget=needs // 4)
    with pytest.raises(CapacityError):  # a budget without grow_to holds for the sparsity asked for
        make(scheme, memory_budget=10**9, grow_to=None).mutate(START, 0.7)


@pytest.mark.parametrize(
    ("grow_to", "message"), [(0.9, "at most the model's 0.8"), (-0.1, "wanted a finite number of 0 or more")]
)
def test_a_capacity_that_is_none_is_refused(grow_to, message):
    with pytest.raises(UsageError, match=message):
        make("unstructured", grow_to=grow_to)


@pytest.mark.parametrize("scheme", ["filter", "channel", "unstructured"])
def test_what_a_layer_keeps_for_the_next_mutation_is_counted(scheme):
    step = mest.compile(build_model("resnet20", SHAPE, 10, 32), SHAPE, scheme=scheme, sparsity=0.5, threads=1)
    name = next(name for name in step.masks() if name.startswith("layer3.2"))
    layer = step._compiled.layers[name]
    family = FAMILIES.find(layer.kernels)
    index, cells = family.indexer(layer, step._compiled.train), cells_of(step._state.keep(name))
    tracemalloc.start()
    found = index(cells)
    held, places = len(found.sort), found.places
    del found
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    said = family.kept_bytes(layer, held) - 4 * held  # the mask itself is the step's
    assert places.nbytes <= said <= kept <= 1.02 * said + 8192 and (said > 4 * held) == (scheme != "unstructured")
