"""Whole steps of nets with depthwise, grouped and dilated convolutions: against masked dense torch, frozen in part, in
float16, in less memory, from files."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from nets import Mobile
from test_frozen import compiled as compiled_frozen
from test_frozen import made, torch_steps
from test_schemes_step import RULES, MaskedTorch, assert_gradients_are_torchs, check_steps
from test_step import make_batches
from torch import nn

import mest_compile as mest
from mest_compile.frontend import import_model
from mest_compile.kernels.cache import Builder
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.tuning.task import prepare, tasks_of

SHAPE = (8, 3, 8, 8)
BATCHES = make_batches(SHAPE, 10, 3)


def compiled(**options):
    torch.manual_seed(3)
    return mest.compile(
        Mobile(), SHAPE, **{"scheme": "block", "sparsity": 0.75, "optimizer": RULES["sgd"], "threads": 1, **options}
    )


@pytest.mark.parametrize(("scheme", "dense_layers"), [("block", None), ("unstructured", ["conv1", "fc"])])
def test_steps_with_a_mutation_between_them_equal_masked_torch(scheme, dense_layers, tmp_path):
    """By default depthwise layers are dense; listed nowhere they are sparse as others, on the gather's kernels."""
    check_steps(scheme, Mobile, SHAPE, dense_layers, RULES["sgd"], tmp_path, threads=1)


def test_layers_run_on_the_kernels_that_take_them():
    graph, _ = import_model(Mobile(), SHAPE)
    pattern = ["conv1", "first.0", "first.6", "second.0", "second.3", "second.6", "fc"]
    for scheme, dense_layers in (
        ("block", None),
        ("unstructured", ["fc"]),
        ("filter", ["fc"]),
        ("channel", ["fc"]),
        ("pattern", pattern),
    ):
        layers = plan_step(graph, StepOptions(scheme, 0.75, dense_layers=dense_layers)).layers
        kernels = {name.removesuffix(".weight"): layer.kernels for name, layer in layers.items()}
        assert kernels["first.3"] == kernels["twice"] == ("gather" if dense_layers else "depthwise"), scheme
        assert kernels["grouped"] == kernels["dilated"] == "gather", scheme
        assert kernels["first.0"] == ("compact" if scheme in ("filter", "channel") else "gather")
    apart = nn.Conv2d(4, 4, 3, dilation=2)
    graph, _ = import_model(nn.Sequential(nn.Conv2d(3, 4, 1), apart, nn.Flatten(), nn.Linear(64, 5)), SHAPE)
    for scheme, kernels in (("pattern", "gather"), ("filter", "compact")):
        assert plan_step(graph, StepOptions(scheme, 0.75)).layers["1.weight"].kernels == kernels


@pytest.mark.parametrize(("scheme", "batch"), [("block", 8), ("unstructured", 21)])
def test_a_mobilenetv2_equals_masked_torch(scheme, batch):
    """Its first blocks: with a stride, with a shortcut, bottlenecks without an activation; of more examples than a
    vector has lanes, too."""
    shape = (batch, 3, 16, 16)
    model = build_model("mobilenetv2", shape, width=8)
    model.features = nn.Sequential(*list(model.features)[:4])
    model.classifier[1] = nn.Linear(8, 10)
    step = mest.compile(model, shape, scheme=scheme, sparsity=0.75, optimizer=RULES["sgd"], threads=1)
    assert len(step.masks()) == 5  # all 1x1 convolutions
    twin = MaskedTorch(model.double(), step.masks(), step.optimizer)
    for images, labels in make_batches(shape, 10, 4):
        assert step(images, labels).loss == pytest.approx(twin.step(images.astype(np.float64), labels), rel=1e-5)
    wanted = {name: array.numpy() for name, array in twin.model.state_dict().items()}
    for name, array in step.state_dict().items():
        assert np.abs(array - wanted[name]).max() <= 1e-6 * max(1, np.abs(wanted[name]).max()), name


