"""Activations stored as bfloat16: steps equal torch that rounds at the same places, in half the memory, from files, and
who refuses them. Kernels are in test_pairs, test_operators and test_nonfinite."""

import json
from dataclasses import replace

import bfloat16
import numpy as np
import pytest
import torch
from test_float16 import Rounded, Shallow
from test_step import Odd, make_batches, masked_steps

import mest_compile as mest
from mest_compile.base.errors import TargetError
from mest_compile.hardware.target import find_target, needed_features
from mest_compile.ir.layouts.layout import to_stored
from mest_compile.kernels.cache import Builder
from mest_compile.lowering.fusing import fuse
from mest_compile.measuring.profiling import LayerTime, Profile
from mest_compile.tuning.task import prepare, tasks_of

LOCAL = find_target("local")
WAYS = {"float32": replace(LOCAL, bfloat16=False), **({"pairs": LOCAL} if LOCAL.bfloat16 else {})}
KINDS = ("bfloat16", "float32")
ULP = 2.0**-7  # of a bfloat16, at most, beside its size


class RoundsBoth(torch.autograd.Function):
    """A value is rounded as it is stored, and so is its gradient."""

    @staticmethod
    def forward(context, value):
        return value.bfloat16().float()

    @staticmethod
    def backward(context, gradient):
        return gradient.bfloat16().float()


class RoundedTwice(Rounded):
    """`Rounded` to bfloat16, gradients too, and weights of convolutions where they are multiplied."""

    @staticmethod
    def _stored(value):
        return RoundsBoth.apply(value)

    @staticmethod
    def _value(node, inputs, parts):
        if node.op in ("conv2d", "linear"):
            weight = parts["weight"]
            parts = parts | {"weight": weight + (weight.bfloat16().float() - weight).detach()}
        return Rounded._value(node, inputs, parts)


def compiled(target, model, shape, scheme="block", activations="bfloat16", **options):
    options = {"sparsity": 0.75, "threads": 1, "optimizer": mest.SGD(lr=0.01, momentum=0.9), **options}
    return mest.compile(model, shape, scheme=scheme, activations=activations, target=target, **options)


CASES = {
    "odd-unstructured": (Odd, (7, 3, 17, 17), "pairs"),
    "shallow-block": (Shallow, (40, 3, 8, 8), "pairs"),
    "shallow-block-float32": (Shallow, (16, 3, 8, 8), "float32"),
    "shallow-pattern": (Shallow, (32, 3, 8, 8), "pairs"),
    "shallow-filter": (Shallow, (16, 3, 8, 8), "pairs"),
    "shallow-channel": (Shallow, (5, 3, 8, 8), "pairs"),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_torch_that_rounds_where_values_are_stored(case, caplog):
    """Values near the middle between two bfloat16 may be rounded apart, and weights' gradients are sums that cancel."""
    make, shape, way = CASES[case]
    if way not in WAYS:
        pytest.skip("this processor has no products of pairs of bfloat16")
    torch.manual_seed(0)
    model = make()
    dense = ["f"] if make is Odd else ["first", "last"]
    step = compiled(WAYS[way], model, shape, case.split("-")[1], dense_layers=dense)
    assert ("computed with in float32" in caplog.text) == (way == "float32")
    batches = make_batches(shape, step.classes, 3)
    found = step.gradients(*batches[0])
    got = [step(*batch, lr=0.01).loss for batch in batches]
    rounded = RoundedTwice(model, fuse(step._compiled.graph))
    wanted, gradients = masked_steps(rounded, step.masks(), batches, 0.01, step.optimizer)
    for name, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), np.abs(gradients[name.replace(".bias", ".weight")]).max())
        assert np.abs(found[name] - gradient).max() <= 4 * ULP * scale, name
    np.testing.assert_allclose(got, wanted, rtol=ULP / 4)


def test_activations_and_their_gradients_take_half_the_bytes_and_files_keep_that(tmp_path):
    torch.manual_seed(0)
    model, shape = Shallow(), (16, 3, 8, 8)
    step, full = (compiled("local", model, shape, dense_layers=["first", "last"], activations=kind) for kind in KINDS)
    half, whole = step.memory(), full.memory()
    assert 0.5 <= half["activations"] / whole["activations"] < 0.54  # moments stay float32, gaps 128 bytes
    assert half["workspace"] < 0.6 * whole["workspace"] and half["values"] == whole["values"]
    images = {buffer.dtype for call in step.program.calls for buffer in call.buffers if buffer.image}
    assert images == {"uint16", "float32"}  # of logits
    batches = make_batches(shape, 10, 3)
    step(*batches[0])
    step.save(tmp_path / "step")
    step.export(tmp_path / "artifact")
    state, losses = step.state_dict(), [step(*batch).loss for batch in batches]
    for again in (mest.load(tmp_path / "step"), mest.open_artifact(tmp_path / "artifact")):
        assert again.describe()["activations"] == "bfloat16"
        assert [again(*batch).loss for batch in batches] == losses
    full.set_masks(masks := step.masks())
    step.mutate(prune_to=0.8, grow_to=0.75)
    assert np.isfinite([step(*batch).loss for batch in batches]).all()
    assert any((step.masks()[name] != mask).any() for name, mask in masks.items())
    full.load_state_dict(state)  # weights are float32 in both
    assert all(np.array_equal(array, state[name]) for name, array in full.state_dict().items())


