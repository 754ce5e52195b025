"""Activations stored as float16: what that costs in accuracy, what it saves in memory, who refuses it. Kernels are in
test_operators and test_gather.
"""

import json
from dataclasses import replace

import float16
import numpy as np
import pytest
import torch
from activations import function_of
from device import emulated
from test_step import Odd, make_batches, masked_steps

import mest_compile as mest
from mest_compile.base.errors import InputError, TargetError, UsageError
from mest_compile.devices import cycles, emulation
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.lowering.fusing import fuse
from mest_compile.models.catalog import build_model
from mest_compile.operators.activation import ACTIVATIONS
from mest_compile.operators.layers.gather import GatherConv, Pass, gather_conv_reference
from mest_compile.planning.facts import Facts
from mest_compile.planning.footprint import footprint
from mest_compile.records.log import plain
from mest_compile.tuning.task import prepare, tasks_of

SHAPE = (8, 3, 16, 16)
HALF_ULP = np.finfo(np.float16).eps / 2  # largest relative error of a value that is rounded once


def compiled(activations="float16", model=None, shape=SHAPE, scheme="block", **options):
    model = model or build_model("resnet20", shape, 10, 8)
    options = {
        "sparsity": 0.9,
        "threads": 1,
        "optimizer": mest.SGD(lr=0.002, momentum=0.9, weight_decay=1e-3),
        **options,
    }
    return mest.compile(model, shape, scheme=scheme, activations=activations, **options)


class Rounded(torch.nn.Module):
    """A model as its fused graph: every value but the logits is rounded to float16 as it is made, gradients pass as
    they are."""

    def __init__(self, model, graph):
        super().__init__()
        self.model, self.nodes = model, graph.nodes

    def named_parameters(self, *arguments, **options):
        return self.model.named_parameters()

    def forward(self, images):
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        values = {"input": self._stored(images)}
        for node in self.nodes:
            parts = {role: state[name] for role, name in node.params.items()}
            value = self._value(node, [values[name] for name in node.inputs], parts).reshape(node.shape)
            values[node.name] = value if node is self.nodes[-1] else self._stored(value)
        return values[self.nodes[-1].name]

    @staticmethod
    def _stored(value):
        return value + (value.half().float() - value).detach()

    @staticmethod
    def _value(node, inputs, parts):
        x, attrs, functional = inputs[0], node.attrs, torch.nn.functional
        if node.op in ("conv2d", "linear"):
            places = {name: attrs[name] for name in ("stride", "padding") if name in attrs}
            return getattr(functional, node.op)(x, parts["weight"], parts.get("bias"), **places)
        if node.op == "batch_norm":
            y = functional.batch_norm(
                x,
                parts["running_mean"],
                parts["running_var"],
                parts["weight"],
                parts["bias"],
                True,
                attrs["momentum"],
                attrs["eps"],
            )
            y = y + inputs[1] if len(inputs) == 2 else y
            return function_of(attrs["activation"])(y) if attrs["activation"] else y
        if node.op in ("max_pool2d", "avg_pool2d"):
            return getattr(functional, node.op)(x, attrs["kernel"], attrs["stride"], attrs["padding"])
        if node.op in ACTIVATIONS.load():
            return function_of(node.op)(x)
        whole = {
            "add": lambda *both: both[0] + both[-1],
            "flatten": lambda x: x,
            "global_avg_pool": lambda x: x.mean((2, 3)),
        }
        return whole[node.op](*inputs)