def kernels_of(model, shape, **options):
    graph, _ = import_model(model, shape)
    plan = plan_step(graph, StepOptions("block", 0.75, **options))
    return plan, [[call.kernel for call in program.calls] for program in plan.programs]


def test_a_chain_is_where_all_of_it_trains_and_the_device_has_it():
    """Then what lies between is in no buffer, and the gradient takes the place of what the chain reads."""
    shape = (8, 3, 16, 16)
    model = build_model("mobilenetv2", shape, width=8)
    plan, (train, predict) = kernels_of(model, shape)
    chains = sum(layer.spec.depthwise for layer in plan.layers.values()) - 1  # a shortcut reads what the first one does
    assert train.count("normed_depthwise.backward") == train.count("normed_depthwise.forward") == chains > 10
    assert predict.count("normed_depthwise.forward") == chains and train.count("depthwise.grad_weight") == 1
    assert all(call.problem.dz is None for call in plan.train.calls if call.kernel == "normed_depthwise.backward")
    names = {buffer.name for buffer in plan.train.buffers()}
    assert "features.2.conv.0.1" not in names and "features.2.conv.0.0" in names
    _, elsewhere = kernels_of(model, shape, target="mali")
    assert not any("normed" in name for names in elsewhere for name in names)
    for norm in (model.features[2].conv[1][1], model.features[3].conv[0][1]):  # behind the one, before the other
        norm.weight.requires_grad_(False)
    _, (train, predict) = kernels_of(model, shape)
    assert train.count("normed_depthwise.backward") == predict.count("normed_depthwise.forward") == chains - 2
    assert train.count("depthwise.grad_weight") == 3


