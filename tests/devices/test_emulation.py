"""Kernels on an emulated ARM machine: right answers, the same instructions every time, and what the cycle model makes
of them."""

import json
import shutil
from dataclasses import replace

import neon
import numpy as np
import pytest
import test_gather
import test_nonfinite
from libraries import check_library
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import BuildError, DeviceError, NotInstalled, TargetError, UsageError
from mest_compile.budgeting import _prices
from mest_compile.devices import cycles, emulation
from mest_compile.devices.cycleprices import CyclePrices
from mest_compile.frontend import import_model
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.choosing import live_of
from mest_compile.kernels.linking import link_kernel
from mest_compile.kernels.source import kernel_source
from mest_compile.measuring.analysis import analyse
from mest_compile.models.catalog import build_model
from mest_compile.operators.layers.gather import GatherConv, Pass
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.planning.prices import CountedPrices, call_bytes
from mest_compile.planning.retargeting import with_batch
from mest_compile.planning.units import with_trainable
from mest_compile.records.log import Measure, Outcome, Records
from mest_compile.tuning.runner import RunnerOptions, find_runner
from mest_compile.tuning.task import Task, prepare, tasks_of

MISSING = emulation.missing_tools(emulation.MACHINES["aarch64"]) + cycles.missing_tools()
needs_arm = pytest.mark.skipif(
    bool(MISSING), reason=f"emulation and its model need {', '.join(MISSING)}; `mest-compile doctor` tells how"
)
TARGET = find_target("cortex-a76")


def executions(monkeypatch, target, seeds, taps=1):
    """Checks kernels of random problems against their references on the emulated machine; what they executed."""
    found = []

    def call(_, kernel, problem, *arrays, **knobs):
        found.append(emulation.emulate(kernel_source(kernel, problem, target, **knobs), list(arrays)))
        return [after.reshape(before.shape) for after, before in zip(found[-1].arrays, arrays, strict=True)]

    monkeypatch.setattr(test_gather, "call", call)
    monkeypatch.setattr(test_gather, "VECTOR", target.vector)
    for seed in seeds:
        conv, grad, index = test_gather.random_problem(seed, taps)
        test_gather.check_conv(None, conv, index, np.random.default_rng(seed))
        test_gather.check_grad(None, grad, index, np.random.default_rng(seed))
    return found


@needs_arm
@pytest.mark.parametrize(
    ("target", "seeds", "taps"),
    [
        ("cortex-a76", range(5), 1),
        ("cortex-a76", range(2), 2),
        ("arm_cpu", [4], 1),
        ("cortex-x1", [4], 1),
        ("android-arm64", [4], 1),
    ],
)
def test_kernels_for_arm_give_what_the_references_give(monkeypatch, target, seeds, taps):
    assert all(execution.instructions > 1000 for execution in executions(monkeypatch, find_target(target), seeds, taps))


@needs_arm
@pytest.mark.parametrize(
    "kernel",
    [
        "relu.forward",
        "relu.backward",
        "relu6.forward",
        "relu6.backward",
        "hardswish.forward",
        "hardswish.backward",
        "max_pool2d.forward",
        "max_pool2d.backward",
        "batch_norm.moments",
        "batch_norm.forward",
        "batch_norm.backward",
    ],
)
def test_nan_and_infinity_go_through_kernels_for_arm(monkeypatch, kernel):
    def call(_, kernel, problem, *arrays):
        found = emulation.emulate(kernel_source(kernel, problem, TARGET), list(arrays)).arrays
        return [after.reshape(before.shape) for after, before in zip(found, arrays, strict=True)]

    monkeypatch.setattr(test_nonfinite, "call", call)
    test_nonfinite.test_a_kernel_gives_what_its_reference_gives(None, kernel, "float32")