class Shallow(torch.nn.Module):
    """Every way in which activations are stored, and few enough layers that a rounding which falls the other way stays
    a rounding."""

    def __init__(self, act=torch.relu):
        super().__init__()
        nn = torch.nn
        self.act = act
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.act(self.norm2(self.conv(x)) + x)
        return self.last(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


CASES = {
    "odd-unstructured": (Odd, (7, 3, 17, 17), ["f"]),
    "odd-dense": (Odd, (7, 3, 17, 17), ["f"]),
    "hardswish-block": (lambda: Shallow(torch.nn.functional.hardswish), (16, 3, 8, 8), ["first", "last"]),
    **{
        f"shallow-{scheme}": (Shallow, (16, 3, 8, 8), ["first", "last"])
        for scheme in ("block", "pattern", "filter", "channel")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_torch_that_rounds_where_values_are_stored(case):
    """Values near the middle between two float16 may be rounded apart: what is compared may differ by one rounding, not
    by more."""
    make, shape, dense_layers = CASES[case]
    torch.manual_seed(0)
    model, scheme = make(), case.partition("-")[2]
    step = compiled(
        model=model,
        shape=shape,
        scheme=scheme,
        dense_layers=None if scheme == "dense" else dense_layers,
        sparsity=0.0 if scheme == "dense" else 0.75,
        threads=2,
    )
    batches = make_batches(shape, step.classes, 10)
    found = step.gradients(*batches[0])
    got = [step(*batch, lr=0.002).loss for batch in batches]
    rounded = Rounded(model, fuse(step._compiled.graph))
    wanted, gradients = masked_steps(rounded, step.masks(), batches, 0.002, step.optimizer)
    for name, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), np.abs(gradients[name.replace(".bias", ".weight")]).max())
        assert np.abs(found[name] - gradient).max() <= HALF_ULP * scale, name
    np.testing.assert_allclose(got, wanted, rtol=HALF_ULP)


def test_ten_steps_of_a_deep_net_are_near_torch():
    """A stored value is off by half a unit in the last place at most; normalisation keeps relative errors as they are:
    they add up."""
    model = build_model("resnet20", SHAPE, 10, 8)
    step, batches = compiled(model=model), make_batches(SHAPE, 10, 10)
    got = [step(*batch, lr=0.002).loss for batch in batches]
    wanted, _ = masked_steps(model, step.masks(), batches, 0.002, step.optimizer)
    stored = {buffer.name for call in step.program.calls for buffer in call.buffers if buffer.dtype == "float16"}
    assert len(stored) == 1 + 21 + 21 + 1  # the images, what 21 convolutions and their norms give, the pool
    np.testing.assert_allclose(got, wanted, rtol=len(stored) * HALF_ULP)
    full = compiled("float32")
    assert got != [full(*batch, lr=0.002).loss for batch in batches]


def test_activations_take_half_the_bytes_and_everything_else_as_many():
    half, full = compiled().memory(), compiled("float32").memory()
    assert 0.5 <= half["activations"] / full["activations"] < 0.52  # moments stay float32, gaps 128 bytes
    assert (
        full["total"] - half["total"] > 0.4 * full["activations"]
    )  # half of them, but for room that slots of two sizes share worse
    assert {kind: half[kind] for kind in ("values", "gradients", "optimizer", "batch")} == {
        kind: full[kind] for kind in ("values", "gradients", "optimizer", "batch")
    }


def test_copies_that_kernels_make_are_counted():
    step = compiled(target="arm_cpu")
    made, target = step._compiled, find_target("arm_cpu")
    units = dict.fromkeys(step.layers, 0)
    copied, not_copied = (
        footprint(made.train, made.predict, step.layers, units, each)["workspace"]
        for each in (target, replace(target, registers=16))
    )
    largest = max(
        call.problem.source.slice_elems
        for call in step.program.calls
        if isinstance(call.problem, GatherConv) and call.problem.source.dtype == "float16"
    )
    assert copied - not_copied == largest * target.cores * 4


def test_a_budget_is_met_with_the_same_bits():
    step = compiled()
    lean = compiled(memory_budget=int(0.9 * step.memory()["total"]))
    assert len(lean.describe()["recomputed"]) > len(step.describe()["recomputed"])
    for batch in make_batches(SHAPE, 10, 3):
        assert lean(*batch).loss == step(*batch).loss


def test_checkpoints_and_artifacts_keep_it(tmp_path):
    step, batches = compiled(), make_batches(SHAPE, 10, 3)
    step(*batches[0])
    step.save(tmp_path / "step")
    step.export(tmp_path / "artifact")
    losses = [step(*batch).loss for batch in batches]
    for again in (mest.load(tmp_path / "step"), mest.open_artifact(tmp_path / "artifact")):
        assert again.describe()["activations"] == "float16"
        assert [again(*batch).loss for batch in batches] == losses
    document = step._compiled.document
    assert Facts.from_json(document).activations == "float16"
    assert (
        Facts.from_json({name: fact for name, fact in document.items() if name != "activations"}).activations
        == "float32"
    )  # older ones


def test_a_step_mutates_and_gives_dense_gradients():
    step = compiled()
    for batch in make_batches(SHAPE, 10, 2):
        step(*batch)
        step.mutate(prune_to=0.95, grow_to=0.9)
    found, _ = step.dense_gradients(*make_batches(SHAPE, 10, 1)[0])
    for name, mask in step.masks().items():
        live = step.gradients(*make_batches(SHAPE, 10, 1)[0])[name]
        assert np.abs(found[name] - live)[mask].max() <= 0.1 * np.abs(live).max(), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activations": "float8"}, "wanted 'float32' or 'float16' or 'bfloat16' or 'auto'"),
        ({"target": "mali"}, "target 'mali' has no kernels that store activations as float16: processors have"),
        ({"target": replace(find_target("avx2"), float16=False)}, "target 'avx2' has no"),
    ],
)
def test_who_cannot_says_so(change, said):
    with pytest.raises(UsageError if "activations" in change else TargetError, match=said):
        compiled(**change)


