"""Sparse training on another device: an emulated aarch64 machine behind TVM's tracker. What it proves is the way, never
speed."""

import itertools
import logging
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from device import emulated
from libraries import check_library
from nets import short_resnet
from test_step import assert_like_torch, make_batches, masked_steps
from test_tuning import spoilt

import mest_compile as mest
from mest_compile.base.errors import UsageError
from mest_compile.devices import probe
from mest_compile.frontend import import_model
from mest_compile.hardware.cpu import host_model
from mest_compile.hardware.target import find_target
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.elf import read_library
from mest_compile.kernels.linkers import linkers
from mest_compile.kernels.linking import link_kernel
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.records.log import Measure, Record, Records
from mest_compile.training.freezing import FreezeRule
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.tuning.command import Request, tune
from mest_compile.tuning.runner import RunnerOptions, find_runner
from mest_compile.tuning.task import prepare, tasks_of

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

SHAPE = (8, 3, 16, 16)
OPTIMIZER = mest.SGD(lr=0.002, momentum=0.9, weight_decay=1e-3)


@pytest.fixture
def phone(folder, port):
    with emulated.device(folder, port):
        yield mest.rpc(f"127.0.0.1:{port}", "emulated", wait_seconds=30)


def compiled(device=None, scheme="block", target="arm_cpu", model=None, **options):
    model = model or short_resnet(SHAPE)
    return mest.compile(
        model,
        SHAPE,
        scheme=scheme,
        sparsity=0.9,
        optimizer=OPTIMIZER,
        target=target,
        device=device,
        threads=1,
        **options,
    )


@pytest.mark.parametrize("scheme", ["block", "pattern", "unstructured"])
def test_ten_steps_on_the_device_equal_torch_as_they_do_here(scheme, phone):
    model = short_resnet(SHAPE)
    step, batches = compiled(phone, scheme, model=model), make_batches(SHAPE, 10, 10)
    got = [
        step(*batch, lr=0.002, ahead=following).loss for batch, following in itertools.zip_longest(batches, batches[1:])
    ]
    wanted, _ = masked_steps(model, step.masks(), batches, 0.002, OPTIMIZER)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert_like_torch(step, model, batches[0][0])
    here = compiled(scheme=scheme, target="local")
    np.testing.assert_allclose(got, [here(*batch, lr=0.002).loss for batch in batches], rtol=1e-5)
    if scheme == "block":  # one of the examples that are left comes ahead, and another goes behind it
        few = make_batches((3, *SHAPE[1:]), 10, 1)[0]
        got = [step(*batches[0], lr=0.002, ahead=few).loss, step(*few, lr=0.002, ahead=batches[1]).loss]
        got.append(step(*batches[1], lr=0.002).loss)
        wanted = [here(*batch, lr=0.002).loss for batch in (batches[0], few, batches[1])]
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
    step.close()


def test_passes_add_up_on_the_device_as_they_do_here(phone):
    options = {"scheme": "unstructured", "optimizer": OPTIMIZER, "threads": 1, "microbatch": 2}
    there = mest.compile("mlp", (6, 1, 8, 8), target="arm_cpu", device=phone, **options)
    here = mest.compile("mlp", (6, 1, 8, 8), **options)
    batches = [make_batches((size, 1, 8, 8), 10, 1, seed=size)[0] for size in (6, 5, 6)]
    for batch, following in itertools.zip_longest(batches, batches[1:]):
        got, wanted = there(*batch, ahead=following), here(*batch)
        assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
        np.testing.assert_array_equal(got.correct, wanted.correct)
    there.close()


def test_a_mutation_uploads_the_changed_layers_and_nothing_else(phone):
    step = compiled(phone)
    changed = list(step.masks())[3]
    masks = {name: mask.copy() for name, mask in step.masks().items()}
    masks[changed] = np.roll(masks[changed], 1, axis=1)
    report = step.set_masks(masks)
    held = {
        name: step._state.get(name).nbytes
        for name in step._state.held
        if name == changed or name.startswith(f"{changed}:")
    }
    assert [name for name, fate in report.layers.items() if fate != "unchanged"] == [changed]
    assert 0 < report.uploaded_bytes <= sum(held.values())
    assert step.set_masks(masks).uploaded_bytes == 0
    step.close()


