"""Optimizers: what each declares, and steps that are compiled with one: state, count of updates, checkpoints,
artifacts, refusals."""

import hashlib
import inspect

import numpy as np
import pytest
import torch
from masks import survivors
from optimizers import EVERY
from test_schemes_step import MaskedTorch, Small
from test_step import assert_like_torch, make_batches

import mest_compile as mest
from mest_compile.base.errors import SpecError, StateError, UsageError
from mest_compile.hardware.target import find_target
from mest_compile.kernels.source import kernel_source
from mest_compile.operators.optimizers.optimizer import OPTIMIZERS, Update, read_optimizer
from mest_compile.runtime import checkpoint

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
    assert OPTIMIZERS.find(kind.name) is kind and getattr(mest, kind.__name__) is kind and inspect.getdoc(kind)
    assert kind().rule_name in kind.rules
    name, fields, _ = kind.torch
    assert hasattr(torch.optim, name) and set(fields.values()) <= set(kind.__dataclass_fields__)


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_a_rule_is_whole(made):
    rule = made.rule
    known = {"values", "gradients", *rule.state, *rule.scalars}
    assert known <= frozenset().union(*(expression.variables for expression in rule.formula.values()))
    for name, expression in rule.formula.items():
        assert expression.variables <= known, name
        known.add(name)
    assert set(rule.state) < rule.formula.keys() and list(rule.formula)[-1] == "values"
    for count in (1, 10**7):
        hyper = made.hyper(count, made.lr)
        assert hyper.dtype == np.float32 and hyper.shape == (len(rule.scalars),) and np.isfinite(hyper).all()
    assert read_optimizer(made.to_json()) == made and made.state == rule.state


def test_there_is_one_of_every_rule():
    rules = {name for kind in OPTIMIZERS.load().values() for name in kind.rules}
    assert {made.rule_name for made in EVERY.values()} == rules


@every
def test_an_optimizer_is_read_as_it_was_written(kind):
    rule = kind(lr=0.25)
    assert read_optimizer(rule.to_json()) == rule != kind()


def test_a_checkpoint_of_sgd_without_momentum_has_no_state_and_an_old_one_is_read(tmp_path, builder):
    plain, other = (compiled(mest.SGD(momentum=momentum), builder=builder)[0] for momentum in (0, 0.9))
    assert plain.memory()["optimizer"] == 0
    plain.save(tmp_path / "a.safetensors")
    with pytest.raises(StateError, match="is of optimizer 'sgd:plain', the step has 'sgd'"):
        other.restore(tmp_path / "a.safetensors")
    arrays, facts = checkpoint.read(tmp_path / "a.safetensors")
    checkpoint.write(
        tmp_path / "old.safetensors", arrays | {"held/fc.weight:momentum": arrays["held/fc.weight"]}, facts
    )
    assert_same_state(mest.load(tmp_path / "old.safetensors"), plain)


def test_a_document_without_a_name_is_of_sgd():
    assert read_optimizer({"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}) == mest.SGD(
        0.5, 0.0, 0.0
    )


@pytest.mark.parametrize(("target", "digest"), [("arm_cpu", "5305991ad5e86347"), ("opencl", "c1d4f0eb1f74ab4d")])
def test_the_text_of_sgds_kernel_is_what_it_was(target, digest):
    text = kernel_source("optimizer.update", Update("sgd"), find_target(target)).text
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


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
        match=r"mest.AdamW\(lr, betas, eps, weight_decay\), mest.RMSprop\(.*, mest.SGD\(lr, momentum, weight",
    ):
        compiled(0.1)


# Steps.

CALM_ONES = {
    "adam": mest.Adam(lr=0.002, betas=(0.9, 0.99), eps=1e-4, weight_decay=1e-2),
    "adamw": CALM,
    "rmsprop": mest.RMSprop(lr=0.0005, alpha=0.9, eps=1e-3, weight_decay=1e-2),
    "rmsprop both": mest.RMSprop(lr=0.0002, alpha=0.9, eps=1e-3, momentum=0.5, centered=True),
    "plain": mest.SGD(lr=0.01, momentum=0, weight_decay=1e-2),
}
SCHEMES = {
    "unstructured": 0.75,
    "block": 0.75,
    "block:1x4": 0.75,
    "pattern": 0.75,
    "filter": 0.5,
    "channel": 0.5,
    "dense": 0.0,
}


