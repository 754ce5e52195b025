"""Gradual pruning: a dense model, pruned while it trains until it is as sparse as one that was compiled so."""

import itertools

import numpy as np
import pytest
import torch

import mest_compile as mest
from mest_compile.base.errors import BudgetError, SparsityError, UsageError
from mest_compile.models.catalog import build_model
from mest_compile.sparsity.mutation import Phase
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe

SHAPE = (16, 1, 6, 6)
SPARSE = ("fc1.weight", "fc2.weight")


def net():
    return build_model("mlp", SHAPE, 10, 24, seed=3)


@pytest.fixture
def compiled(builder):
    def compile(**options):
        said = {"scheme": "unstructured", "sparsity": 0.9, "threads": 1, "dense_start": True} | options
        return mest.compile(net(), SHAPE, builder=builder, **said)

    return compile


def phases(epochs=10, sparsity=0.9, **options):
    return Recipe(epochs, "gradual", **options).resolved(sparsity, 0.1).phases


def data(count=64):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    images = rng.standard_normal((10, *SHAPE[1:]))[labels] + rng.standard_normal((count, *SHAPE[1:]))
    return images.astype(np.float32), labels


def test_the_schedule_is_zhu_and_guptas():
    for begin, end in ((0.0, 0.75), (0.2, 0.6)):
        found = phases(40, 0.8, mutate_every=2, prune_begin=begin, prune_end=end)
        first, last = 40 * begin, 40 * end
        for before, phase in itertools.pairwise(found):
            assert phase.prune_to == phase.grow_to
            t = (before.until_epoch - first) / (last - first)
            assert phase.prune_to == pytest.approx(0.8 + (0.0 - 0.8) * (1 - t) ** 3, abs=1e-6)
        assert (found[0].prune_to, found[-1].prune_to, found[-2].until_epoch) == (0, 0.8, last)
        assert found[0].until_epoch == (2 if begin == 0 else 10)
        assert [phase.prune_to for phase in found] == sorted({phase.prune_to for phase in found})


@pytest.mark.parametrize("epochs", [2, 3, 4, 7, 30])
def test_it_ends_at_the_sparsity_whatever_there_are_epochs_and_trains_there_at_last(epochs):
    found = phases(epochs)
    assert found[-1].prune_to == 0.9 and found[-1].until_epoch == epochs
    assert epochs - found[-2].until_epoch >= max(1, epochs // 5)
    assert [round(phases(epochs, prune_end=1.0 - 1e-9)[-2].until_epoch)] == [epochs - 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 1}, UsageError, "'gradual' prunes between epochs, and there is 1"),
        ({"prune_begin": 0.8}, UsageError, "prune_begin must be below prune_end, not 0.8 and 0.75"),
        ({"prune_end": 1.0}, UsageError, "prune_end is 1.0; wanted a finite number of 0 or more and below 1"),
        ({"method": "em", "prune_end": 0.5}, UsageError, "prune_end is of the method 'gradual', not of 'em'"),
        ({"phases": (Phase(9, 0.9, 0.8),)}, UsageError, "grows nothing: prune_to and grow_to"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Recipe(**{"epochs": 9, "method": "gradual", **options})


def test_a_recipe_asks_for_a_dense_start_and_its_room():
    from mest_compile.options import StepOptions

    recipe = Recipe(9, "gradual")
    for sparsity in (0.9, {"fc1": 0.5}):
        options = recipe.step_options(StepOptions("unstructured", sparsity))
        assert options.dense_start and options.grow_to is None and options.sparsity == sparsity
    with pytest.raises(UsageError, match="and dense_start, as the method gradual needs it, would have others"):
        recipe.step_options(StepOptions("unstructured", "as-given"))
    assert recipe.densest(0.9) == 0 and Recipe.from_dict(recipe.to_dict()) == recipe


def test_all_weights_live_at_first_and_compute_what_torch_does(compiled):
    model, step = net(), compiled(dense_layers=[])
    assert step.sparsity() == dict.fromkeys(step.masks(), 0.0) and len(step.masks()) == 3
    for name, array in step.state_dict().items():
        np.testing.assert_array_equal(array, model.state_dict()[name])
    images = data(16)[0]
    wanted = model.eval()(torch.from_numpy(images)).detach()
    np.testing.assert_allclose(step.predict(images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["unstructured", "block:4x1", "filter", "channel"])
def test_the_least_important_units_die_and_the_end_is_that_of_a_step_compiled_so(compiled, scheme):
    step = compiled(scheme=scheme, distribution="erk", sparsity=0.7)
    wanted = {
        name: int(mask.sum())
        for name, mask in compiled(scheme=scheme, distribution="erk", sparsity=0.7, dense_start=False).masks().items()
    }
    target, before = step.describe()["sparsity"], step.masks()
    for to in (0.0, 0.3, 0.5, 0.7):
        weights = step.state_dict()
        report = step.prune(to)
        after = step.masks()
        for name, mask in after.items():
            assert not (mask & ~before[name]).any()
            np.testing.assert_array_equal(step.state_dict()[name], weights[name] * mask)
            if scheme == "unstructured" and (before[name] & ~mask).any():
                lone = mask.sum(1, keepdims=True) == 1  # no row loses its last weight
                assert abs(weights[name])[before[name] & ~mask].max() <= abs(weights[name])[mask & ~lone].min()
            unit = {"block:4x1": 4, "filter": mask.shape[1], "channel": mask.shape[0]}.get(scheme, 1)
            assert abs((~mask).sum() - mask.size * target[name] * to / 0.7) <= unit / 2 + 1e-6
        assert set(report.layers.values()) == ({"unchanged"} if to == 0 else {"re-indexed"})
        before = after
    assert {name: int(mask.sum()) for name, mask in before.items()} == wanted
    assert set(step.prune(0.7).layers.values()) == {"unchanged"} == set(step.prune(0.4).layers.values())
    with pytest.raises(UsageError, match=r"cannot prune to 0\.8: the sparse layers are to have 0\.7"):
        step.prune(0.8)


def test_importance_counts_gradients_and_the_generator_chooses_between_equals(compiled):
    images, labels = data(16)
    masks = []
    for importance in (0.0, 1e6):
        step = compiled()
        step(images, labels, lr=0)
        gradient = step.gradients(images, labels)["fc1.weight"]
        step.prune(0.9, importance_lambda=importance)
        masks.append(step.masks()["fc1.weight"])
    live = round(0.1 * masks[0].size)
    assert (masks[0] != masks[1]).any()
    largest = np.sort(abs(gradient).ravel())[-live]
    assert (abs(gradient) >= largest)[masks[1]].mean() > 0.8  # but for the last weights of rows
    with pytest.raises(UsageError, match="rng is 3; wanted"):
        step.prune(0.9, rng=3)


def test_frozen_layers_begin_as_sparse_as_they_are_to_be(compiled):
    step = compiled(trainable="fc2.*,fc3.*")
    assert step.sparsity()["fc1.weight"] == pytest.approx(0.9, abs=1e-3) and step.sparsity()["fc2.weight"] == 0
    frozen = step.masks()["fc1.weight"]
    step.prune(0.9)
    np.testing.assert_array_equal(step.masks()["fc1.weight"], frozen)
    assert step.sparsity()["fc2.weight"] == pytest.approx(0.9, abs=1e-3)


def test_memory_is_planned_for_all_weights(compiled):
    step = compiled()
    assert step.memory(at_capacity=True) == step.memory()
    need = step.memory()["total"]
    step.prune(0.9)
    assert step.memory()["total"] < step.memory(at_capacity=True)["total"] == need
    with pytest.raises(BudgetError, match=f"the step needs at least {need}"):
        compiled(memory_budget=need - 1)
    compiled(memory_budget=need)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grow_to": 0.5}, UsageError, "dense_start has room for all weights, which grow_to would change"),
        ({"lower_density": True, "memory_budget": 10**9}, UsageError, "which lower_density would change"),
        ({"dense_start": 1}, UsageError, "dense_start is 1; wanted True or False"),
        (
            {"scheme": "2:4", "sparsity": None, "dense_layers": ["fc3"]},
            SparsityError,
            "fc1.weight: under scheme 2:4 not all",
        ),
    ],
)
def test_options_that_do_not_go_with_a_dense_start_are_refused(compiled, options, error, message):
    with pytest.raises(error, match=message):
        compiled(**options)


