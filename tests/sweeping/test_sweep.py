"""Sweeps: what is finished is not trained again, what was stopped goes on, every cell is what it is when trained
alone."""

import json
import os
import subprocess
import sys
import time

import pytest
from here import Here
from test_kill import assert_same, outcome

import mest_compile as mest
from mest_compile import compiling
from mest_compile.base import plugins
from mest_compile.base.errors import StateError, UsageError
from mest_compile.cli import main
from mest_compile.hardware import host
from mest_compile.sweeping import pace, running
from mest_compile.sweeping.results import SweepResults
from mest_compile.sweeping.sweep import read
from mest_compile.sweeping.workers import LOST, LocalWorkers

PLAN = {
    "epochs": 3,
    "mutate_every": 1,
    "run": {"model": "mlp", "width": 16, "data": "digits", "val_split": 0.1},
    "grid": {"scheme": ["block", "unstructured"], "sparsity": [0.8]},
    "list": [{"method": "em_s", "seed": 0}, {"method": "static", "seed": 1}],
}


@pytest.fixture
def workers(monkeypatch):
    """Makes sweeps run here; returns a function that says by what."""

    def use(found):
        for module in ("sweep", "pace"):
            monkeypatch.setattr(f"mest_compile.sweeping.{module}.local_workers", lambda cells, threads: found)
        monkeypatch.setattr(running, "LOOKS_SECONDS", 0.0)
        return found

    return use


def test_a_sweep_that_is_stopped_extended_and_run_again_trains_every_cell_once(workers, tmp_path):
    root, plan = tmp_path / "sweep", {**PLAN, "grid": {"scheme": ["block"]}}
    first = workers(Here(stops=[2]))  # within its second cell
    with pytest.raises(KeyboardInterrupt):
        mest.sweep(plan, root)
    assert [command[1] for command in first.commands] == ["--recipe", "--recipe"]
    second = workers(Here())
    found = mest.sweep(plan, root)
    assert [command[1] for command in second.commands] == ["--resume"]
    assert found.trained_now == 2 and {row["state"] for row in found.rows} == {"finished"}
    third = workers(Here())
    extended = mest.sweep({**plan, "grid": {"scheme": ["block", "unstructured"]}, "list": plan["list"][:1]}, root)
    assert len(third.commands) == 1 and extended.trained_now == 3
    workers(None)  # asked for nobody
    assert mest.sweep(plan, root).trained_now == 0
    stopped = root / "cells" / found.rows[1]["key"]
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(stopped / "cell.toml"), "--out", str(tmp_path / "alone")])
    assert_same(outcome(stopped / "run"), outcome(tmp_path / "alone"))
    states = [outcome(root / "cells" / row["key"] / "run")[1][0][0] for row in (*found.rows, extended.rows[1])]
    weights = [state[next(name for name in sorted(state) if "weight" in name)].tobytes() for state in states]
    assert len(set(weights)) == 3  # no two have equal weights


