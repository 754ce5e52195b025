"""`mest-compile serve`: TVM's own Python server on this machine, behind a tracker, driven as a board would be."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from device import emulated
from packaging.requirements import Requirement
from test_tuning import TINY, spoilt

from mest_compile.frontend import import_model
from mest_compile.hardware.cpu import host_model
from mest_compile.hardware.target import find_target
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.linking import link_kernel
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.tuning.runner import RunnerOptions, find_runner
from mest_compile.tuning.task import prepare, tasks_of

IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL", "xgboost-cpu": "xgboost"}


def absent() -> list[str]:
    """Modules of our requirements that a board does not have when it was set up as docs/devices.md says."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "devices.md").read_text()
    line = next(
        line for line in page.splitlines() if line.strip().startswith("pip install apache-tvm==") and "typer" in line
    )
    installed = {re.split(r"[=<>]", word)[0] for word in line.split()[2:]}
    ours = {
        requirement.name
        for requirement in map(Requirement, metadata.requires("mest-compile"))
        if requirement.marker is None
    }
    return sorted(IMPORTED_AS.get(name, name) for name in ours - installed)


SERVE = [
    sys.executable,
    "-c",
    f"import sys; sys.modules.update(dict.fromkeys({absent()})); from mest_compile.cli import main; main()",
    "serve",
    "--key",
    "board",
]


def test_a_board_lacks_what_only_compiling_needs():
    assert {"torch", "pandas", "platformdirs", "sklearn", "xgboost"} <= set(absent())


@pytest.fixture(scope="module")
def board(folder, port):
    """("host:port" of a tracker, the serving process)."""
    started = emulated.Started(
        [*SERVE, "--tracker", f"127.0.0.1:{port}", "--port", str(emulated.free_port())],
        folder / "board.log",
        "board serves at",
    )
    yield f"127.0.0.1:{port}", started
    started.kill()


def where(board):
    return ["--tracker", board[0], "--key", "board"]


def test_a_run_on_a_board_is_the_run_here(board, mest_compile_command, tmp_path):
    options = [
        "--model",
        "mlp",
        "--width",
        16,
        "--data",
        "digits",
        "--scheme",
        "unstructured",
        "--epochs",
        2,
        "--threads",
        1,
        "--json",
    ]
    runs = [
        mest_compile_command("train", *options, *more, "--out", tmp_path / name)
        for name, more in (("there", where(board)), ("here", []))
    ]
    assert [run.code for run in runs] == [0, 0], runs[0].err
    there, here = ([epoch["loss"] for epoch in run.document["epochs"]] for run in runs)
    assert there == here


def test_a_device_behind_a_tracker_measures(board, mest_compile_command, tmp_path):
    ran = mest_compile_command(*TINY, "--trials", "2", "--log", tmp_path / "local.jsonl", *where(board), "--json")
    assert ran.code == 0, ran.err
    assert ran.document["finished"] and ran.document["measure"] == "measured" and ran.document["measured"] >= 8
    assert all(set(task["outcomes"]) == {"ok"} for task in ran.document["tasks"])


def test_a_table_is_measured_on_the_board(board, mest_compile_command):
    ran = mest_compile_command(
        "table",
        "--model",
        "mlp",
        "--width",
        16,
        "--batch",
        8,
        "--schemes",
        "unstructured,pattern",
        "--sparsities",
        "0.9",
        "--repeats",
        2,
        *where(board),
        "--json",
    )
    assert ran.code == 0, ran.err
    table = ran.document
    first, second = table["rows"]
    assert table["baseline"] == "mest-dense" and not table["emulated"] and table["machine"]["cpu"] == host_model()
    assert 0 < first["step_seconds"] < 1 and first["speedup"] == pytest.approx(
        first["baseline_seconds"] / first["step_seconds"]
    )
    assert (
        first["speedup_low"] <= first["speedup"] <= first["speedup_high"]
        and first["planned_bytes"] > 0
        and first["peak_bytes"] is None
    )
    assert "pattern" in second["problem"] and second["step_seconds"] is None


def test_a_board_goes_on_serving_after_a_kernel_that_crashes_or_hangs(board, tmp_path):
    target = find_target("local").for_batch(8)
    graph, _ = import_model(build_model("mlp", (8, 3, 8, 8), 10, 16, 0), (8, 3, 8, 8))
    plan = plan_step(graph, StepOptions("block:4x1", 0.8, target=target))
    program, layers = plan.train, plan.layers
    task = tasks_of(program, layers, target, tmp_path)[0]
    prepare(task, program, layers, Builder())
    outcomes, source = [], task.source({})
    runner = find_runner("rpc")(target, RunnerOptions(board[0], "board", timeout_seconds=2))
    try:
        for variant in ("crashing", "hanging", "right"):
            changed = replace(source, text=spoilt(source.text, variant))
            link_kernel(changed, tmp_path / f"{variant}.so")
            outcomes.append(runner.run(task, tmp_path / f"{variant}.so", changed.symbol).outcome.value)
    finally:
        runner.close()
    assert outcomes == ["crashed", "timed-out", "ok"]
    assert "exited unsuccessfully" in board[1].log.read_text() and board[1].process.poll() is None


def test_a_port_that_is_taken_is_said(board, tmp_path):
    port = board[1].log.read_text().split("board serves at 127.0.0.1:")[1].split()[0]
    ran = subprocess.run([*SERVE, "--tracker", board[0], "--port", port], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "choose another --port" in ran.stderr