# Of other rules the schemes whose values lie otherwise: whole units, filled-up ones, a dense array.
LAID_OUT = ("block", "filter", "dense")
CASES = [(rule, scheme) for rule in CALM_ONES for scheme in (SCHEMES if rule == "adam" else LAID_OUT)]


@pytest.mark.parametrize(("rule", "scheme"), CASES)
def test_ten_steps_of_every_scheme_equal_masked_torch(rule, scheme, builder):
    rule = CALM_ONES[rule]
    step, model = compiled(rule, scheme, sparsity=SCHEMES[scheme], builder=builder)
    batches, masked = make_batches(SHAPE, 10, 10), MaskedTorch(model, step.masks(), rule)
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches], [masked.step(*batch) for batch in batches], rtol=1e-4
    )
    assert_like_torch(step, model, batches[0][0])
    live = sum(np.count_nonzero(mask) for mask in step.masks().values())
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in step.masks())
    if scheme != "filter":  # whose last group of filters is filled up
        assert step.memory()["optimizer"] == 4 * len(rule.state) * (live + dense)


GROUPS = (mest.Group("fc.*", rate=3), mest.Group(["bn?.bias", "conv2.weight"], rate=0.5, weight_decay=0.3))


@pytest.mark.parametrize("target", ["local", "opencl"])
@pytest.mark.parametrize("decay_weights_only", [False, True])
def test_groups_of_parameters_move_as_torchs(decay_weights_only, target, builder):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    rule = mest.SGD(0.01, 0.9, 0.1, groups=GROUPS, decay_weights_only=decay_weights_only)
    step, model = compiled(rule, target=target, builder=builder, threads=None if target == "opencl" else 1)
    masked, groups = MaskedTorch(model, step.masks(), mest.SGD()), []
    for name, parameter in model.named_parameters():
        biased = name.startswith("bn") or name.endswith("bias")
        factor, decay = (3, None) if name.startswith("fc.") else (1, None)
        if name == "conv2.weight" or (name.startswith("bn") and name.endswith("bias")):
            factor, decay = 0.5, 0.3
        if decay is None:
            decay = 0.0 if decay_weights_only and biased else 0.1
        groups.append({"params": [parameter], "lr": 0.01 * factor, "weight_decay": decay})
    masked.rule = torch.optim.SGD(groups, momentum=0.9)
    batches = make_batches(SHAPE, 10, 6)
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches], [masked.step(*batch) for batch in batches], rtol=1e-4
    )
    assert_like_torch(step, model, batches[0][0])


def test_a_group_that_has_no_parameter_is_refused():
    with pytest.raises(
        SpecError, match=r"no parameter is called head.\*, as a group of AdamW has it; there are: conv1"
    ):
        compiled(mest.AdamW(groups=[mest.Group("head.*")]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mest.Group("", 1), "names is ''; wanted a pattern"),
        (lambda: mest.Group([]), r"names is \[\]; wanted a pattern"),
        (lambda: mest.Group(3), "names is 3; wanted a list"),
        (lambda: mest.Group("a", rate=-1), "rate is -1"),
        (lambda: mest.Group("a", weight_decay="b"), "weight_decay is 'b'"),
        (lambda: mest.SGD(groups="fc.*"), "groups is 'fc.*'; wanted a list of mest.Group"),
        (lambda: mest.SGD(groups=[{"rate": 2}]), "a group is {'rate': 2}; wanted mest.Group"),
        (lambda: mest.SGD(decay_weights_only=1), "decay_weights_only is 1; wanted True or False"),
        (lambda: mest.RMSprop(alpha=1), "alpha is 1; wanted"),
        (lambda: mest.Adam(betas=(1, 0.9)), r"Adam: betas\[0\] is 1"),
    ],
)
def test_an_option_that_cannot_be_is_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


# torch.optim.