def test_a_run_over_the_tracker_trains_mutates_and_ends_as_one_that_runs_here(mest_compile_command, phone, tmp_path):
    options = [
        "--model",
        "mlp",
        "--width",
        32,
        "--data",
        "digits",
        "--scheme",
        "unstructured",
        "--epochs",
        3,
        "--threads",
        1,
    ]
    where = ["--target", "arm_cpu", "--tracker", str(phone.tracker), "--key", phone.key]
    there = mest_compile_command("train", *options, *where, "--out", tmp_path / "there", "--json")
    assert there.code == 0, there.err
    here = mest_compile_command("train", *options, "--out", tmp_path / "here", "--json")
    mutated = [epoch["mutation"] for epoch in there.document["epochs"] if epoch["mutation"]]
    assert mutated[0]["layers"] == {"re-indexed": 2}
    assert all(("re-indexed" in mutation["layers"]) == (mutation["uploaded_bytes"] > 0) for mutation in mutated)
    losses = [[epoch["loss"] for epoch in run.document["epochs"]] for run in (here, there)]
    np.testing.assert_allclose(
        losses[1], losses[0], rtol=1e-2
    )  # float32 in another order, over 60 steps of a rate of 0.1


class Killer:
    """Takes the device away in the middle of an epoch, once, and brings another."""

    def __init__(self, epoch, batch, strike):
        self.when, self.strike, self.epochs = (epoch, batch), strike, []

    def on_batch(self, epoch, epochs, batch, batches, loss, correct):
        if (epoch, batch) == self.when:
            self.when = None
            self.strike()

    def on_epoch(self, metrics):
        self.epochs.append(metrics["epoch"])


@pytest.mark.parametrize("way", ["killed", "tracker"])
def test_a_device_lost_in_mid_epoch_costs_the_steps_since_the_checkpoint(way, folder, tmp_path, caplog):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (48, 3, 16, 16), dtype=np.uint8), rng.integers(0, 10, 48)
    recipe, port = Recipe(3, "em", mutate_every=1, drop_last=True), emulated.free_port()
    started = []

    def begin(manager):
        started.append(manager)
        return manager.__enter__()

    def strike():
        first.kill()
        if way == "tracker":
            tracker.kill()
            time.sleep(0.5)
            begin(emulated.tracker(folder, port))
        begin(emulated.device(folder, port))

    tracker, _ = begin(emulated.tracker(folder, port))
    first = begin(emulated.device(folder, port))
    try:
        step = compiled(mest.rpc(f"127.0.0.1:{port}", "emulated", wait_seconds=60))
        killer = Killer(2, 3, strike)
        with caplog.at_level(logging.WARNING, "mest_compile.training.loop"):
            run = Trainer(step, recipe, tmp_path / way, killer).fit(data, data)
        whole = Trainer(
            compiled(mest.rpc(f"127.0.0.1:{port}", "emulated")) if step.close() is None else None,
            recipe,
            tmp_path / "whole",
        ).fit(data, data)
    finally:
        for manager in reversed(started):
            manager.__exit__(None, None, None)
    assert "is lost" in caplog.text and "the run goes on at epoch 2" in caplog.text
    assert killer.epochs == [1, 2, 3]
    assert [epoch["loss"] for epoch in run.history] == [epoch["loss"] for epoch in whole.history]


def test_two_devices_of_one_key_work_side_by_side(folder, port):
    with emulated.device(folder, port, "pair"), emulated.device(folder, port, "pair"):
        runner = find_runner("rpc")(find_target("arm_cpu"), RunnerOptions(f"127.0.0.1:{port}", "pair"))
        assert runner.devices == 2  # all that there are
        runner.close()
        steps = [compiled(mest.rpc(f"127.0.0.1:{port}", "pair", wait_seconds=20)) for _ in range(2)]
        batch = make_batches(SHAPE, 10, 1)[0]
        assert steps[0](*batch).loss == steps[1](*batch).loss
        with pytest.raises(mest.MestError, match=r"none to be had within 1 s .*mest-compile tracker --query"):
            compiled(mest.rpc(f"127.0.0.1:{port}", "pair", wait_seconds=1))
        for step in steps:
            step.close()


TUNED = ["--model", "mlp", "--width", 16, "--batch", 8, "--scheme", "block:4x1", "--target", "cortex-a76"]


