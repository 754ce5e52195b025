"""Optimizers: what each declares, and steps that are compiled with one: state, count of updates, checkpoints,
artifacts, refusals."""

import hashlib
import inspect

import numpy as np
import pytest
import torch
from masks import survivors
from test_schemes_step import MaskedTorch, Small
from test_step import assert_like_torch, make_batches

import mest_compile as mest
from mest_compile.base.errors import SpecError, StateError, UsageError
from mest_compile.hardware.target import find_target
from mest_compile.kernels.source import kernel_source
from mest_compile.operators.optimizers.optimizer import OPTIMIZERS, CopyValues, Update, UpdateUnits, read_optimizer

SHAPE = (8, 3, 8, 8)
# eps is large: what rounding leaves of a gradient that is 0 would make whole steps.
CALM = mest.AdamW(lr=0.002, betas=(0.9, 0.99), eps=1e-4)
every = pytest.mark.parametrize("kind", [OPTIMIZERS.find(name) for name in OPTIMIZERS.names()])


def compiled(optimizer, scheme="block", **options):
    torch.manual_seed(3)
    model = Small(8)
    return mest.compile(
        model, SHAPE, scheme=scheme, **{"sparsity": 0.75, "optimizer": optimizer, "threads": 1, **options}
    ), model


def assert_same_state(one, other):
    for name in one._state.own():
        np.testing.assert_array_equal(one._state.get(name), other._state.get(name), err_msg=name)


# What each declares.


@every
def test_an_optimizer_is_whole(kind):
    rule = kind()
    assert OPTIMIZERS.find(rule.name) is kind and getattr(mest, kind.__name__) is kind and inspect.getdoc(kind)
    known = {"values", "gradients", *kind.state, *kind.scalars}
    assert known <= frozenset().union(*(expression.variables for expression in kind.formula.values()))
    for name, expression in kind.formula.items():
        assert expression.variables <= known, name
        known.add(name)
    assert set(kind.state) < kind.formula.keys() and list(kind.formula)[-1] == "values"
    for count in (1, 10**7):
        hyper = rule.hyper(count, rule.lr)
        assert hyper.dtype == np.float32 and hyper.shape == (len(kind.scalars),) and np.isfinite(hyper).all()


@every
def test_an_optimizer_is_read_as_it_was_written(kind):
    rule = kind(lr=0.25)
    assert read_optimizer(rule.to_json()) == rule != kind()


def test_a_document_without_a_name_is_of_sgd():
    assert read_optimizer({"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}) == mest.SGD(
        0.5, 0.0, 0.0
    )


@pytest.mark.parametrize(("target", "digest"), [("arm_cpu", "3fbfcb8fded4e669"), ("opencl", "e2939fa0e025d105")])
def test_the_text_of_sgds_kernels_is_what_it_was(target, digest):
    problems = [
        ("optimizer.update", Update("sgd")),
        *(("optimizer.update_units", UpdateUnits("sgd", *sizes)) for sizes in ((1, 1), (1, 4), (2, 3))),
        ("optimizer.copy", CopyValues()),
    ]
    texts = [kernel_source(*problem, find_target(target)).text for problem in problems]
    assert hashlib.sha256("".join(texts).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, "betas is 0.9; wanted two numbers"),
        ({"betas": (0.9,)}, "betas is"),
        ({"betas": "ab"}, "betas is 'ab'"),
        ({"betas": (0.9, 1)}, r"betas\[1\] is 1; wanted"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] is"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"lr": "a"}, "lr is 'a'"),
        ({"weight_decay": -1}, "weight_decay is -1"),
    ],
)
def test_what_adamw_cannot_take_is_named(options, message):
    with pytest.raises(SpecError, match=message):
        mest.AdamW(**options)


def test_a_refusal_names_the_optimizers_that_there_are():
    with pytest.raises(
        UsageError,
        match=r"mest.AdamW\(lr, betas, eps, weight_decay\), mest.SGD\(lr, momentum, weight_decay, nesterov\)",
    ):
        compiled(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))


# Steps.