def test_what_diverges_is_a_row_and_is_not_trained_again(workers, tmp_path):
    plan = {"epochs": 1, "run": PLAN["run"], "method": "static", "grid": {"lr": [0.05, 1e18]}}
    workers(Here())
    found = mest.sweep(plan, tmp_path)
    assert [row["state"] for row in found.rows] == ["finished", "diverged"]
    assert "the loss is nan" in found.rows[1]["problem"] and found.best == found.rows[0]
    workers(None)
    assert mest.sweep(plan, tmp_path).rows[1]["state"] == "diverged"
    found.to_csv(tmp_path / "cells.csv")
    found.to_json(tmp_path / "cells.json")
    found.to_html(tmp_path / "cells.html")
    assert (tmp_path / "cells.csv").read_text().splitlines()[2].startswith("1e+18,diverged,0,1,")
    assert json.loads((tmp_path / "cells.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    page = (tmp_path / "cells.html").read_text()
    assert page.count("<svg") == 2 and all(cell in page for row in found.cells() for cell in row)
    assert "src=" not in page and "<link" not in page


class Stub:
    """Workers whose commands end with the codes of a list, one after another, having done nothing."""

    slots = 2

    def __init__(self, *codes):
        self.codes, self.started = list(codes), {}

    def start(self, job, arguments, log):
        assert job not in self.started
        log.write_text("warning: something\nerror: the disk is full\n")
        self.started[job] = self.codes.pop(0)

    def ended(self):
        found, self.started = self.started, {}
        return found

    def close(self):
        self.closed = True


def test_what_fails_says_why_and_what_is_lost_begins_again(workers, tmp_path):
    plan = {**PLAN, "grid": {"scheme": ["block", "unstructured"]}, "list": [{"method": "static"}]}
    stub = workers(Stub(1, LOST, LOST, LOST, LOST))
    found = mest.sweep(plan, tmp_path)
    assert found.rows[0]["problem"] == "error: the disk is full" and found.rows[0]["state"] == "failed"
    assert "4 commands were lost" in found.rows[1]["problem"] and not stub.codes and stub.closed
    workers(Stub(1, 1))  # both are tried again
    assert [row["problem"] for row in mest.sweep(plan, tmp_path).rows] == ["error: the disk is full"] * 2


def test_a_sweep_has_its_folder_alone(tmp_path):
    with host.exclusive(tmp_path / "lock"), pytest.raises(StateError, match="another sweep"):
        mest.sweep(PLAN, tmp_path)


def test_the_key_is_of_what_decides_the_outcome(monkeypatch, tmp_path):
    def keys(**changed):
        return {cell.key for cell in read({**PLAN, **changed}, tmp_path)[0]}

    assert len(keys()) == 4 and keys() == keys(lr_schedule="cosine")  # what is said is what is usual
    others = [{"epochs": 4}, {"lr": 0.2}, {"sieve": {"drop": 0.1}}, {"mutate_every": 2}]
    others += [{"run": {**PLAN["run"], key: value}} for key, value in (("width", 8), ("batch", 32), ("val_split", 0.2))]
    others += [{"run": {**PLAN["run"], "optimizer": "adam"}}, {"run": {**PLAN["run"], "threads": 2}}]
    for other in others:
        assert not keys() & keys(**other), other
    mine, before = tmp_path / "mine.toml", keys()
    mine.write_text("")
    monkeypatch.setenv(plugins.GIVEN, str(mine))
    given = keys()
    mine.write_text("# changed")
    assert not before & given and not given & keys() and not before & keys()


def test_the_command_tells_what_the_folder_has(mest_compile_command, workers, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('epochs = 1\nmethod = "static"\n[run]\nmodel = "mlp"\nwidth = 16\ndata = "digits"\n')
    workers(Here())
    done = mest_compile_command("sweep", plan, "--out", tmp_path / "sweep", "--html", tmp_path / "a.html", "--json")
    assert done.code == 0 and done.document["trained_now"] == 1
    assert done.document == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert mest_compile_command("sweep", plan, "--out", tmp_path / "sweep").out.count("finished") == 1
    assert mest_compile_command("sweep", plan, "--out", plan).code == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"grid": {"sparsity": 0.8}}, "sparsity must be a list"),
        ({"grid": {"scheme": ["block", "block"]}}, "two cells have the same settings"),
        ({"grid": {"scheme": ["block", "block:4x1"]}, "list": None}, "two cells would train the same"),
        ({"grid": {"epoch": [1]}}, "did you mean 'epochs'"),
        ({"grid": {"method": ["em"]}}, "method stands in [grid] and in [list]"),
        ({"grid": None, "zip": {"seed": [1, 2], "lr": [0.1]}, "list": None}, "equally long"),
        ({"list": {}}, "[[list]]"),
        ({"run": {"data": "digits"}}, "has no model"),
        ({"grid": {"sparsity": [0.0]}}, "needs a sparsity"),
        ({"asha": {"rate": 3}}, "did you mean"),
        ({"asha": {"first": 3}}, "first is 3 of 3"),
        ({"asha": {"factor": 1}}, "factor"),
        ({"asha": {"first": 1}, "eval_every": 2}, "leaves epoch 1 out"),
        ({"asha": {}, "run": {"model": "mlp", "data": "digits"}}, "no validation part"),
        ({"asha": {}, "grid": {"epochs": [3, 4]}}, "the same epochs"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused_before_anything_is_written(changed, said, tmp_path):
    plan = {key: value for key, value in {**PLAN, **changed}.items() if value is not None}
    with pytest.raises(UsageError) as problem:
        mest.sweep(plan, tmp_path / "sweep")
    assert said in str(problem.value) and not (tmp_path / "sweep").exists()


def test_zip_goes_side_by_side_and_is_combined_with_the_grid(tmp_path):
    plan = {**PLAN, "zip": {"seed": [1, 2], "lr": [0.1, 0.2]}, "list": [{"method": "static"}]}
    cells, _, _ = read(plan, tmp_path)
    found = [(cell.varied["scheme"], cell.recipe.seed, cell.recipe.lr) for cell in cells]
    assert found == [(scheme, *pair) for scheme in ("block", "unstructured") for pair in ((1, 0.1), (2, 0.2))]


def test_a_command_ends_with_the_process_that_began_it():
    sleeper = "from mest_compile.sweeping.work import end_with; import os, sys, time; end_with(int(sys.argv[1]));"
    parent = (
        "import os, subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, '-c', {f'{sleeper} time.sleep(600)'!r}, str(os.getpid())]).pid, "
        "flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    time.sleep(0.3)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")


def test_local_workers_tell_how_a_command_ended_and_leave_it_all_cores(tmp_path):
    here = LocalWorkers(2, 1)
    here.start(7, ["--version"], tmp_path / "log")
    cores = os.sched_getaffinity(here._running[7].pid)
    while not (ended := here.ended()):
        time.sleep(0.05)
    assert (
        ended == {7: 0}
        and cores == os.sched_getaffinity(0)
        and (tmp_path / "log").read_text().startswith("mest-compile ")
    )
    here.start(1, ["train", "--epochs", "1"], tmp_path / "other")
    here._running[1].kill()
    while not (ended := here.ended()):
        time.sleep(0.05)
    assert ended == {1: LOST}
    here.start(2, ["train"], tmp_path / "third")
    process = here._running[2]
    here.close()
    assert process.returncode < 0


def test_the_front_is_of_cells_that_none_beats_in_both():
    def row(key, speed, val):
        return {"key": key, "settings": {}, "state": "finished", "val": val, "test": 0.0, "images_per_second": speed}

    rows = [row("a", 100, 0.7), row("b", 90, 0.9), row("c", 80, 0.9), row("d", 80, 0.95), row("e", 100, 0.6)]
    found = SweepResults((*rows, {**row("f", 200, 1.0), "state": "paused"}), "accuracy", "")
    assert [one["key"] for one in found.pareto] == ["a", "b", "d"] and found.best["key"] == "d"
    errors = SweepResults(tuple(rows), "mae", "")
    assert errors.best["key"] == "e" and [one["key"] for one in errors.pareto] == ["e"]


def test_what_the_cache_keeps_is_no_time_of_a_cell(monkeypatch):
    """A measurement in which kernels were compiled is made once more, and that one counts."""
    told = {"timed_seconds": 1.0, "epoch_seconds": 2.0, "planned_bytes": 3}
    answers = [(90.0, {**told, "compiled": 40}), (5.0, {**told, "compiled": 0}), (7.0, {**told, "compiled": 0})]
    monkeypatch.setattr(pace, "_asked", lambda cell: answers.pop(0))
    assert [pace._measured(None).begin_seconds for _ in range(2)] == [4.0, 6.0]


def test_a_dry_run_tells_what_is_there_and_what_the_rest_takes(workers, mest_compile_command, monkeypatch, tmp_path):
    usual = compiling.compile_step

    def compile_step(*given, builder, **others):
        step = usual(*given, builder=builder, **others)
        builder.compiled = 7
        return step

    def measured(cell):
        found = pace.measure(cell)
        assert found["compiled"] == 7
        return pace.Pace(1.0, found["epoch_seconds"], 10, pace.MEASUREMENT)

    monkeypatch.setattr(pace, "_measured", measured)
    root, plan = tmp_path / "sweep", tmp_path / "plan.toml"
    plan.write_text('epochs = 2\nmethod = "static"\n[run]\nmodel = "mlp"\nwidth = 16\ndata = "digits"\n')
    workers(Here())
    mest.sweep(plan, root)
    plan.write_text(f'{plan.read_text()}[grid]\nscheme = ["block", "unstructured"]\nseed = [0, 1]\n')
    monkeypatch.setattr(compiling, "compile_step", compile_step)
    before = sorted(root.rglob("*"))
    found = mest_compile_command("sweep", plan, "--out", root, "--dry-run", "--json").document
    assert sorted(root.rglob("*")) == before
    there, recorded, *others = found["cells"]
    assert (there["state"], there["epochs"], there["epochs_left"], there["source"]) == ("finished", 2, 0, None)
    assert recorded["source"] == "records" and recorded["planned_bytes"] > 10 and recorded["begin_seconds"] > 0
    (command,) = [
        json.loads(line) for line in (root / "cells" / there["key"] / "commands.jsonl").read_text().splitlines()
    ]
    spent = recorded["begin_seconds"] + 2 * recorded["epoch_seconds"]
    assert command["epochs"] == 2 and spent == pytest.approx(command["seconds"])
    assert {one["source"] for one in others} == {"measurement"} and others[0]["epoch_seconds"] > 0
    assert found["cells_left"] == 3 and found["epochs_left"] == 6 and found["at_once"] == 1
    assert found["seconds"] == pytest.approx(sum(one["seconds_left"] for one in found["cells"]))
    assert mest_compile_command("sweep", plan, "--out", root, "--dry-run").out.count("measurement") == 2
    assert mest_compile_command("sweep", plan, "--dry-run", "--ray", "auto").code == 2


def test_a_pause_comes_after_the_checkpoints_epochs_not_those_of_the_log(mest_compile_command, tmp_path):
    """A run that is killed between the two has logged an epoch that it makes again."""
    run = tmp_path / "run"
    asked = ["--model", "mlp", "--width", "16", "--epochs", "3", "--method", "static", "--until", "1"]
    assert mest_compile_command("train", *asked, "--out", run).code == 0
    line = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(line + line.replace('"epoch": 1', '"epoch": 2'))
    assert mest_compile_command("train", "--resume", run, "--until", "2").code == 0
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    refused = mest_compile_command("train", "--resume", run, "--until", "2")
    assert refused.code == 2 and "has made 2 epochs" in refused.err


def test_asha_pauses_cells_which_another_sweep_takes_up(workers, tmp_path):
    plan = {"epochs": 3, "run": PLAN["run"], "method": "static", "grid": {"lr": [0.0001, 0.1]}}
    plan["asha"] = {"first": 1, "factor": 2}
    here = workers(Here())
    found = mest.sweep(plan, tmp_path)
    assert [(row["state"], row["epochs"]) for row in found.rows] == [("paused", 1), ("finished", 3)]
    assert [command[-2:] for command in here.commands[:3]] == [["--until", "1"], ["--until", "1"], ["--until", "2"]]
    workers(Here())
    assert mest.sweep(plan, tmp_path).trained_now == 0
    del plan["asha"]
    assert mest.sweep(plan, tmp_path).trained_now == 2