def tuned_step(log):
    target = find_target("cortex-a76")
    model = build_model("mlp", (8, 3, 32, 32), 10, 16, 0)
    return mest.compile(model, (8, 3, 32, 32), scheme="block:4x1", target=target, records=Records(target, [log]))


@pytest.mark.parametrize("counting", [False, True])
def test_tuning_over_the_tracker_keeps_what_an_emulated_device_says_apart(
    counting, mest_compile_command, folder, port, tmp_path
):
    """Its time never chooses; what it counts is a model's, and does."""
    log, key = tmp_path / "log.jsonl", "counting" if counting else "timing"
    with emulated.device(folder, port, key, counting):
        ran = mest_compile_command(
            "tune",
            *TUNED,
            "--trials",
            1 + counting,
            "--tracker",
            f"127.0.0.1:{port}",
            "--key",
            key,
            "--log",
            log,
            "--json",
        )
    assert ran.code == 0, ran.err
    assert ran.document["finished"] and all(set(task["outcomes"]) == {"ok"} for task in ran.document["tasks"])
    records = [Record.from_line(line) for line in log.read_text().splitlines()]
    assert len(records) >= ran.document["measured"] >= 8 + counting
    assert {record.measure for record in records} == {Measure.MODELLED if counting else Measure.EMULATED}
    assert all(
        record.cpu == ("instructions, by the device's counter" if counting else f"emulated on {host_model()}")
        for record in records
    )
    kernels = tuned_step(log).describe()["kernels"]
    assert (
        kernels.get("exact, modelled", 0) == (8 if counting else 0)
        and "exact" not in kernels
        and "nearest" not in kernels
    )


@pytest.mark.parametrize("when", ["comes", "is there"])
def test_tuning_goes_on_when_its_device_is_killed_and_another(when, folder, port, tmp_path, caplog):
    class Strike:
        trials = 0

        def on_stage(self, *unused):
            pass

        def on_trial(self, *unused):
            self.trials += 1
            if self.trials == 3:
                first.kill()
                if when == "comes":
                    devices.enter_context(emulated.device(folder, port, key))

    log, key = tmp_path / "log.jsonl", f"mortal-{when.replace(' ', '-')}"
    with ExitStack() as devices:
        first = devices.enter_context(emulated.device(folder, port, key))
        if when == "is there":
            devices.enter_context(emulated.device(folder, port, key))
        request = Request("mlp", (8, 3, 32, 32), 16, StepOptions("block:4x1", target="cortex-a76"), log=log)
        result = tune(request, RunnerOptions(f"127.0.0.1:{port}", key), 1, progress=Strike())
    assert result.finished and result.measured == len(log.read_text().splitlines()) == 8
    assert all(task.outcomes == {"ok": 1} for task in result.tasks)
    assert f"device {key} at 127.0.0.1" in caplog.text and "was lost while it timed" in caplog.text


def test_kernels_that_are_wrong_crash_or_hang_cost_their_trial_only(phone, tmp_path):
    target = find_target("cortex-a76")
    graph, _ = import_model(build_model("mlp", (8, 3, 8, 8), 10, 16, 0), (8, 3, 8, 8))
    plan = plan_step(graph, StepOptions("block:4x1", 0.8, target=target))
    program, layers = plan.train, plan.layers
    task = tasks_of(program, layers, target, tmp_path)[0]
    prepare(task, program, layers, Builder())
    outcomes, source = {}, task.source({})
    runner = find_runner("rpc")(target, RunnerOptions(str(phone.tracker), phone.key, timeout_seconds=2))
    assert runner.devices == 1
    try:
        for variant in ("wrong", "crashing", "hanging", "right"):
            changed = replace(source, text=spoilt(source.text, variant))
            link_kernel(changed, tmp_path / f"{variant}.so")
            outcomes[variant] = runner.run(task, tmp_path / f"{variant}.so", changed.symbol).outcome.value
    finally:
        runner.close()
    assert outcomes == {"wrong": "wrong-answer", "crashing": "crashed", "hanging": "timed-out", "right": "ok"}


