"""A step on an OpenCL device behind TVM's tracker: the library that is sent, the runtime that takes it, ten steps,
mutation, training.

The device is this machine's driver, the runtime TVM's own with the OpenCL part that `serve --opencl` compiles.
"""

import dataclasses
import itertools
import json
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from device import emulated
from libraries import check_library
from test_schemes_step import Small
from test_step import assert_like_torch, make_batches, masked_steps

import mest_compile as mest
from mest_compile.backends.opencl import serving as opencl_runtime
from mest_compile.backends.opencl.runner import find_device
from mest_compile.base.errors import NotInstalled, TargetError
from mest_compile.devices.runner import RemoteRunner
from mest_compile.hardware import target as hardware
from mest_compile.kernels.linking import find_linker

pytest.importorskip("pyopencl", reason="pyopencl is not installed")

SHAPE = (8, 3, 8, 8)
OPTIMIZER = mest.SGD(lr=0.01, momentum=0.9, weight_decay=1e-3)
HERE = dataclasses.replace(
    hardware.find_target("mali"), host_triple=None
)  # the phone's kernels, launched by this machine's CPU


def compiled(target=HERE, device=None):
    torch.manual_seed(0)
    model = Small(8)
    return mest.compile(
        model,
        SHAPE,
        scheme="block",
        sparsity=0.7,
        dense_layers=["conv1", "fc"],
        target=target,
        optimizer=OPTIMIZER,
        device=device,
    ), model


@contextmanager
def served(folder, port, key, *options):
    """A device of that key."""
    command = [
        sys.executable,
        "-c",
        "from mest_compile.cli import main; main()",
        "serve",
        "--tracker",
        f"127.0.0.1:{port}",
        "--key",
        key,
        "--port",
        str(emulated.free_port()),
        *options,
    ]
    started = emulated.Started(command, folder / f"serve{time.monotonic_ns()}.log", "serves at")
    try:
        yield mest.rpc(f"127.0.0.1:{port}", key, wait_seconds=30)
    finally:
        started.kill()


@pytest.fixture(scope="module")
def gpu(folder, port):
    try:
        opencl_runtime.opencl_runtime()
    except NotInstalled as lacking:
        pytest.skip(str(lacking))
    with served(folder, port, "gpu", "--opencl") as device:
        yield device


def test_ten_steps_and_a_mutation_equal_torch_and_to_the_bit_what_runs_here(gpu):
    there, model = compiled(device=gpu)
    here, _ = compiled()
    batches = make_batches(SHAPE, 10, 10)
    got = [
        there(*batch, lr=0.01, ahead=following).loss for batch, following in itertools.zip_longest(batches, batches[1:])
    ]
    wanted, _ = masked_steps(model, there.masks(), batches, 0.01, OPTIMIZER)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert_like_torch(there, model, batches[0][0])
    assert got == [here(*batch, lr=0.01).loss for batch in batches]
    mine, theirs = here.state_dict(), there.state_dict()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)

    reports = [step.mutate(prune_to=0.8, grow_to=0.7, rng=np.random.default_rng(0)) for step in (here, there)]
    changed = [name for name, fate in reports[1].layers.items() if fate != "unchanged"]
    held = sum(there._state.get(name).nbytes for name in there._state.held if name.partition(":")[0] in changed)
    assert reports[0].layers == reports[1].layers and changed
    assert 0 < reports[1].uploaded_bytes <= held and reports[0].uploaded_bytes == 0
    assert there.set_masks(there.masks()).uploaded_bytes == 0
    assert there(*batches[0], lr=0.01).loss == here(*batches[0], lr=0.01).loss
    assert np.array_equal(there.predict(batches[0][0]), here.predict(batches[0][0]))
    there.close()


def test_a_run_over_the_tracker_trains_as_one_that_runs_here(mest_compile_command, gpu, tmp_path):
    options = ["--model", "mlp", "--width", 32, "--data", "digits", "--scheme", "unstructured", "--epochs", 3, "--json"]
    options += ["--target", "opencl"]
    where = ["--tracker", str(gpu.tracker), "--key", gpu.key]
    there = mest_compile_command("train", *options, *where, "--out", tmp_path / "there")
    assert there.code == 0, there.err
    here = mest_compile_command("train", *options, "--out", tmp_path / "here")
    mutated = [epoch["mutation"] for epoch in there.document["epochs"] if epoch["mutation"]]
    assert mutated and all(
        ("re-indexed" in mutation["layers"]) == (mutation["uploaded_bytes"] > 0) for mutation in mutated
    )
    facts = [[(epoch["loss"], epoch["test_accuracy"]) for epoch in run.document["epochs"]] for run in (here, there)]
    assert facts[0] == facts[1]


def test_tuning_over_the_tracker_times_candidates_on_the_device(mest_compile_command, gpu, tmp_path):
    options = ["--model", "mlp", "--width", 16, "--batch", 8, "--trials", 3, "--target", "opencl", "--json"]
    log = tmp_path / "log.jsonl"
    ran = mest_compile_command("tune", *options, "--tracker", str(gpu.tracker), "--key", gpu.key, "--log", log)
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records and all(record["outcome"] == "ok" and min(record["seconds"]) > 0 for record in records), records
    assert all(record["target"]["device"] == "opencl" for record in records)


def test_a_speed_table_of_the_device_names_its_gpu(mest_compile_command, gpu):
    options = [
        "--model",
        "mlp",
        "--width",
        32,
        "--batch",
        8,
        "--schemes",
        "unstructured",
        "--sparsities",
        0.9,
        "--repeats",
        2,
        "--json",
    ]
    ran = mest_compile_command("table", *options, "--target", "opencl", "--tracker", str(gpu.tracker), "--key", gpu.key)
    assert ran.code == 0, ran.err
    assert ran.document["opencl"] == find_device().name and ran.document["rows"][0]["speedup"] > 0


def test_a_device_without_opencl_says_so(folder, port):
    with (
        served(folder, port, "plain") as device,
        pytest.raises(TargetError, match="plain at .* has no opencl.*docs/devices.md"),
    ):
        RemoteRunner(device, b"", {}, 1, hardware.find_target("opencl"))


@pytest.mark.parametrize("target", ["mali-g78", "adreno-740"])
def test_a_phones_step_is_a_library_for_its_cpu_that_holds_the_opencl_code_and_is_made_once(
    target, tmp_path, monkeypatch
):
    there = hardware.find_target(target)
    try:
        find_linker(there.processor)
    except NotInstalled as lacking:
        pytest.skip(str(lacking))
    step, _ = compiled(target=there)
    content = step._compiled.library()
    facts = check_library(content, there.processor)
    assert facts.machine == "aarch64" and not facts.needed
    symbols = {source.symbol for source in step._compiled.sources.values()}
    assert all(f"__kernel void {symbol}_kernel".encode() in content for symbol in symbols)
    monkeypatch.setattr("mest_compile.backends.opencl.linking.compile_opencl_library", None)
    assert step._compiled.library() == content


def test_what_makes_the_runtime_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(opencl_runtime, "LIBRARIES", ("-lno_such_library",))
    with pytest.raises(NotInstalled, match="no_such_library.*apt install g"):
        opencl_runtime.opencl_runtime(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NotInstalled, match="no C.. compiler"):
        opencl_runtime.opencl_runtime(tmp_path)
    assert not list(tmp_path.iterdir())
