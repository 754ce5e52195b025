"""Sparse training on another device: an emulated aarch64 machine behind TVM's tracker. What it proves is the way, never speed."""

import itertools
import logging
import time

import numpy as np
import pytest
from device import emulated
from test_step import assert_like_torch, make_batches, masked_steps

import mest_compile as mest
from mest_compile.elf import read_library
from mest_compile.hardware import find_target
from mest_compile.linking import check_library
from mest_compile.models import build_model
from mest_compile.recipe import Recipe
from mest_compile.training import Trainer

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

SHAPE = (8, 3, 16, 16)
OPTIMIZER = mest.SGD(lr=0.002, momentum=0.9, weight_decay=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def port(folder):
    with emulated.tracker(folder) as (_, port):
        yield port


@pytest.fixture
def phone(folder, port):
    with emulated.device(folder, port):
        yield mest.rpc(f"127.0.0.1:{port}", "emulated", wait_seconds=30)


def compiled(device=None, scheme="block", target="arm_cpu", model=None, **options):
    model = model or build_model("resnet20", SHAPE, 10, 8)
    return mest.compile(model, SHAPE, scheme=scheme, sparsity=0.9, optimizer=OPTIMIZER, target=target, device=device, threads=1, **options)


@pytest.mark.parametrize("scheme", ["block", "pattern", "unstructured"])
def test_ten_steps_on_the_device_equal_torch_as_they_do_here(scheme, phone):
    model = build_model("resnet20", SHAPE, 10, 8)
    step, batches = compiled(phone, scheme, model=model), make_batches(SHAPE, 10, 10)
    got = [step(*batch, lr=0.002, ahead=following).loss for batch, following in itertools.zip_longest(batches, batches[1:])]
    wanted, _ = masked_steps(model, step.masks(), batches, 0.002, OPTIMIZER)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert_like_torch(step, model, batches[0][0])
    here = compiled(scheme=scheme, target="local")
    np.testing.assert_allclose(got, [here(*batch, lr=0.002).loss for batch in batches], rtol=1e-5)
    step.close()


def test_a_mutation_uploads_the_changed_layers_and_nothing_else(phone):
    step = compiled(phone)
    changed = list(step.masks())[3]
    masks = {name: mask.copy() for name, mask in step.masks().items()}
    masks[changed] = np.roll(masks[changed], 1, axis=1)
    report = step.set_masks(masks)
    held = {name: step._get(name).nbytes for name in step._held if name == changed or name.startswith(f"{changed}:")}
    assert [name for name, fate in report.layers.items() if fate != "unchanged"] == [changed]
    assert 0 < report.uploaded_bytes <= sum(held.values())
    assert step.set_masks(masks).uploaded_bytes == 0
    step.close()


def test_a_run_over_the_tracker_trains_mutates_and_ends_as_one_that_runs_here(mest_compile_command, phone, tmp_path):
    options = ["--model", "mlp", "--width", 32, "--data", "digits", "--scheme", "unstructured", "--epochs", 3, "--threads", 1]
    where = ["--target", "arm_cpu", "--tracker", f"{phone.host}:{phone.port}", "--key", phone.key]
    there = mest_compile_command("train", *options, *where, "--out", tmp_path / "there", "--json")
    assert there.code == 0, there.err
    here = mest_compile_command("train", *options, "--out", tmp_path / "here", "--json")
    mutated = [epoch["mutation"] for epoch in there.document["epochs"] if epoch["mutation"]]
    assert mutated[0]["layers"] == {"re-indexed": 2}
    assert all(("re-indexed" in mutation["layers"]) == (mutation["uploaded_bytes"] > 0) for mutation in mutated)
    losses = [[epoch["loss"] for epoch in run.document["epochs"]] for run in (here, there)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)  # float32 in another order, over 60 steps of a rate of 0.1


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
    recipe, port = Recipe(3, "em", lr=0.01, mutate_every=1), emulated.free_port()
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
        with caplog.at_level(logging.WARNING, "mest_compile.training"):
            run = Trainer(step, recipe, tmp_path / way, killer).fit(data, data)
        whole = Trainer(compiled(mest.rpc(f"127.0.0.1:{port}", "emulated")) if step.close() is None else None, recipe,
                        tmp_path / "whole").fit(data, data)
    finally:
        for manager in reversed(started):
            manager.__exit__(None, None, None)
    assert "is lost" in caplog.text and "the run goes on at epoch 2" in caplog.text
    assert killer.epochs == [1, 2, 3]
    assert [epoch["loss"] for epoch in run.history] == [epoch["loss"] for epoch in whole.history]


def test_two_devices_of_one_key_work_side_by_side(folder, port):
    with emulated.device(folder, port, "pair"), emulated.device(folder, port, "pair"):
        steps = [compiled(mest.rpc(f"127.0.0.1:{port}", "pair", wait_seconds=20)) for _ in range(2)]
        batch = make_batches(SHAPE, 10, 1)[0]
        assert steps[0](*batch).loss == steps[1](*batch).loss
        with pytest.raises(mest.MestError, match=r"none to be had within 1 s .*mest-compile tracker --query"):
            compiled(mest.rpc(f"127.0.0.1:{port}", "pair", wait_seconds=1))
        for step in steps:
            step.close()


def test_the_tracker_lists_its_devices(mest_compile_command, phone):
    (entry,) = [entry for entry in mest_compile_command("tracker", "--query", f"{phone.host}:{phone.port}", "--json").document
                if entry["key"] == "emulated"]
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
    step._put(name, np.zeros(3, np.float32))
    with pytest.raises(mest.MestError, match=f"device emulated at .*: {'loss'} cannot be read: .*"):
        step(*batch)
    step.close()


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
    with pytest.raises(mest.MestError, match="cannot run what is compiled for arm_cpu; give device=mest.rpc"):
        step(*make_batches(SHAPE, 10, 1)[0])


@pytest.mark.parametrize("arguments, message", [
    (("127.0.0.1", "phone"), "wanted host:port"), (("127.0.0.1:9190", ""), "the key under which"),
    (("127.0.0.1:9190", "phone", 0), "more than 0"), (("127.0.0.1:123456", "phone"), "wanted host:port"),
])
def test_what_cannot_be_a_device_is_refused(arguments, message):
    with pytest.raises(mest.MestError, match=message):
        mest.rpc(*arguments)


def test_what_is_no_library_is_refused():
    with pytest.raises(mest.MestError, match="not a whole ELF shared library"):
        read_library(b"\x7fELF\x02\x01" + bytes(10))
    with pytest.raises(mest.MestError, match="not a whole ELF shared library"):
        read_library(b"#!/bin/sh\n" + bytes(100))
