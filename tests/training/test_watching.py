"""What a run shows while it trains and afterwards: a table of epochs, compiling, reprs, frames and plots."""

import csv
import sys
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from test_training import RECIPE, TEST, TRAIN, SoftmaxStep

import mest_compile as mest
from mest_compile.base import screens
from mest_compile.base.errors import UsageError
from mest_compile.cli.progress import CompileProgress
from mest_compile.kernels.cache import Builder
from mest_compile.training.loop import Trainer
from mest_compile.training.metrics import METRICS
from mest_compile.training.recipe import Recipe
from mest_compile.training.run import Run
from mest_compile.training.showing import TrainingProgress, notes_of
from mest_compile.training.sieve import SieveRule


def shown(recipe, *data):
    said, step = StringIO(), SoftmaxStep()
    with TrainingProgress(Console(file=said, width=200), step.batch, METRICS["accuracy"]) as progress:
        run = Trainer(step, recipe, progress=progress).fit(*data)
    return run, said.getvalue().splitlines()


def test_epochs_are_a_table_of_aligned_columns_that_fits_a_narrow_terminal():
    recipe = replace(RECIPE, epochs=6, sieve=SieveRule(0.1, after_epoch=2))
    run, lines = shown(recipe, TRAIN, TEST, TEST)
    assert lines[0].split() == ["epoch", "loss", "train", "val", "test", "images/s", "sparsity"]
    assert len(lines) == 7 and max(map(len, lines)) <= 100
    ends = [len(lines[0][: lines[0].index(name) + len(name)]) for name in lines[0].split()]
    for line, epoch in zip(lines[1:], run.history):
        assert all(line[end - 1] != " " and (len(line) == end or line[end] == " ") for end in ends), line
        assert f"{epoch['test_accuracy']:.2%}" in line
    assert "moved" not in lines[1] and "moved 50" in lines[2] and "moved" not in lines[6]
    assert sum("sieved 20" in line for line in lines) == 1


def test_a_terminal_shows_how_far_a_run_is_moving_means_and_the_last_score():
    step, said = SoftmaxStep(), StringIO()
    with TrainingProgress(Console(file=said, force_terminal=True, width=200), 16, METRICS["accuracy"]) as progress:
        run = Trainer(step, Recipe(1, "static", lr=0.05), progress=progress).fit(TRAIN, TEST)
        progress._means = None
        for batch, (loss, right) in enumerate([(2.0, 0.5), (1.0, 1.0)], 1):
            progress.on_batch(2, 3, batch, 5, loss, right)
        (task,) = progress._bar.tasks
    assert (task.completed, task.total) == (7, 15)
    line = said.getvalue().rpartition("epoch 2/3")[2]
    assert f"loss 1.9000  train 55.00% test {run.test_accuracy:.2%}  " in line


def test_what_nobody_watches_is_a_line_and_what_somebody_watches_is_a_table(capsys, monkeypatch):
    run = Trainer(SoftmaxStep(), Recipe(2, "static", lr=0.05)).fit(TRAIN, TEST)
    score, out = f"test accuracy {run.test_accuracy:.2%}", capsys.readouterr()
    assert out.err.startswith("trained 2 epochs: loss ") and out.err.endswith(f"{score}\n") and out.out == ""
    Trainer(SoftmaxStep(), Recipe(2, "static", lr=0.05), progress=mest.Silent()).fit(TRAIN, TEST)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Trainer(SoftmaxStep(), Recipe(2, "static", lr=0.05)).fit(TRAIN, TEST)
    assert "epoch" in (said := capsys.readouterr().err) and "2/2" in said
    monkeypatch.setitem(sys.modules, "rich", None)  # as on a device
    Trainer(SoftmaxStep(), Recipe(2, "static", lr=0.05)).fit(TRAIN, TEST)
    assert capsys.readouterr().err.startswith("trained 2 epochs: loss ")