@pytest.mark.skipif(
    bool(emulation.missing_tools(emulation.MACHINES["armv7"])), reason="needs qemu-arm and gcc-arm-linux-gnueabihf"
)
def test_every_kernel_of_a_step_gives_on_a_32_bit_arm_what_it_gives_here(tmp_path):
    """One problem of every kernel, forward, backward and update, against this machine's answers."""
    target, shape = find_target("armv7"), (4, 3, 32, 32)
    graph, _ = import_model(build_model("vgg11", shape, 10, 4, 0), shape)
    plan = plan_step(graph, StepOptions("pattern", target=target))
    layers, builder, kernels = plan.layers, Builder(folder=tmp_path / "kernels"), {}
    for program in plan.programs:
        for call in program.calls:
            kernels.setdefault(call.kernel, (program, call))
    assert {
        "pattern.conv",
        "pattern.grad",
        "gather.grad",
        "batch_norm.backward",
        "max_pool2d.backward",
        "loss.cross_entropy",
        "values.turn",
    } <= kernels.keys()
    for kernel, (program, call) in kernels.items():
        task = Task(call.name, kernel, call.problem, live_of(call, layers), 1, target, tmp_path / f"{kernel}.npz")
        prepare(task, program, layers, builder)
        library = tmp_path / f"{kernel}.so"
        link_kernel(task.source({}), library)
        assert check_library(library.read_bytes(), target).bits == 32
        assert (
            task.check(emulation.execute(library, task.source({}).symbol, task.arguments(), target).arrays) is None
        ), kernel


@needs_arm
def test_counts_are_exact_and_the_same_on_every_run(monkeypatch):
    first, again = (executions(monkeypatch, TARGET, [4]) for _ in range(2))
    assert [execution.blocks for execution in first] == [execution.blocks for execution in again]
    assert [cycles.model(each, TARGET, 1) for each in first] == [cycles.model(each, TARGET, 1) for each in again]


@needs_arm
def test_a_kernel_with_more_work_executes_so_much_more():
    """Twice the examples: twice the multiply-adds, counted in the code that ran."""
    multiply_adds = []
    for batch in (8, 16):
        image = Image(4, 8, 8, batch, (0, 0, 0, 0), 4)
        problem = GatherConv(image, image, 4, 1, (1, 1), (Pass((8, 8)),), 4)
        index = [
            np.arange(2, dtype=np.int32) * 4,
            np.arange(4, dtype=np.int32) * image.channel_elems,
            np.ones((4, 4), np.float32),
        ]
        arrays = [*index, *(np.zeros(image.shape, np.float32) for _ in range(2))]
        execution = emulation.emulate(kernel_source("gather.conv", problem, TARGET), arrays)
        names = {
            block.words: [line.split()[0] for line in cycles.disassemble(block.words)] for block in execution.blocks
        }
        multiply_adds.append(sum(block.executions * names[block.words].count("fmla") for block in execution.blocks))
    assert multiply_adds == [4 * 4 * 64 * 8 // 4, 4 * 4 * 64 * 16 // 4]


@needs_arm
def test_the_model_knows_what_limits_a_block():
    core = "neoverse-n1"
    assert [cycles.multiply_adds_per_cycle(each) for each in ("cortex-a53", core, "neoverse-v1")] == [1, 2, 4]
    chain, independent = ["fmla v0.4s, v1.4s, v2.4s"] * 8, [f"fmla v{place}.4s, v30.4s, v31.4s" for place in range(8)]
    loads, cheap = ["ldr q0, [x0]"] * 8, [f"add x{place}, x9, x10" for place in range(4)] + ["nop"] * 8
    waiting, full, loading, decoding = cycles.analyse([chain, independent, loads, cheap], core)
    assert (
        waiting >= 2 * full
        and full == pytest.approx(4, abs=0.3)
        and loading == pytest.approx(4, abs=0.3)
        and decoding >= 3
    )


@needs_arm
def test_analysis_counts_layers():
    graph, _ = import_model(build_model("resnet20", (4, 3, 8, 8), 10, 8, 0), (4, 3, 8, 8))
    told, names = [], ["layer1.0.conv1.weight", "layer1.0.conv2.weight", "layer2.0.conv1.weight"]
    found = analyse(
        graph,
        StepOptions("unstructured", target=TARGET),
        names,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1] == len(found.kernels)
    for phase in ("forward", "grad_input", "grad_weight"):
        assert sorted(name for kernel in found.kernels if kernel.phase == phase for name in kernel.layers) == names
    assert (
        len([kernel for kernel in found.kernels if kernel.phase == "grad_weight"]) == 2
    )  # the first two layers share one
    document = found.to_dict()
    assert document["kind"] == "modelled" and document["core"] == "neoverse-n1"
    assert document["totals"]["all"]["sparse_cycles"] == pytest.approx(
        sum(k.sparse.cycles * len(k.layers) for k in found.kernels)
    )


STAGES = [f"layer{stage}.1.conv1.weight" for stage in (1, 2, 3)]


@needs_arm
@pytest.mark.parametrize(
    ("scheme", "forward", "fewer"), [("block", 0.7, 6), ("pattern", 0.7, 6), ("unstructured", 0.5, 4.5)]
)
def test_goals_on_the_stages_of_a_wide_residual_net(scheme, forward, fewer):
    """At 90%: share of the multiply-add floor in the forward pass, and cycles of all phases against our dense
    kernels."""
    graph, _ = import_model(build_model("resnet20", (4, 3, 32, 32), 10, 32, 0), (4, 3, 32, 32))
    found = analyse(graph, StepOptions(scheme, target=TARGET), STAGES)
    assert sorted({kernel.layers[0] for kernel in found.kernels}) == STAGES
    assert all(kernel.sparse.share_of_floor >= forward for kernel in found.kernels if kernel.phase == "forward")
    assert found.totals()["times_fewer_cycles"] >= fewer


def test_what_cannot_be_modelled_is_refused(tmp_path):
    graph, _ = import_model(build_model("mlp", (4, 3, 8, 8), 10, None, 0), (4, 3, 8, 8))
    with pytest.raises(TargetError, match="no cycle_model"):
        analyse(graph, StepOptions(target="avx2"))
    with pytest.raises(TargetError, match="not an ARM CPU"):
        emulation.machine_of(replace(find_target("avx2"), cycle_model="neoverse-n1"))


def test_missing_programs_are_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotInstalled, match="qemu-aarch64.*apt install .*qemu-user"):
        emulation.check_tools(emulation.machine_of(TARGET))
    with pytest.raises(NotInstalled, match="llvm-mca-19.*apt install llvm-19"):
        cycles.check_tools()