def torchs(name, model, **options):
    return getattr(torch.optim, name)(model.parameters(), **options)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda m: torchs("SGD", m, lr=0.1, foreach=True), mest.SGD(0.1, 0, 0)),
        (
            lambda m: torchs("SGD", m, lr=0.2, momentum=0.8, weight_decay=0.1, nesterov=True),
            mest.SGD(0.2, 0.8, 0.1, True),
        ),
        (lambda m: torchs("Adam", m, betas=(0.8, 0.9), eps=1e-6), mest.Adam(1e-3, (0.8, 0.9), 1e-6)),
        (lambda m: torchs("Adam", m, weight_decay=0.1, decoupled_weight_decay=True), mest.AdamW(weight_decay=0.1)),
        (lambda m: torchs("AdamW", m, lr=torch.tensor(0.5)), mest.AdamW(0.5)),
        (
            lambda m: torchs("RMSprop", m, alpha=0.9, momentum=0.5, centered=True),
            mest.RMSprop(1e-2, 0.9, 1e-8, 0.0, 0.5, True),
        ),
        (
            lambda m: torch.optim.SGD(
                [
                    {"params": [p for n, p in m.named_parameters() if not n.startswith("fc.")]},
                    {"params": m.fc.parameters(), "lr": 0.5, "weight_decay": 0.25},
                ],
                lr=0.25,
            ),
            mest.SGD(0.25, 0, 0, groups=[mest.Group(("fc.weight", "fc.bias"), 2.0, 0.25)]),
        ),
    ],
)
def test_an_optimizer_of_torch_is_taken_as_what_it_says(make, wanted, builder):
    torch.manual_seed(3)
    model = Small(8)
    step = mest.compile(model, SHAPE, sparsity=0.75, optimizer=make(model), threads=1, builder=builder)
    assert {**step.optimizer.to_json(), "lr": pytest.approx(wanted.lr)} == wanted.to_json()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: torchs("Adam", m, amsgrad=True),
            "Adam has amsgrad=True, which a step cannot do; wanted amsgrad=False",
        ),
        (lambda m: torchs("SGD", m, maximize=True), "SGD has maximize=True"),
        (lambda m: torchs("SGD", m, momentum=0.9, dampening=0.1), "SGD has dampening=0.1"),
        (
            lambda m: torchs("Adadelta", m),
            "torch.optim.adadelta.Adadelta; of torch a step takes Adam, AdamW, RMSprop, SGD",
        ),
        (lambda m: torch.optim.SGD(m.fc.parameters()), "SGD leaves conv1.weight as it is, and 14 more"),
        (
            lambda m: torch.optim.SGD([*m.parameters(), torch.nn.Parameter(torch.zeros(1))]),
            "SGD has a parameter that is none of the model's",
        ),
        (
            lambda m: torch.optim.Adam(
                [{"params": [p for p in m.parameters() if p is not m.fc.bias]}, {"params": [m.fc.bias], "eps": 1e-3}]
            ),
            "Adam has groups with eps=1e-08 and with eps=0.001; groups of a step differ in lr and weight_decay alone",
        ),
    ],
)
def test_what_an_optimizer_of_torch_says_and_a_step_cannot_is_named(make, message):
    model = Small(8)
    with pytest.raises(UsageError, match=message) as caught:
        mest.compile(model, SHAPE, sparsity=0.75, optimizer=make(model), threads=1)
    assert "\n" not in str(caught.value)


def test_an_optimizer_of_torch_that_has_made_steps_is_refused():
    model = Small(8)
    rule = torchs("Adam", model)
    model(torch.zeros(SHAPE)).sum().backward()
    rule.step()
    with pytest.raises(UsageError, match="the Adam has made steps already"):
        mest.compile(model, SHAPE, sparsity=0.75, optimizer=rule, threads=1)


def test_an_optimizer_is_told_as_a_text_or_a_table(builder):
    text = compiled("adamw:weight_decay=0.25,groups=[{names='fc.*',rate=2}]", builder=builder)[0]
    table = compiled(
        {"name": "adamw", "weight_decay": 0.25, "groups": [{"names": "fc.*", "rate": 2}]}, builder=builder
    )[0]
    wanted = mest.AdamW(weight_decay=0.25, groups=[mest.Group("fc.*", 2)])
    assert text.optimizer == table.optimizer == wanted
    with pytest.raises(UsageError, match="optimizer 'adamw' has no option 'momentum'; there are: lr"):
        compiled("adamw:momentum=0.9")


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
        "groups": [],
        "decay_weights_only": False,
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