def test_of_depthwise_layers_in_a_row_each_second_has_a_chain():
    """A normalisation between two of them is in one chain, and its gradient is passed on once."""
    deep = (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    row = deepcopy(deep) + deepcopy(deep) + deepcopy(deep)
    ends = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    torch.manual_seed(0)
    model = nn.Sequential(*ends[:2], *row, *ends[2:])
    step = mest.compile(model, SHAPE, scheme="dense", sparsity=0.0, optimizer=RULES["sgd"], threads=1)
    assert_gradients_are_torchs(step, model, BATCHES[0])
    twin = MaskedTorch(deepcopy(model).double(), {}, step.optimizer)
    for images, labels in BATCHES:
        assert step(images, labels).loss == pytest.approx(twin.step(images.astype(np.float64), labels), rel=1e-5)
    _, (train, predict) = kernels_of(model, SHAPE)
    assert train.count("normed_depthwise.backward") == predict.count("normed_depthwise.forward") == 2
    assert train.count("depthwise.grad_weight") == 1


@pytest.mark.parametrize(("name", "first"), [("mobilenetv3-small", (0, 1, 4)), ("efficientnet-b0", (0, 1, 2))])
def test_a_net_with_gates_equals_masked_torch(name, first):
    """Its stem and a block or stage of each kind; without dropout, which torch draws otherwise."""
    shape = (8, 3, 16, 16)
    model = build_model(name, shape, width=16)
    model.features = nn.Sequential(*(model.features[place] for place in first))
    if name == "mobilenetv3-small":
        model.features[2].block[0][0] = nn.Conv2d(16, 96, 1, bias=False)
    out = list(model.features.modules())[-1].num_features
    model.classifier = nn.Sequential(nn.Linear(out, 12), nn.Hardswish(), nn.Linear(12, 10))
    step = mest.compile(model, shape, scheme="unstructured", sparsity=0.75, optimizer=RULES["sgd"], threads=1)
    assert len(step.masks()) >= 6
    twin = MaskedTorch(model.double(), step.masks(), step.optimizer)
    for images, labels in make_batches(shape, 10, 4):
        assert step(images, labels).loss == pytest.approx(twin.step(images.astype(np.float64), labels), rel=1e-5)
    wanted = {name: array.numpy() for name, array in twin.model.state_dict().items()}
    for key, array in step.state_dict().items():
        assert np.abs(array - wanted[key]).max() <= 1e-5 * max(1, np.abs(wanted[key]).max()), key


def frozen_front(model):
    """Depthwise layers that end with a normalisation, that a gradient passes through, and one that trains alone."""
    for name, parameter in model.named_parameters():
        if name.startswith(("conv1", "bn1", "first.0", "first.1", "first.3", "first.4", "second.3", "second.4")):
            parameter.requires_grad_(False)
    model.bn1.eval()
    for part in (*model.first, *model.second):
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def test_what_is_frozen_stays_and_the_rest_is_torchs():
    step = compiled_frozen(made(frozen_front, Mobile), "unstructured", dense_layers=None)
    model = made(frozen_front, Mobile)
    wanted = list(torch_steps(model, step.masks(), 3))
    before = step.state_dict()
    found = [step(*batch).loss for batch in make_batches(SHAPE, 10, 10)[:3]]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    after = step.state_dict()
    for name in ("first.3.weight", "second.3.weight", "second.4.running_mean"):
        np.testing.assert_array_equal(after[name], before[name])
    assert {"depthwise.forward", "depthwise.grad_input"} <= {call.kernel for call in step.program.calls}
    kinds = {(call.layer, call.phase) for call in step.program.calls if call.phase}
    assert ("first.3.weight", "grad_weight") not in kinds and ("twice.weight", "grad_weight") in kinds
    assert any(call.problem.epilogue for call in step.program.calls if call.kernel == "depthwise.forward")


def test_files_keep_it_and_gradients_of_dead_weights_are_there(tmp_path):
    step = compiled()
    step(*BATCHES[0])
    step.save(tmp_path / "step")
    step.export(tmp_path / "artifact")
    full, _ = step.dense_gradients(*BATCHES[1])
    live, masks = step.gradients(*BATCHES[1]), step.masks()
    for name, mask in masks.items():
        assert np.abs(full[name] - live[name])[mask].max() <= 1e-4 * np.abs(live[name]).max(), name
        assert np.abs(full[name][~mask]).max() > 0, name
    losses = [step(*batch).loss for batch in BATCHES]
    for again in (mest.load(tmp_path / "step"), mest.open_artifact(tmp_path / "artifact")):
        assert [again(*batch).loss for batch in BATCHES] == losses


def test_a_budget_is_met_with_the_same_bits():
    step = compiled()
    lean = compiled(memory_budget=int(0.95 * step.memory()["total"]))
    assert len(lean.describe()["recomputed"]) > len(step.describe()["recomputed"])
    assert [lean(*batch).loss for batch in BATCHES] == [step(*batch).loss for batch in BATCHES]


def test_activations_in_float16_change_losses_by_rounding():
    step = compiled()
    if not step._compiled.facts.target.float16:
        pytest.skip("this processor does not convert float16")
    half = compiled(activations="float16")
    np.testing.assert_allclose(
        [half(*batch).loss for batch in BATCHES], [step(*batch).loss for batch in BATCHES], rtol=5e-3
    )


def test_kernels_are_tuned_by_exact_answers(tmp_path):
    step, builder, tasks = compiled(), Builder(folder=tmp_path / "kernels"), {}
    for task in tasks_of(step.program, step.layers, step._compiled.facts.target, tmp_path):
        tasks.setdefault(task.kernel, task)
    for kernel in ("depthwise.forward", "depthwise.grad_input"):
        prepare(tasks[kernel], step.program, step.layers, builder)
        found = tasks[kernel].load()
        assert found.allowed == 0 and found.wanted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"dense_layers": ["conv1", "fc"]},
            r"first.3.weight: scheme block:4x1 needs multiples of 4 output and 1 input channels, the layer has 1 and 1 "
            r"in each of 16 groups; choose another scheme",
        ),
        (
            {"scheme": "block:16x1", "sparsity": {"grouped": 0.5}},
            r"grouped.weight: .* has 8 and 8 in each of 2 groups",
        ),
    ],
)
def test_a_block_that_does_not_fit_a_group_is_refused_by_name(options, said):
    with pytest.raises(mest.MestError, match=said) as caught:
        compiled(**options)
    assert "\n" not in str(caught.value)