@needs_arm
def test_steps_of_a_core_that_is_not_there_cost_modelled_cycles(monkeypatch):
    model, shape = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), (64, 16)
    plan = plan_step(import_model(model, shape)[0], StepOptions("dense", 0.0, target=TARGET, threads=1))
    prices, few = _prices(TARGET, 0.5), with_batch(plan, 4)
    assert prices.kind == "modelled cycles of neoverse-n1" and _prices(TARGET, 10**6).kind == "counted"
    assert 0.2 < prices.of(with_trainable(few, ["1.*"])) / prices.of(few) < 0.8
    emulated = []

    def counted(prices, call, plan):
        emulated.append(plan.facts.graph.input_shape[0])
        return call_bytes(call, plan)

    # Calls are emulated on few examples; what depends on their number, as updates do not, is told in proportion.
    monkeypatch.setattr(CyclePrices, "price", counted)
    assert CyclePrices(TARGET).of(plan) == pytest.approx(CountedPrices().of(plan), rel=0.2) and set(emulated) == {16}


@needs_arm
def test_failures_on_the_device_say_what_happened(tmp_path):
    image = Image(4, 8, 8, 4, (0, 0, 0, 0), 4)
    source = kernel_source("gather.conv", GatherConv(image, image, 4, 1, (1, 1), (Pass((8, 8)),), 4), TARGET)
    arrays = [
        np.zeros(2, np.int32),
        np.zeros(0, np.int32),
        np.zeros(0, np.float32),
        *(np.zeros(image.elems, np.float32) for _ in range(2)),
    ]
    library = tmp_path / "kernel.so"
    emulation.build(source, library)
    with pytest.raises(DeviceError, match="has no function"):
        emulation.execute(library, "nonsense", arrays, TARGET)
    with pytest.raises(
        DeviceError, match="failed on the emulated cortex-a76"
    ):  # a buffer of the wrong size: the kernel checks it
        emulation.execute(library, source.symbol, [*arrays[:-1], arrays[-1][1:]], TARGET)
    with pytest.raises(BuildError, match="does not compile"):
        emulation.build(replace(source, text=source.text.replace("T.int32()", "T.nonsense()")), library)
    with pytest.raises(emulation.EmulationTimeout, match="give it a smaller batch"):
        emulation.execute(library, source.symbol, arrays, TARGET, limit_seconds=0.001)
    graph, _ = import_model(build_model("mlp", (4, 3, 8, 8), 10, None, 0), (4, 3, 8, 8))
    with pytest.raises(UsageError, match="no such sparse layer"):
        analyse(graph, StepOptions("dense", 0.0, target=TARGET))
    with pytest.raises(UsageError, match="give a number"):
        analyse(graph, StepOptions(sparsity={"fc1": 0.9}, target=TARGET))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A forward convolution of a small net, with arrays to check candidates by."""
    graph, _ = import_model(build_model("resnet20", (4, 3, 8, 8), 10, 8, 0), (4, 3, 8, 8))
    plan = plan_step(graph, StepOptions("unstructured", target=TARGET))
    program, layers = plan.train, plan.layers
    folder = tmp_path_factory.mktemp("tasks")
    found = next(task for task in tasks_of(program, layers, TARGET, folder) if task.name.startswith("layer1.0.conv1"))
    prepare(found, program, layers, Builder(folder=folder / "kernels"))
    return found


@needs_arm
@pytest.mark.parametrize("name", ["model", "instructions"])
def test_candidates_are_ranked_without_a_device_and_wrong_ones_never_win(task, name, tmp_path):
    runner = find_runner(name)(TARGET, RunnerOptions(timeout_seconds=120))
    assert runner.measure is Measure.MODELLED
    knobs = {"tile": (1, 1, 4, 1)}  # half the accumulators: each weight is loaded twice as often
    default, again, small = (runner.attempt(task, task.source(each), tmp_path) for each in ({}, {}, knobs))
    assert default.outcome is Outcome.OK and default == again and small.outcome is Outcome.OK
    assert default.seconds < small.seconds
    wrong = replace(task.source({}), text=task.source({}).text.replace("source[offsets[", "source[0 * offsets["))
    assert runner.attempt(task, wrong, tmp_path).outcome is Outcome.WRONG
    hasty = find_runner(name)(TARGET, RunnerOptions(timeout_seconds=0.001))
    assert hasty.attempt(task, task.source({}), tmp_path).outcome is Outcome.TIMED_OUT
    assert not list(tmp_path.iterdir())


@needs_arm
def test_tuning_by_a_model_decides_and_says_so(mest_compile_command, tmp_path):
    log = tmp_path / "log.jsonl"
    command = [
        "tune",
        "--target",
        "cortex-a76",
        "--model",
        "mlp",
        "--width",
        16,
        "--batch",
        8,
        "--measure",
        "model",
        "--log",
        log,
        "--trials",
        1,
        "--json",
    ]
    first = mest_compile_command(*command)
    assert first.code == 0, first.err
    assert (
        first.document["measure"] == "modelled"
        and first.document["cpu"].startswith("neoverse-n1")
        and first.document["measured"] == 8
    )
    again = mest_compile_command(*command)
    assert again.document["measured"] == 0 and again.document["tasks"] == first.document["tasks"]
    model = build_model("mlp", (8, 3, 32, 32), 10, 16, 0)
    step = mest.compile(model, (8, 3, 32, 32), target=TARGET, records=Records(TARGET, [log]))
    assert step.describe()["kernels"]["exact, modelled"] == 8
    step.save(tmp_path / "step.safetensors")
    assert mest.load(tmp_path / "step.safetensors").describe()["kernels"] == step.describe()["kernels"]


def test_the_page_has_the_table_of_the_recorded_figures():
    page = neon.DOCUMENT.read_text()
    assert neon.embed(page, neon.table(json.loads(neon.RESULTS.read_text()))) == page, "run python benchmarks/neon.py"