def test_a_run_prunes_as_it_trains_and_resumes_bit_for_bit(compiled, tmp_path, builder):
    recipe = Recipe(5, "gradual", lr=0.05, augment=False, drop_last=True)
    whole = Trainer(compiled(), recipe, tmp_path / "whole")
    run = whole.fit(data(), data())
    reached = [epoch["overall_sparsity"] for epoch in run.history]
    assert reached == pytest.approx(
        [0, *(recipe.resolved(0.9).mutation_at(epoch).prune_to for epoch in range(1, 5))], abs=2e-3
    )
    assert run.best["epoch"] > run.recipe.phases[-2].until_epoch  # models on the way are no result
    assert run.history[-1]["survival"]["fc1.weight"] == pytest.approx(0.1, abs=1e-3)
    assert run.history[-1]["loss"] < run.history[0]["loss"]

    class Stopped(Exception):
        pass

    begun = Trainer(compiled(), recipe, tmp_path / "begun")
    keep = begun._keep

    def stop(run, *others):
        keep(run, *others)
        if len(run.history) == 2:
            raise Stopped

    begun._keep = stop
    with pytest.raises(Stopped):
        begun.fit(data(), data())
    resumed = Trainer.resume(tmp_path / "begun")
    assert not resumed._idle
    resumed.fit(data(), data())
    for name, array in whole.step.state_dict().items():
        np.testing.assert_array_equal(array, resumed.step.state_dict()[name])
    longer = Trainer.resume(tmp_path / "begun", epochs=6)
    assert longer.fit(data(), data()).history[-1]["overall_sparsity"] == reached[-1]


def test_a_run_that_is_to_begin_dense_says_when_it_does_not(compiled):
    with pytest.raises(
        UsageError, match="begins with all weights, and fc1.weight has dead ones; compile the step with d"
    ):
        Trainer(compiled(dense_start=False), Recipe(4, "gradual")).fit(data(), data())
    with pytest.raises(SparsityError, match=r"the last phase prunes to 0\.8, the model is to have 0\.9"):
        Trainer(compiled(), Recipe(4, "gradual", phases=(Phase(4, 0.8, 0.8),)))