def test_a_compilation_that_takes_a_while_is_a_line_that_goes(capsys, monkeypatch):
    now = iter([0.0, 0.0, 0.5, 2.0, 2.5, 3.0])
    monkeypatch.setattr(screens, "perf_counter", lambda: next(now))
    line = screens.CompileLine()
    line(1, 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for done in (2, 3, 4, 5):
        line(done, 5)
    said = capsys.readouterr().err.split("\r")
    assert next(filter(str.strip, said)) == "compiling: 3 of 5 kernels, 2 s left"
    assert said[-1] == "" and said[-2].isspace()


def test_what_did_not_change_is_not_told():
    nothing = {"mutation": None, "sieve": None}
    assert notes_of(nothing) == []
    frozen = {"now": ["a", "b", "c"], "seconds": 1.0}
    told = {"mutation": {"moved": 0.021}, "sieve": {"dropped": 9, "returned": 2}, "freeze": frozen}
    assert notes_of(told) == ["moved 2.1%", "froze a and 2 more", "sieved 9, 2 back"]
    assert notes_of(nothing | {"mutation": {"moved": 0.0}}) == []


def test_compiling_tells_kernels_and_a_stop_says_what_stays():
    told, said = [], StringIO()
    builder = Builder(progress=lambda *count: told.append(count))
    builder._side_by_side(lambda source: source, [])
    builder._ready = {1: None, 2: None}
    builder._side_by_side(lambda source: source.key, [type("Source", (), {"key": key}) for key in (1, 2)])
    assert told == [(1, 2), (2, 2)]

    def stopped():
        with CompileProgress(Console(file=said, width=200), "compiling a net") as shows:
            shows.told(31, 58)
            assert "compiling a net: 31 of 58 kernels, " in str(shows._status.status)
            assert "s left" in str(shows._status.status)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "stopped while compiling; what was compiled is kept" in said.getvalue()


def test_a_run_is_short_as_text_a_frame_and_a_picture():
    run = Trainer(SoftmaxStep(), RECIPE).fit(TRAIN, TEST)
    assert repr(run).startswith("<Run em_s, 6 of 6 epochs, train accuracy ") and len(repr(run)) < 120
    frame = run.to_pandas()
    assert list(frame["epoch"]) == [1, 2, 3, 4, 5, 6] and list(frame["loss"]) == [one["loss"] for one in run.history]
    assert "sparsity.weight" in frame and "memory_bytes.total" in frame
    assert "<td>6</td>" in run._repr_html_() and "&lt;Run em_s" in run._repr_html_()
    titles = [axes.get_title() for axes in run.plot().axes]
    assert titles[:2] == ["Loss", "Accuracy"] and len(list(filter(None, titles))) == 5
    with pytest.raises(UsageError, match="no whole epoch to draw"):
        Run(Recipe(2)).plot()
    assert repr(Run(Recipe(2))) == "<Run em, 0 of 2 epochs>"


def test_a_step_says_what_it_is(builder):
    step = mest.compile("mlp", (4, 20), scheme="unstructured", sparsity=0.5, builder=builder, threads=1)
    said = repr(step)
    assert said.startswith("<TrainStep 4x20 to 10: 2 of 3 layers sparse, ") and "cross_entropy, sgd, target" in said
    assert f"{sum(step.live_weights().values())} of " in said and len(said) < 200
    name, live = next(iter(step.live_weights().items()))
    cells = f"<td>{name.removesuffix('.weight')}</td><td>unstructured</td><td>20480</td><td>{live}</td>"
    assert "&lt;TrainStep" in step._repr_html_() and cells in step._repr_html_()


def test_a_table_that_sorts_needs_nothing_else(tmp_path):
    from mest_compile.measuring.table import Row, SpeedTable

    facts = {
        "model": "a<b", "width": None, "input_shape": [4, 20], "threads": 1, "baseline": "torch", "repeats": 7,
        "machine": {"cpu": "one"}, "load": 2.0, "versions": {"torch": "2.9"}, "measured_at": "today",
    }  # fmt: skip
    rows = tuple(Row("block", sparsity, 0.01, 0.02, 2.0, 1.9, 2.1, 0.95, 100) for sparsity in (0.8, 0.9))
    made = SpeedTable(rows, facts)
    made.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count('<th data-sorts="">') == 8 and text.count("<script>") == 1 and "<svg" in text
    assert "a&lt;b" in text and "today; torch 2.9" in text and "The machine was busy, its load 2.0" in text
    assert "prefers-color-scheme:dark" in text and "http" not in text.partition("<svg")[0]
    assert repr(made) == made.to_markdown() and "<table>" in made._repr_html_()
    assert "busy" not in SpeedTable(rows, facts | {"load": 0.1}).caption()


def test_what_moved_is_the_share_of_live_weights_that_are_new():
    from mest_compile.training.survival import Survival

    masks = {"a": np.array([1, 1, 0, 0, 0], bool), "b": np.array([1, 1], bool)}
    step = type("Step", (), {"masks": lambda self: dict(masks), "sparsity": lambda self: {"a": 0.6, "b": 0.0}})()
    survival = Survival(step)
    masks["a"] = np.array([1, 0, 1, 0, 0], bool)
    assert survival.mutated() == 1 / 4 and survival.mutated() == 0
    masks["a"] = np.array([0, 1, 1, 0, 0], bool)
    assert survival.mutated() == 1 / 4
    assert survival.describe() == {
        "survival": {"a": 0.0, "b": 1.0},
        "sparsity": {"a": 0.6, "b": 0.0},
        "overall_sparsity": pytest.approx(3 / 7),
    }


def test_metrics_are_written_for_other_software(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

        def flush(self):
            written.append(self.folder)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    runs = {}

    def init(**options):
        runs[options["project"]] = SimpleNamespace(
            options=options, logged=(logged := {}), log=lambda told, step: logged.update({step: told}),
            finish=lambda: logged.update(finished=True),
        )  # fmt: skip
        return runs[options["project"]]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    writers = [mest.CsvWriter(tmp_path / "run.csv"), mest.TensorBoardWriter(tmp_path / "board")]
    writers.append(mest.WandbWriter("digits", mode="offline"))
    run = Trainer(SoftmaxStep(), Recipe(2, "static", lr=0.05), callbacks=writers).fit(TRAIN, TEST)
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == [one["loss"] for one in run.history]
    assert float(rows[1]["memory_bytes.total"]) == 4096 and "mutation" not in rows[0]
    assert ("test_accuracy", run.test_accuracy, 2) in written and ("sparsity/weight", pytest.approx(0.9), 1) in written
    assert written[-1] == str(tmp_path / "board")
    writers[-1].close()
    found = runs["digits"]
    assert found.options["mode"] == "offline" and found.logged["finished"] and list(found.logged)[:2] == [1, 2]
    assert found.logged[2]["test_accuracy"] == run.test_accuracy and found.logged[1]["memory_bytes/total"] == 4096
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(mest.MestError, match="pip install wandb"):
        mest.WandbWriter("digits")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(mest.MestError, match="pip install tensorboard"):
        mest.TensorBoardWriter(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        mest.CsvWriter(tmp_path / "absent" / "run.csv").on_epoch({"loss": 1.0})
