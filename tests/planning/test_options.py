"""What a step is compiled with is said once and passed on whole."""

import inspect
import json
from dataclasses import MISSING, fields, replace

import pytest

import mest_compile as mest
from mest_compile.base.errors import SparsityError, TargetError, UsageError
from mest_compile.hardware.target import find_target
from mest_compile.options import StepOptions
from mest_compile.training.recipe import Recipe

SAID = StepOptions(
    scheme="block:8x1",
    sparsity={"fc1": 0.5},
    dense_layers=["fc2"],
    optimizer=mest.AdamW(lr=0.01, betas=(0.8, 0.9)),
    target="cortex-a76",
    threads=3,
    seed=5,
    loss=mest.MSE(),
    memory_budget=10**9,
    lower_density=True,
    grow_to=0.25,
    activations="float16" if find_target("cortex-a76").float16 else "float32",
    trainable=["head.*", "last:2"],
)
BESIDE = {"model", "input_shape", "label_smoothing", "device", "builder", "records", "data"}


def test_compile_takes_every_option_and_has_the_same_defaults():
    taken = {name: one.default for name, one in inspect.signature(mest.compile).parameters.items()}
    assert taken.keys() - BESIDE == {one.name for one in fields(StepOptions)}
    defaults = {one.name: one.default if one.default is not MISSING else one.default_factory() for one in fields(SAID)}
    said = {**taken, "optimizer": mest.SGD(), "loss": mest.CrossEntropy()}
    assert StepOptions(**{name: said[name] for name in defaults}) == StepOptions(**defaults) == StepOptions()


def test_every_option_of_compile_arrives(monkeypatch):
    from mest_compile import compiling

    arrived = []
    monkeypatch.setattr(compiling, "compile_step", lambda model, shape, options, *_: arrived.append(options))
    given = {one.name: getattr(SAID, one.name) for one in fields(SAID)}
    mest.compile("mlp", (8, 4), **given)
    mest.compile("mlp", (8, 4), label_smoothing=0.1)
    mest.compile("mlp", (8, 4), update_budget="2KiB")
    assert arrived == [SAID, StepOptions(loss=mest.CrossEntropy(0.1)), StepOptions(update_budget=2048)]


def test_options_are_what_they_were_behind_a_file():
    assert StepOptions.from_json(json.loads(json.dumps(SAID.to_json()))) == SAID
    assert StepOptions.from_json({}) == StepOptions()
    with pytest.raises(UsageError, match="write it into a TOML file"):
        StepOptions(target=find_target("mali")).to_json()
    with pytest.raises(TypeError, match="momentum"):
        StepOptions.from_json({"momentum": 0.9})


def test_a_caller_who_goes_on_with_a_mapping_or_a_list_changes_nothing():
    sparsity, dense = {"fc1": 0.5}, ["fc2"]
    options = StepOptions(sparsity=sparsity, dense_layers=dense)
    sparsity["fc1"], dense[0] = 0.9, "fc3"
    assert options.sparsity == {"fc1": 0.5} and options.dense_layers == ("fc2",)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scheme": "dense", "sparsity": 0.9}, SparsityError, "scheme dense has sparsity 0, not 0.9"),
        ({"activations": "float16", "target": "armv7"}, TargetError, "has no instructions that turn float16"),
        ({"lower_density": True}, UsageError, "give one, or leave lower_density out"),
        ({"threads": 0}, UsageError, "or None for all cores"),
    ],
)
def test_what_does_not_go_together_is_refused_when_it_is_said(options, error, said):
    with pytest.raises(error, match=said):
        StepOptions(**options)


def test_a_dense_step_has_all_else_of_a_sparse_one():
    dense = SAID.dense()
    assert dense == replace(SAID, scheme="dense", sparsity=0.0, grow_to=None)


def test_a_recipe_decides_its_part_of_the_options_and_leaves_the_rest():
    recipe = Recipe(epochs=10, method="em_s", lr=0.3, seed=7, label_smoothing=0.1)
    options = recipe.step_options(StepOptions(optimizer=mest.SGD(momentum=0.5), threads=2, sparsity=0.8))
    assert options == StepOptions(
        sparsity=0.8,
        optimizer=mest.SGD(0.3, momentum=0.5),
        threads=2,
        seed=7,
        loss=mest.CrossEntropy(0.1),
        grow_to=recipe.densest(0.8),
    )
    assert options.grow_to == 0.75
    layered = Recipe(epochs=10).step_options(StepOptions(sparsity={"fc1": 0.5}, grow_to=0.25))
    assert (layered.grow_to, layered.optimizer) == (0.25, mest.SGD())
