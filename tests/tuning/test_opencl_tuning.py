"""Tuning on an OpenCL device: from the command line, with limits that some candidates exceed, and with a driver that
refuses."""

import json
from collections import Counter
from dataclasses import replace
from importlib import resources

import pytest
from typer.testing import CliRunner

from mest_compile.cli import app
from mest_compile.hardware import target as hardware
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import kernel_source
from mest_compile.operators.layers.gather import GatherGrad
from mest_compile.records.log import Outcome
from mest_compile.tuning.runner import RunnerOptions, find_runner
from mest_compile.tuning.task import Arrays, Task

pytest.importorskip("pyopencl", reason="pyopencl is not installed")
TRIALS = 2


def test_tune_for_a_device_with_little_local_memory(tmp_path):
    """The command line, on PoCL: every trial is a record, what does not fit is a failure, the winners are right
    answers."""
    text = (resources.files("mest_compile.targets") / "opencl.toml").read_text()
    target, log = tmp_path / "tight.toml", tmp_path / "records.jsonl"
    target.write_text(text.replace("local_bytes = 16384", "local_bytes = 2560"))
    ran = CliRunner().invoke(
        app,
        [
            "tune",
            "--target",
            str(target),
            "--model",
            "mlp",
            "--batch",
            "8",
            "--trials",
            str(TRIALS),
            "--log",
            str(log),
            "--json",
        ],
    )
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert said["finished"] and said["measure"] == "measured"
    assert {task["kernel"] for task in said["tasks"]} == {"gather.conv", "gather.grad"}
    assert all(task["best_seconds"] for task in said["tasks"])
    records = [json.loads(line) for line in log.read_text().splitlines()]
    outcomes = Counter(record["outcome"] for record in records)
    assert outcomes["ok"] > TRIALS and not outcomes["wrong-answer"]
    assert outcomes.keys() <= {
        "ok",
        "build-failed",
    }  # the search draws candidates that do not fit, or none: see the next test
    failed = [record for record in records if record["outcome"] == "build-failed"]
    assert all("bytes of local memory; tight has 2560" in record["message"] for record in failed)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"local_bytes": 256}, "bytes of local memory; opencl has 256"),
        ({"threads": 1 << 14, "most_threads": 1 << 14, "local_bytes": 1 << 30}, "needs work-groups of 16384 threads"),
    ],
    ids=["target", "driver"],
)
def test_what_does_not_fit_is_a_failed_build(tmp_path, limits, message):
    """More local memory than the target's file allows; a work-group of more threads than the device has, though the
    file allows them."""
    target = hardware.find_target("opencl")
    limited = replace(target, gpu=replace(target.gpu, **limits))
    image = Image(4, 128, 256, 4, (0, 0, 0, 0), 4)
    problem = GatherGrad(image, image, 1, 1, (1, 1), 4)
    task = Task("layer.grad_weight", "gather.grad", problem, 4, 1, limited, tmp_path / "arrays.npz")
    source = kernel_source("gather.grad", problem, limited)
    Arrays([], {}, 0.0, ()).save(task.arrays)
    runner = find_runner("opencl")(limited, RunnerOptions(timeout_seconds=60))
    try:
        timing = runner.attempt(task, source, tmp_path)
    finally:
        runner.close()
    assert timing.outcome is Outcome.BUILD_FAILED and message in timing.message