def test_a_device_that_the_target_does_not_describe_is_refused(phone, monkeypatch):
    message = "device emulated at .* does not run code for target 'local'; choose the device's own target"
    with pytest.raises(mest.MestError, match=message):
        find_runner("rpc")(find_target("local"), RunnerOptions(str(phone.tracker), phone.key))
    model = build_model("mlp", (8, 1, 8, 8), 10, 16)
    with pytest.raises(mest.MestError, match=message):
        mest.compile(model, (8, 1, 8, 8), target="local", device=phone)
    monkeypatch.setattr(probe.DeviceFacts, "lacks", lambda facts, target: ["asimdhp"])
    with pytest.raises(
        mest.MestError, match="lacks asimdhp, which code for target 'arm_cpu' may use; choose the device's own target"
    ):
        mest.compile(model, (8, 1, 8, 8), target="arm_cpu", device=phone)


def test_tuning_without_a_device_ends_and_says_so(port, caplog, monkeypatch):
    monkeypatch.setattr("mest_compile.tuning.runners.rpc.PATIENCE_SECONDS", 1)
    monkeypatch.setattr("mest_compile.tuning.runners.rpc.ASKING_SECONDS", 0.6)
    with pytest.raises(
        mest.MestError, match="device nobody at .* asked for 1 s, again and again.*start again to go on"
    ):
        find_runner("rpc")(find_target("arm_cpu"), RunnerOptions(f"127.0.0.1:{port}", "nobody", timeout_seconds=0.1))
    assert len([record for record in caplog.records if "waiting up to 1 s" in record.getMessage()]) == 1


def test_whoever_waits_for_a_device_is_told(port, caplog, monkeypatch):
    monkeypatch.setattr("mest_compile.devices.session.SILENT_SECONDS", 0.5)
    with pytest.raises(mest.MestError, match="none to be had within 1 s .no device of that key is free"):
        mest.rpc(f"127.0.0.1:{port}", "nobody", wait_seconds=1).open()
    assert [record.getMessage() for record in caplog.records] == [
        f"device nobody at 127.0.0.1:{port}: no device of that key is free; waiting up to 1 s"
    ]


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "kernel", "wanted"),
    [
        ("aarch64", "vendor_id\t: AuthenticAMD", "cpu:type:x86,ven0002", True),
        ("aarch64", "CPU implementer\t: 0x41", "cpu:type:aarch64:f", False),
        ("arm", "CPU implementer\t: 0x41", "cpu:type:aarch64:f", False),
        ("x86_64", "vendor_id\t: AuthenticAMD", "cpu:type:x86,ven0002", False),
        ("aarch64", "vendor_id\t: AuthenticAMD", "", True),
        ("aarch64", "CPU implementer\t: 0x41", "", False),
        ("aarch64", "", "", False),
        ("aarch64", "CPU implementer\t: 0x41", "cpu:type:x86,ven0002", True),  # an emulator that makes up the first
    ],
)
def test_a_device_is_emulated_when_its_kernel_is_of_another_architecture(architecture, cpuinfo, kernel, wanted):
    assert probe.is_emulated(architecture, cpuinfo, kernel) == wanted


def test_the_features_that_a_device_lacks_are_named():
    facts = probe.DeviceFacts("a Pi 4", frozenset({"fp", "asimd", "crc32"}), False)
    assert facts.lacks(find_target("cortex-a76")) == ["asimddp", "asimdhp", "atomics", "fphp"]
    assert (
        facts.lacks(find_target("cortex-a72")) == replace(facts, emulated=True).lacks(find_target("cortex-a76")) == []
    )


def test_the_tracker_lists_its_devices(mest_compile_command, phone):
    (entry,) = [
        entry
        for entry in mest_compile_command("tracker", "--query", str(phone.tracker), "--json").document
        if entry["key"] == "emulated"
    ]
    assert entry["free"] == 1 and len(entry["devices"]) == 1


def test_a_device_that_stops_answering_is_lost(folder, port):
    import os
    import signal

    with emulated.device(folder, port, "mute") as started:
        step, batch = compiled(mest.rpc(f"127.0.0.1:{port}", "mute", silence_seconds=2)), make_batches(SHAPE, 10, 1)[0]
        step(*batch)
        os.killpg(started.process.pid, signal.SIGSTOP)
        with pytest.raises(mest.MestError, match="device mute at .* is lost: it has not answered for 2 s"):
            step(*batch)
        step.close()


def test_a_failure_of_what_was_not_waited_for_is_told_with_the_next_answer(phone):
    step, batch = compiled(phone), make_batches(SHAPE, 10, 1)[0]
    name = next(iter(step.masks()))
    step._state.put(name, np.zeros(3, np.float32))
    with pytest.raises(mest.MestError, match=f"device emulated at .*: {'loss'} cannot be read: .*"):
        step(*batch)
    step.close()