@pytest.mark.parametrize(("scheme", "sparsity"), [("unstructured", 0.75), ("block", 0.75), ("dense", 0.0)])
def test_ten_steps_of_adamw_equal_masked_torch(scheme, sparsity):
    step, model = compiled(CALM, scheme, sparsity=sparsity)
    twin, batches = MaskedTorch(model, step.masks(), CALM), make_batches(SHAPE, 10, 10)
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches], [twin.step(*batch) for batch in batches], rtol=1e-4
    )
    assert_like_torch(step, model, batches[0][0])
    live = sum(np.count_nonzero(mask) for mask in step.masks().values())
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in step.masks())
    assert (
        step.memory()["optimizer"]
        == 8 * (live + dense)
        == 2 * compiled(mest.SGD(), scheme, sparsity=sparsity)[0].memory()["optimizer"]
    )
    assert step.describe()["optimizer"] == {
        "name": "adamw",
        "lr": 0.002,
        "betas": [0.9, 0.99],
        "eps": 1e-4,
        "weight_decay": 0.01,
    }


def test_states_are_carried_over_a_mutation_and_begin_at_zero():
    step, _ = compiled(mest.AdamW())
    for batch in make_batches(SHAPE, 10, 3):
        step(*batch)
    masks, weights = step.masks(), step.state_dict()
    before = [step._state.collect(f":{state}") for state in step.optimizer.state]
    step.mutate(prune_to=0.85, grow_to=0.65)
    stay = survivors(weights, masks, step.state_dict(), step.masks())
    for state, old in zip(step.optimizer.state, before, strict=True):
        new = step._state.collect(f":{state}")
        for name, stayed in stay.items():
            np.testing.assert_array_equal(new[name], np.where(stayed, old[name], 0))
            assert np.count_nonzero(new[name]) < np.count_nonzero(step.masks()[name])
        np.testing.assert_array_equal(new["fc.weight"], old["fc.weight"])


@pytest.mark.parametrize("kind", [mest.SGD, mest.AdamW])
def test_a_checkpoint_and_an_artifact_go_on_with_state_and_count_bit_for_bit(kind, tmp_path):
    step, _ = compiled(kind())
    batches = make_batches(SHAPE, 10, 5)
    for batch in batches[:3]:
        step(*batch)
    step.mutate(prune_to=0.85, grow_to=0.65)
    step.save(tmp_path / "a.safetensors")
    step.export(tmp_path / "artifact")
    fresh, _ = compiled(kind())
    fresh(*batches[0])  # its count is another one
    fresh.restore(tmp_path / "a.safetensors")
    others = [fresh, mest.load(tmp_path / "a.safetensors"), mest.open_artifact(tmp_path / "artifact")]
    for batch in batches[3:]:
        losses = [one(*batch).loss for one in (step, *others)]
        assert losses == losses[:1] * 4
    for other in others:
        assert_same_state(step, other)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    step, other = compiled(mest.AdamW())[0], compiled(mest.SGD())[0]
    step.save(tmp_path / "a.safetensors")
    with pytest.raises(StateError, match="is of optimizer 'adamw', the step has 'sgd'; load it with mest.load"):
        other.restore(tmp_path / "a.safetensors")


def test_a_memory_budget_counts_the_optimizers_state():
    shape, model = (2, 1, 4, 4), "mlp"
    least = mest.compile(model, shape, optimizer=mest.SGD()).memory(at_capacity=True)["total"]
    mest.compile(model, shape, optimizer=mest.SGD(), memory_budget=least)
    with pytest.raises(mest.MestError, match="memory_budget"):
        mest.compile(model, shape, optimizer=mest.AdamW(), memory_budget=least)


def test_profiling_leaves_state_and_count_as_they_were():
    step, twin = (compiled(mest.AdamW())[0] for _ in range(2))
    batches = make_batches(SHAPE, 10, 2)
    for number, batch in enumerate(batches):
        if number:
            step.profile(*batch, repeats=2)
        assert step(*batch).loss == twin(*batch).loss
    assert_same_state(step, twin)
