"""Training on an OpenCL device, whatever driver there is: whole steps against masked torch, runs with mutation and
sieve, failures."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from nets import short_resnet
from test_passes import check_passes
from test_schemes_step import RULES, Small, check_steps
from test_step import make_batches, masked_steps
from torch import nn

import mest_compile as mest
from mest_compile.backends.opencl.runner import find_device
from mest_compile.base.errors import BuildError, DeviceError
from mest_compile.data import load
from mest_compile.hardware import target as hardware
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.operators.losses.cross_entropy import SoftmaxCrossEntropy
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.training.sieve import SieveRule

pyopencl = pytest.importorskip("pyopencl", reason="pyopencl is not installed")

SHAPE = (8, 3, 16, 16)
TARGETS = [name for name in hardware.target_names() if hardware.find_target(name).device == "opencl"]
LOGITS = Image(10, 1, 1, 8, (0, 0, 0, 0), 4)


def compiled(scheme, **options):
    """A step of a small net: a driver compiles each of its kernels, which is most of what a test here takes."""
    torch.manual_seed(0)
    return mest.compile(Small(8), SHAPE, **{"scheme": scheme, "sparsity": 0.75, "target": "opencl", **options})


@pytest.mark.parametrize(
    ("scheme", "rule"),
    [("block", "adamw"), ("pattern", "sgd"), ("unstructured", "sgd"), ("filter", "adamw"), ("channel", "sgd")],
)
def test_steps_with_a_mutation_between_them_equal_masked_torch(scheme, rule, tmp_path):
    check_steps(scheme, lambda: Small(8), (8, 3, 8, 8), None, RULES[rule], tmp_path, target="opencl")


def test_batches_of_fewer_examples_equal_masked_torch():
    torch.manual_seed(0)
    model = Small(8)
    step = mest.compile(
        model, (8, 3, 8, 8), scheme="block", sparsity=0.75, target="opencl", optimizer=mest.SGD(lr=0.002)
    )
    batches = [make_batches((size, 3, 8, 8), 10, 1, seed=size)[0] for size in (8, 3, 8)]
    wanted, _ = masked_steps(model, step.masks(), batches, 0.002, step.optimizer)
    np.testing.assert_allclose([step(*batch).loss for batch in batches], wanted, rtol=1e-4)


def test_passes_normalise_by_themselves_and_add_up(tmp_path):
    check_passes("pattern", tmp_path, target="opencl")


def test_depthwise_and_grouped_layers_equal_masked_torch():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 16, 5, 2, 2, groups=8, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 8, 3, 1, 2, dilation=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    )
    shape = (8, 3, 8, 8)
    step = mest.compile(model, shape, scheme="block", sparsity=0.6, target="opencl", optimizer=mest.SGD(lr=0.002))
    batches = make_batches(shape, 10, 3)
    wanted, _ = masked_steps(model, step.masks(), batches, 0.002, step.optimizer)
    assert step.layers["3.weight"].kernels == "depthwise" and list(step.masks()) == ["6.weight"]
    np.testing.assert_allclose([step(*batch, lr=0.002).loss for batch in batches], wanted, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["pattern", "filter"])
def test_a_checkpoint_of_the_device_goes_on_here(scheme, tmp_path):
    """Its kernels order values otherwise, and may hold some of them twice."""
    there, here = compiled(scheme), compiled(scheme, target="local")
    batches = make_batches(SHAPE, 10, 4)
    for batch in batches[:2]:
        there(*batch, lr=0.01)
        there.mutate(prune_to=0.85, grow_to=0.65)
    there.save(tmp_path / "a.safetensors")
    here.restore(tmp_path / "a.safetensors")
    before = here.state_dict()
    assert all(np.array_equal(before[name], array) for name, array in there.state_dict().items())
    for batch in batches[2:]:  # the second loss tells of momentum
        np.testing.assert_allclose(here(*batch, lr=0.01).loss, there(*batch, lr=0.01).loss, rtol=1e-4)


def test_digits_are_learned_with_mutation_and_sieve(tmp_path):
    split = load("digits")
    shape = (64, *split.train.images.shape[1:])
    step = mest.compile(short_resnet(shape, 16), shape, scheme="block", sparsity=0.9, target="opencl")
    recipe = Recipe(14, "em_s", lr=0.1, sieve=SieveRule(drop=0.2), drop_last=True)
    run = Trainer(step, recipe, tmp_path / "run").fit(split.train, split.test)
    assert run.test_accuracy >= 0.97
    assert sum(metrics["mutation"] is not None for metrics in run.history) > 10
    assert run.history[-1]["iterations"] < run.history[0]["iterations"]


def test_a_driver_that_fails_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (32, 3, 16, 16), dtype=np.uint8), rng.integers(0, 10, 32)
    recipe = Recipe(3, "em", lr=0.01, mutate_every=1, drop_last=True)
    usual, calls = pyopencl.enqueue_nd_range_kernel, []
    step = compiled("block")

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) > 500:
            raise pyopencl.RuntimeError("enqueue_nd_range_kernel failed: OUT_OF_RESOURCES")
        return usual(*arguments, **options)

    monkeypatch.setattr(pyopencl, "enqueue_nd_range_kernel", failing)
    with pytest.raises(
        DeviceError, match=r"cannot be launched: .*OUT_OF_RESOURCES.*go on from the last checkpoint"
    ) as caught:
        Trainer(step, recipe, tmp_path / "run").fit(data, data)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(pyopencl, "enqueue_nd_range_kernel", usual)
    trainer = Trainer.resume(tmp_path / "run")
    before = len(trainer._resumed[0]["history"])
    assert before < 3 and len(trainer.fit(data, data).history) == 3


@pytest.mark.parametrize("target", ["mali-g78", "adreno-740"])  # a family's members differ in limits alone
def test_a_phones_kernels_pass_a_drivers_compiler_and_answer_alike(target):
    torch.manual_seed(0)
    model, shape = Small(8), (8, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", pyopencl.CompilerWarning
        )  # what a driver's compiler has to say, it says as such a warning
        step = mest.compile(
            model,
            shape,
            scheme="block",
            sparsity=0.7,
            dense_layers=["conv1", "fc"],
            target=target,
            optimizer=mest.SGD(lr=0.01, momentum=0.9, weight_decay=1e-3),
        )
        batches = make_batches(shape, 10, 2)
        wanted, _ = masked_steps(model, step.masks(), batches, 0.01, step.optimizer)
        np.testing.assert_allclose([step(*batch, lr=0.01).loss for batch in batches], wanted, rtol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_beyond_its_targets_limits_is_not_built(target, tmp_path):
    there = hardware.find_target(target)
    source = kernel_source("loss.cross_entropy", SoftmaxCrossEntropy(LOGITS, LOGITS), there)
    assert Builder(tmp_path).function(source).launches
    for field, said in ("local_bytes", "bytes of local memory"), ("most_threads", "work-groups of"):
        less = {"local_bytes": 16} if field == "local_bytes" else {"threads": 1, "most_threads": 1}
        small = dataclasses.replace(
            source, target=dataclasses.replace(there, gpu=dataclasses.replace(there.gpu, **less))
        )
        with pytest.raises(BuildError, match=f"{said}.*{target} (has|allows)"):
            Builder(tmp_path).function(small)


def test_a_step_with_a_buffer_beyond_the_limit_is_not_built():
    there = hardware.find_target("mali")
    small = dataclasses.replace(there, gpu=dataclasses.replace(there.gpu, most_buffer_bytes=20_000))
    with pytest.raises(
        BuildError, match=r"images has 24576 bytes; mali allows 20000|activations \d has \d+ bytes; mali allows 20000"
    ):
        compiled("block", target=small)


def test_a_step_waits_once(monkeypatch):
    """Uploads and launches only enter the queue; reading the loss is where the host waits, and then all is done."""
    step = compiled("block")
    batches, events = make_batches(SHAPE, 10, 2), []
    step(*batches[0], lr=0.01)
    usual_copy, usual_launch = pyopencl.enqueue_copy, pyopencl.enqueue_nd_range_kernel

    def copy(queue, destination, source, **options):
        way = "upload" if isinstance(destination, pyopencl.Buffer) else "read"
        events.append("wait" if options.get("is_blocking", True) else way)
        return usual_copy(queue, destination, source, **options)

    def launch(*arguments, **options):
        events.append("launch")
        return usual_launch(*arguments, **options)

    monkeypatch.setattr(pyopencl, "enqueue_copy", copy)
    monkeypatch.setattr(pyopencl, "enqueue_nd_range_kernel", launch)
    usual_finish = step._runner._finish

    def finish(what):
        events.append("wait")
        held.append(len(step._runner._transfers))
        usual_finish(what)

    held = []  # events of transfers that are under way: pyopencl waits for what is let go
    monkeypatch.setattr(step._runner, "_finish", finish)
    result = step(*batches[1], lr=0.01)
    assert np.isfinite(result.loss) and len(result.correct) == SHAPE[0]
    launches = len(step._runner._ready["train"])
    assert events == [
        *["upload"] * 3,
        *["launch"] * launches,
        *["read"] * 2,
        "wait",
    ]  # images, labels, hyper; loss, correct
    assert held[0] >= 2 and not step._runner._transfers


def test_a_speed_table_of_the_device_is_against_our_dense_step_and_names_the_driver(mest_compile_command):
    options = [
        "table",
        "--target",
        "opencl",
        "--model",
        "mlp",
        "--width",
        32,
        "--batch",
        8,
        "--schemes",
        "unstructured",
    ]
    options += ["--sparsities", 0.9]
    refused = mest_compile_command(*options, "--vs", "torch")
    assert refused.code == 2 and "on a device only 'mest-dense' runs" in refused.err
    ran = mest_compile_command(*options, "--repeats", 2, "--json")
    assert ran.code == 0, ran.err
    (row,) = ran.document["rows"]
    assert ran.document["baseline"] == "mest-dense" and row["problem"] is None and row["speedup"] > 0
    assert find_device().name in ran.document["opencl"]