def test_what_any_linker_here_makes_runs_on_the_device(phone, monkeypatch):
    shape, found = (8, 1, 8, 8), linkers("aarch64")
    batch, losses = make_batches(shape, 10, 1)[0], []
    for linker in found:
        monkeypatch.setattr("mest_compile.kernels.linking.find_linker", lambda target, linker=linker: linker)
        step = mest.compile(build_model("mlp", shape, 10, 16), shape, target="arm_cpu", device=phone, threads=1)
        check_library(step._compiled.library(), find_target("arm_cpu"))
        losses.append(step(*batch).loss)
        step.close()
    assert found and len(set(losses)) == 1, dict(zip(found, losses))


@pytest.mark.parametrize("target", ["arm_cpu", "android-arm64", "local"])
def test_a_library_needs_nothing_but_libc_and_libm(target):
    step = compiled(target=target)
    found = check_library(step._compiled.library(), find_target(target))
    system = ".so" if target.startswith("android") else ".so.6"
    assert found.bits == 64 and found.machine == ("aarch64" if target != "local" else found.machine)
    assert set(found.needed) == {f"libm{system}", f"libc{system}"}
    assert {name for name in found.undefined if not name.startswith("TVM")} <= {"expf", "logf", "memset", "memcpy"}
    assert any(name.startswith("__tvm_ffi_mest_") for name in found.defined)


def test_a_step_for_another_machine_does_not_run_here():
    step = compiled()
    with pytest.raises(mest.MestError, match="cannot run what is compiled for arm_cpu .*; give device=mest.rpc"):
        step(*make_batches(SHAPE, 10, 1)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1", "phone"), "wanted host:port"),
        (("127.0.0.1:9190", ""), "without blanks and colons"),
        (("127.0.0.1:9190", "phone", 0), "more than 0"),
        (("127.0.0.1:123456", "phone"), "wanted host:port"),
    ],
)
def test_what_cannot_be_a_device_is_refused(arguments, message):
    with pytest.raises(mest.MestError, match=message):
        mest.rpc(*arguments)


def test_what_is_no_library_is_refused():
    with pytest.raises(mest.MestError, match="not a whole ELF shared library"):
        read_library(b"\x7fELF\x02\x01" + bytes(10))
    with pytest.raises(mest.MestError, match="not a whole ELF shared library"):
        read_library(b"#!/bin/sh\n" + bytes(100))


def test_a_step_on_the_device_freezes_as_one_here(phone, tmp_path):
    model = build_model("mlp", SHAPE, 10, 32, 0)
    steps = [compiled(phone, model=model), compiled(target="local", model=model)]
    batches = make_batches(SHAPE, 10, 5)
    parts = list(steps[0].freezing_parts().values())[:2]
    losses = []
    for step in steps:
        step.plan_freezing(parts)
        losses.append([step(*batch, lr=[0.02, 0.01, 0.02]).loss for batch in batches[:2]])
        step.save(tmp_path / "before")
        need = step.memory()["total"]
        step.freeze("fc1.*")
        assert step.memory()["total"] < need
        losses[-1] += [step(*batch, lr=[0.02, 0.01, 0.02]).loss for batch in batches[2:]]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    away, _ = steps
    away.reconnect()
    away.restore(tmp_path / "before")  # of before anything froze
    assert not away.describe()["frozen"] and np.isfinite(away(*batches[2], lr=0.02).loss)
    data = np.zeros((8, *SHAPE[1:]), np.float32), np.zeros(8, int)
    with pytest.raises(UsageError, match='of is "time", and a step on another device cannot be profiled'):
        Trainer(away, Recipe(4, "static", freeze=FreezeRule(0.1, "time"))).fit(data, data)
    whole = away.memory()["total"]
    budget = Recipe(2, "em_s", 0.05, mutate_every=1, budget_at_mutations=whole - 1, drop_last=True)
    run = Trainer(away, budget).fit(data)  # the full step is compiled here, to choose by its gradients
    assert [metrics["budget"]["since"] for metrics in run.history] == [1, 2]
    assert away.memory()["total"] < whole and away.describe()["frozen"]
    away.close()
