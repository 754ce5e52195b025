"""`mest-compile report`: what a run folder shows."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_training import RECIPE, TEST, TRAIN, Interrupter, SoftmaxStep, interrupt

from mest_compile.base.errors import StateError, UsageError
from mest_compile.base.figures import INK
from mest_compile.training.drawing import PLOTS
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.training.reporting import read_epochs, write_report
from mest_compile.training.runfolder import RunFolder
from mest_compile.training.sieve import SieveRule


@pytest.fixture
def finished(tmp_path):
    recipe = replace(RECIPE, sieve=SieveRule(drop=0.2, after_epoch=3))
    Trainer(SoftmaxStep(), recipe, tmp_path / "run <a>").fit(TRAIN, TEST)
    return tmp_path / "run <a>"


def test_a_report_is_plots_and_one_page_that_needs_nothing_else(finished):
    facts = write_report(finished)
    out = finished / "report"
    plots = [name for name in PLOTS if name != "freeze"]  # of which this run has nothing to show
    assert sorted(path.name for path in out.iterdir()) == sorted(["report.html", *(f"{name}.svg" for name in plots)])
    assert facts["files"] == [str(out / "report.html"), *(str(out / f"{name}.svg") for name in plots)]
    page = (out / "report.html").read_text()
    verdict = json.loads((finished / "verdict.json").read_text())
    assert page.count('src="data:image/png;base64,') == len(verdict["worst"]) > 0
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for name in plots:  # drawn in the page's colour, for the light and the dark
        picture = (out / f"{name}.svg").read_text()
        assert picture.rstrip() in page and "currentColor" in picture and INK not in picture
        root = ElementTree.fromstring(picture)
        words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "epoch" in words and "#000000" not in picture and "#ffffff" not in picture
    assert "run &lt;a&gt;" in page and "<a>" not in page
    assert json.loads(json.dumps(facts)) == facts


def test_what_a_report_says_is_what_the_metrics_say(finished):
    lines = RunFolder(finished).read_metrics()
    facts = write_report(finished)
    assert facts["epochs"] == facts["of_epochs"] == 6 and facts["method"] == "em_s"
    assert facts["test_accuracy"] == lines[-1]["test_accuracy"] and facts["loss"] == lines[-1]["loss"]
    assert facts["mutations"] == 5 and facts["mutation_seconds"] == 1.25
    assert facts["dropped"] == [40] and sum(facts["forgetting_counts"].values()) == 200
    assert facts["iterations"] == 3 * 12 + 3 * 10 and facts["iterations_saved"] == 6
    assert (
        f"<td>test accuracy</td><td>{lines[-1]['test_accuracy']:.2%}</td>"
        in (finished / "report" / "report.html").read_text()
    )


def test_a_run_of_one_epoch_has_its_plots(tmp_path):
    Trainer(SoftmaxStep(), replace(RECIPE, epochs=1, phases=()), tmp_path).fit(TRAIN, TEST)
    assert write_report(tmp_path)["epochs"] == 1


def test_the_page_shows_the_numbers_of_the_metrics(finished):
    lines = RunFolder(finished).read_metrics()
    lines[-1].update(loss=0.54321, train_accuracy=0.8125, test_accuracy=0.75)
    RunFolder(finished).rewrite_metrics(lines)
    RunFolder(finished).checkpoint.unlink()  # it knows the metrics as they were
    write_report(finished)
    rows = dict(re.findall("<tr><td>(.*?)</td><td>(.*?)</td></tr>", (finished / "report" / "report.html").read_text()))
    assert rows["epochs"] == "6 of 6" and rows["training loss"] == "0.5432"
    assert rows["training accuracy"] == "81.25%" and rows["test accuracy"] == "75.00%"
    assert rows["seconds of training"] == f"{sum(metrics['train_seconds'] for metrics in lines):.1f}"
    assert rows["mutations"] == "5, 1.25 s" and rows["iterations saved by the sieve"] == "6 beside 66 made"


def test_the_plots_show_the_numbers_of_the_metrics(finished):
    lines = read_epochs(RunFolder(finished))
    assert all(metrics["train_accuracy"] > 0 for metrics in lines)
    for metrics, part in zip(lines, (0, 0, 0, 1, 1, 2), strict=True):
        now = [f"layer{part}"] if metrics["epoch"] in (4, 6) else []
        metrics["freeze"] = {"now": now, "parts": part, "saved": 0.2 * part, "weights": 0.1 * part, "seconds": 0.5}
    wanted = {
        "loss": [[metrics["loss"] for metrics in lines]],
        "accuracy": [[100 * metrics[name] for metrics in lines] for name in ("train_accuracy", "test_accuracy")],
        "sparsity": [[metrics["sparsity"]["weight"] for metrics in lines]],
        "survival": [[metrics["survival"]["weight"] for metrics in lines]],
        "epoch_seconds": [[metrics["train_seconds"] for metrics in lines], [0, 1], [0, 1], [0, 1]],
        "freeze": [[100 * metrics["freeze"][name] for metrics in lines] for name in ("saved", "weights")],
    }  # and the lines where examples were dropped and layers froze
    for name, (_, draw) in PLOTS.items():
        axes = Figure().add_subplot()
        draw(axes, lines)
        if name in ("sparsity", "survival"):
            assert axes.images[0].get_array().tolist() == wanted[name] and axes.images[0].get_extent()[:2] == [0.5, 6.5]
            continue
        assert [list(line.get_ydata()) for line in axes.lines] == wanted[name], name
        assert list(axes.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6], name


def test_a_plot_changes_with_the_run(finished, tmp_path):
    write_report(finished, tmp_path / "before")
    folder = RunFolder(finished)
    lines = folder.read_metrics()
    for metrics in lines:
        metrics["loss"] += metrics["epoch"]
        metrics["survival"]["weight"] /= metrics["epoch"]
    folder.rewrite_metrics(lines)
    write_report(finished, tmp_path / "after")
    before, after = (
        {path.stem: path.read_bytes() for path in (tmp_path / name).glob("*.svg")} for name in ("before", "after")
    )
    assert {name for name in before if before[name] != after[name]} == {"loss", "survival"}


def test_a_run_that_still_trains_can_be_reported(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / "run", Interrupter(1, 2, interrupt)).fit(TRAIN, TEST)
    with pytest.raises(StateError, match="without a whole epoch"):
        write_report(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        Trainer.resume(tmp_path / "run", SoftmaxStep(), Interrupter(3, 2, interrupt)).fit(TRAIN, TEST)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epo')
    assert write_report(tmp_path / "run")["epochs"] == 2


def test_a_dense_run_has_no_plots_of_masks(tmp_path):
    class Dense(SoftmaxStep):
        def masks(self):
            return {}

        def sparsity(self):
            return {}

    Trainer(Dense(sparsity=0.0), Recipe(2, "static", lr=0.05), tmp_path / "run").fit(TRAIN, TEST)
    assert not {"sparsity.svg", "survival.svg"} & {
        path.rpartition("/")[2] for path in write_report(tmp_path / "run")["files"]
    }


def test_the_page_says_what_classes_were_called_and_where_the_run_is_from(finished):
    verdict = json.loads((finished / "verdict.json").read_text())
    lines = RunFolder(finished).read_metrics()
    last = lines[-1]
    confusion = np.array(verdict["confusion"])
    assert verdict["part"] == "test" and verdict["epoch"] == 6 and confusion.sum() == len(TEST[1])
    assert confusion.trace() / confusion.sum() == last["test_accuracy"] == verdict["accuracy"]
    wrong = [one for one in verdict["worst"] if one["class"] == one["called"]]
    assert not wrong and len(verdict["worst"]) == min(12, len(TEST[1]) - confusion.trace())
    assert all(str(TEST[1][one["example"]]) == one["class"] and one["png"] for one in verdict["worst"])
    write_report(finished)
    page = (finished / "report" / "report.html").read_text()
    rows = dict(re.findall("<tr><td>(.*?)</td><td>(.*?)</td></tr>", page))
    assert rows["milliseconds a step"] == f"{1e3 * np.median([one['step_seconds'] for one in lines]):.2f}"
    assert rows["learning rate"] == f"{RECIPE.lr:g}, {RECIPE.lr_schedule}" and rows["scheme"] == "unstructured"
    assert rows["live of all weights"] == "64 of 640"
    assert rows["began"].startswith("20") and "cpus" in rows["machine"] and rows["total"] == "0.00 MiB"
    assert rows["sparsity of sparse layers, all their weights together"] == f"{last['overall_sparsity']:.3f}"
    assert "What follows is of 50 test examples after epoch 6." in page and page.count("<figcaption>") == len(
        verdict["worst"]
    )


def test_several_runs_are_laid_over_each_other(finished, tmp_path, mest_compile_command):
    Trainer(SoftmaxStep(), Recipe(2, "static", lr=0.05), tmp_path / "short").fit(TRAIN, TEST)
    ran = mest_compile_command("report", finished, tmp_path / "short", "--out", tmp_path / "both", "--json")
    assert ran.code == 0 and [one["epochs"] for one in ran.document["runs"]] == [6, 2], ran.err
    page = (tmp_path / "both" / "compare.html").read_text()
    assert page.count('<svg class="plot"') == 4 and "<td>run &lt;a&gt;</td>" in page and "<td>short</td>" in page
    shown = mest_compile_command("report", finished, tmp_path / "short", "--out", tmp_path / "both").out
    assert "2/2" in shown and "compare.html" in shown
    ran = mest_compile_command("report", finished, tmp_path / "none", "--out", tmp_path / "both")
    assert ran.code == 1 and "holds no run" in ran.err


def test_what_is_no_run_and_what_cannot_be_written_say_so(finished, tmp_path):
    with pytest.raises(StateError, match="holds no run"):
        write_report(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the report"):
        write_report(finished, tmp_path / "file" / "report")
    (finished / "metrics.jsonl").write_text('{"epoch": \n')
    with pytest.raises(StateError, match="is damaged"):
        write_report(finished)


def test_the_command_prints_a_line_and_json(finished, mest_compile_command):
    done = mest_compile_command("report", str(finished))
    assert done.code == 0 and "6/6" in done.out and "report.html" in done.out
    facts = json.loads(mest_compile_command("report", str(finished), "--json").out)
    assert facts["epochs"] == 6 and np.isfinite(facts["loss"])
    assert mest_compile_command("report", str(finished / "no")).code == 1


def test_lines_that_tell_of_freezing_in_part_are_damaged(finished):
    folder = RunFolder(finished)
    folder.checkpoint.unlink()
    lines, told = folder.read_metrics(), {"now": [], "parts": 0, "saved": 0.0, "weights": 0.0, "seconds": 0.0}
    folder.rewrite_metrics([{**metrics, "freeze": told} for metrics in lines])
    assert write_report(finished)["freeze"]["saved_overall"] == 0
    for broken, said in (
        ([lines[0], {**lines[1], "freeze": told}], "only some of its lines tell of freezing"),
        ([{**lines[0], "freeze": {**told, "saved": "much"}}], "freeze of line 1"),
    ):
        folder.rewrite_metrics(broken)
        with pytest.raises(StateError, match=said):
            write_report(finished)