def test_the_command_line_trains_so(mest_compile_command, tmp_path):
    ran = mest_compile_command(
        "train",
        "--model",
        "mlp",
        "--width",
        32,
        "--data",
        "digits",
        "--scheme",
        "unstructured",
        "--epochs",
        5,
        "--activations",
        "float16",
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert ran.code == 0 and ran.document["epochs"][-1]["loss"] < ran.document["epochs"][0]["loss"] - 0.05, ran.err
    assert mest.load(next((tmp_path / "run").glob("**/*.safetensors"))).describe()["activations"] == "float16"
    refused = mest_compile_command(
        "train", "--data", "digits", "--activations", "float16", "--target", "adreno", "--out", tmp_path / "no"
    )
    assert refused.code == 2 and "target 'adreno' has no kernels that store" in refused.err


def test_records_of_float32_are_those_of_before_there_was_a_choice():
    image = Image(4, 8, 8, 8)
    assert "dtype" not in plain(image) and plain(replace(image, dtype="float16"))["dtype"] == "float16"
    assert plain(GatherConv(image, image, 1, 1, (1, 1), (Pass((8, 8)),), 4))["source"] == plain(image)


def test_kernels_are_tuned_by_exact_answers(tmp_path):
    step, builder = compiled(), Builder(folder=tmp_path / "kernels")
    target, tasks = step._compiled.facts.target, {}
    for task in tasks_of(step.program, step.layers, step._compiled.facts.target, tmp_path):
        tasks.setdefault(task.kernel, task)
    assert (
        tasks.keys() == {"gather.conv", "gather.grad", "batch_norm.forward", "batch_norm.backward"} and target.float16
    )
    for task in (tasks["gather.conv"], tasks["gather.grad"]):
        prepare(task, step.program, step.layers, builder)
        found = task.load()
        assert found.allowed == 0 and {array.dtype.name for array in found.arguments} >= {"float16", "float32", "int32"}


@pytest.mark.device
@pytest.mark.skipif(
    bool(emulation.missing_tools(emulation.machine_of(find_target("arm_cpu")))), reason="no emulator of an ARM CPU"
)
@pytest.mark.parametrize("name", ["arm_cpu", "cortex-a76"])
def test_an_arm_cpu_without_float16_arithmetic_converts(name):
    target, rng = find_target(name), np.random.default_rng(0)
    source, result = Image(4, 8, 8, 8, (1, 1, 1, 1), 4, "float16"), Image(8, 8, 8, 8, (0, 0, 0, 0), 4, "float16")
    problem = GatherConv(source, result, 4, 1, (1, 1), (Pass((8, 8)),), 4)
    pointers, offsets = np.array([0, 4, 8], np.int32), np.tile(np.arange(4, dtype=np.int32) * source.channel_elems, 2)
    values = rng.standard_normal((8, 4)).astype(np.float32)
    images = source.pack(rng.standard_normal((4, 8, 8, 8)).astype(np.float16))
    arrays = [pointers, offsets, values, images, np.zeros(result.shape, np.float16)]
    execution = emulation.emulate(kernel_source("gather.conv", problem, target), arrays)
    wanted = gather_conv_reference(problem, pointers, offsets, values, images)
    got = execution.arrays[-1].reshape(result.shape)
    np.testing.assert_allclose(got, wanted, rtol=HALF_ULP, atol=8 * np.finfo(np.float32).eps * np.abs(wanted).max())
    names = {line.split()[0] for block in execution.blocks for line in cycles.disassemble(block.words)}
    assert names >= {"fcvtl", "fcvtn", "fmla"}


@pytest.mark.device
@pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
def test_ten_steps_on_the_emulated_device_are_those_of_this_machine(tmp_path):
    with emulated.tracker(tmp_path) as (_, port), emulated.device(tmp_path, port):
        phone = mest.rpc(f"127.0.0.1:{port}", "emulated", wait_seconds=30)
        torch.manual_seed(0)
        model = Shallow()
        step, here = (
            compiled(model=model, shape=(16, 3, 8, 8), dense_layers=["first", "last"], **where)
            for where in ({"target": "cortex-a76", "device": phone}, {"target": "local"})
        )
        batches = make_batches((16, 3, 8, 8), 10, 10)
        got = [step(*batch, lr=0.002).loss for batch in batches]
        np.testing.assert_allclose(got, [here(*batch, lr=0.002).loss for batch in batches], rtol=HALF_ULP)
        step.close()


def test_the_page_has_the_tables_of_the_recorded_figures():
    page = float16.DOCUMENT.read_text()
    assert float16.embed(page, float16.table(json.loads(float16.FILE.read_text()))) == page, (
        "run python benchmarks/float16.py"
    )


def test_images_beyond_what_float16_holds_are_refused():
    step = compiled(
        model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)),
        shape=(2, 3, 2, 2),
        scheme="dense",
        sparsity=0,
    )
    images, labels = np.full((2, 3, 2, 2), -65504, np.float32), np.array([0, 1])
    before = step.state_dict()
    assert np.isfinite(step.predict(images)).all()
    images[1, 2, 1, 1] = 65535
    for refused in (lambda: step(images, labels), lambda: step.predict(images), lambda: step.gradients(images, labels)):
        with pytest.raises(InputError, match="65535.*float16.*65504"):
            refused()
    assert all(np.array_equal(array, before[name]) for name, array in step.state_dict().items())