@pytest.mark.skipif(not LOCAL.bfloat16, reason="this processor has no products of pairs of bfloat16")
def test_only_steps_in_bfloat16_are_compiled_for_its_instructions():
    used = LOCAL.storing("bfloat16")
    assert used.pairs and used.vector == 32 and used.storing("bfloat16") is used
    assert LOCAL.storing("float32") is LOCAL and not LOCAL.pairs
    assert "avx512bf16" in needed_features(used) - needed_features(LOCAL)
    assert [used.for_batch(batch).vector for batch in (64, 33, 48, 16, 9, 5)] == [32, 16, 16, 16, 16, 8]


def test_a_target_that_cannot_have_them_is_refused():
    with pytest.raises(TargetError, match="AVX512-BF16, which x86 CPUs may have, and it is for aarch64"):
        replace(find_target("cortex-a76"), bfloat16=True)


def test_a_device_without_kernels_for_it_says_so():
    with pytest.raises(TargetError, match="target 'mali' has no kernels that store activations as bfloat16"):
        compiled("mali", Shallow(), (16, 3, 8, 8))


def test_kernels_are_tuned_by_exact_answers(tmp_path):
    step, builder, tasks = compiled("local", Shallow(), (16, 3, 8, 8)), Builder(folder=tmp_path / "kernels"), {}
    for task in tasks_of(step.program, step.layers, step._compiled.facts.target, tmp_path):
        tasks.setdefault(task.kernel, task)
    for task in (tasks["gather.conv"], tasks["gather.grad"], tasks["batch_norm.backward"]):
        prepare(task, step.program, step.layers, builder)
        found = task.load()
        assert found.check([found.wanted.get(place, array) for place, array in enumerate(found.arguments)]) is None
        place, wanted = max(found.wanted.items())
        wrong = [found.wanted.get(at, array).copy() for at, array in enumerate(found.arguments)]
        wrong[place][wanted.size // 2] = to_stored(np.array(9.0), "bfloat16") if wanted.dtype == "uint16" else 9
        assert "not" in found.check(wrong)


def block_of_a_mobile_net():
    nn = torch.nn
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    layers += [nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    layers += [nn.Conv2d(32, 32, 3, 2, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    layers += [nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 10))


@pytest.mark.parametrize("way", WAYS)
def test_depthwise_nets_train_so(way):
    """Losses differ from float32's by rounding; what a chain of operators keeps to itself is not rounded."""
    torch.manual_seed(0)
    shape, model = (16, 3, 12, 12), block_of_a_mobile_net()
    step, full = (compiled(WAYS[way], model, shape, activations=kind) for kind in KINDS)
    assert {call.kernel for call in step.program.calls} >= {"normed_depthwise.forward", "normed_depthwise.backward"}
    batches = make_batches(shape, 10, 3)
    np.testing.assert_allclose([step(*one).loss for one in batches], [full(*one).loss for one in batches], rtol=0.03)


def test_shares_of_the_peak_are_of_the_sparse_layers_of_a_stage():
    def layer(size, live, forward):
        seconds = {"forward": forward, "grad_weight": 2 * forward}
        return LayerTime("", (10, 10, 3, 3), (size, size), live, 2 * live * size**2 * 64, seconds, {})

    layers = (layer(8, 90, 1e-4), layer(8, 90, 3e-4), layer(8, 900, 1.0), layer(4, 90, 1e-5))
    rows = bfloat16.shares([Profile(1.0, (), layers)], 20.0)
    rate = 2 * 2 * 90 * 64 * 64 / 4e-4 / 1e9
    assert [(row["map"], row["phase"]) for row in rows][:2] == [(8, "forward"), (8, "grad_weight")] and len(rows) == 4
    assert rows[0]["gflops"] == pytest.approx(rate) and rows[0]["of_peak"] == pytest.approx(rate / 20)
    assert rows[1]["gflops"] == pytest.approx(rate / 2)


def test_the_page_has_the_tables_of_the_recorded_figures():
    page = bfloat16.DOCUMENT.read_text()
    assert bfloat16.embed(page, bfloat16.table(json.loads(bfloat16.FILE.read_text()))) == page, (
        "run python benchmarks/bfloat16.py"
    )
