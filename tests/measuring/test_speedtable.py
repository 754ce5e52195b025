"""Speed tables: figures come from the comparisons, problems are rows, every format holds the same; the harness records
and resumes."""

import csv
import json
import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import readme_picture
import readme_table
import run

import mest_compile as mest
from mest_compile.base.errors import NotInstalled, SparsityError, StateError, UnknownName, UsageError
from mest_compile.measuring.benchmark import Comparison, Side
from mest_compile.measuring.case import Case
from mest_compile.measuring.contestants import find_contestant
from mest_compile.measuring.sheet import write_sheet
from mest_compile.measuring.speedtable import speed_table
from mest_compile.measuring.table import COLUMNS, Row, SpeedTable
from mest_compile.models.catalog import build_model

MIB = 2**20


def comparison(
    scheme: str = "block:4x1",
    sparsity: float = 0.9,
    ours: tuple = (0.1, 0.2, 0.1),
    rival: tuple = (0.4, 0.4, 0.3),
    **case,
) -> Comparison:
    def side(name: str, seconds: tuple, peak_mib: int, planned: int | None) -> Side:
        return Side(name, seconds, 1.0, 2.3, 100 * MIB, 200 * MIB, 20, 5, peak_mib * MIB, planned)

    return Comparison(
        Case("resnet32", width=32).but(scheme=scheme, sparsity=sparsity, **case),
        side("mest", ours, 50, 48 * MIB),
        side("torch", rival, 200, None),
        {"cpu": "Abacus 9"},
        {"torch": "2"},
        "2026-01-02T03:04:05+00:00",
    )


def sample() -> SpeedTable:
    facts = {
        "model": "resnet32",
        "width": 32,
        "input_shape": [64, 3, 32, 32],
        "distribution": "uniform",
        "target": "local",
        "baseline": "torch",
        "threads": 1,
        "repeats": 3,
        "machine": {"cpu": "Abacus 9"},
        "versions": {},
        "measured_at": "",
    }
    return SpeedTable((Row.of(comparison().to_dict()), Row("pattern", 0.955, problem="no | patterns <here>")), facts)


def test_a_row_holds_medians_ratios_and_both_memories():
    row = Row.of(json.loads(json.dumps(comparison().to_dict())))
    assert (row.step_seconds, row.baseline_seconds, row.planned_bytes) == (0.1, 0.4, 48 * MIB)
    assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx(
        (3, 2, 4)
    )  # ratios 4, 2, 3; no ratio of medians
    assert row.confidence == 0.75 and (row.peak_bytes, row.baseline_peak_bytes) == (50 * MIB, 200 * MIB)


def test_a_row_of_a_device_has_no_peaks_and_an_interval_of_both_medians():
    row = Row.on_device("block", 0.9, [0.1, 0.2, 0.1], [0.4, 0.4, 0.3], 48 * MIB)
    assert (row.step_seconds, row.baseline_seconds, row.planned_bytes, row.peak_bytes) == (0.1, 0.4, 48 * MIB, None)
    assert (row.speedup, row.speedup_low, row.speedup_high, row.confidence) == pytest.approx((4, 1.5, 4, 0.5))
    facts = sample().facts | {"baseline": "mest-dense"}
    assert SpeedTable((row,), facts).cells() == [["block", "90%", "100.0", "4.00", "1.50 to 4.00", "48", "", ""]]
    kinds = {}, {"emulated": True}, {"emulated": True, "clock": "instructions"}
    captions = [SpeedTable((row,), facts | more).caption() for more in kinds]
    assert [caption.partition("3 rounds, 50% intervals.")[2] for caption in captions] == [
        "",
        " The device is emulated: its times say nothing about any device.",
        " A millisecond is a million instructions: the device counts them instead of time.",
    ]


def test_the_page_has_the_recorded_instructions_of_whole_steps(repository):
    page = " ".join((repository / "docs" / "arm.md").read_text().split())
    table = json.loads((repository / "benchmarks" / "results" / "device-steps.json").read_text())
    assert table["clock"] == "instructions" and table["emulated"] and "--count-instructions" in table["device"]
    millions, times = (
        [format(row[name] * scale, form) for row in table["rows"]]
        for name, scale, form in (("step_seconds", 1e3, ".1f"), ("speedup", 1, ".2f"))
    )
    names = [row["scheme"] for row in table["rows"]]
    assert f"executes {table['rows'][0]['baseline_seconds'] * 1e3:.1f} million" in page
    assert all(f"{million} ({name})" in page for million, name in zip(millions, names, strict=True))
    assert "{}, {} and {} times fewer".format(*times) in page


def test_every_format_holds_the_rows_and_the_problem(tmp_path):
    table = sample()
    markdown = table.to_markdown().splitlines()
    assert markdown[0].count("|") == len(COLUMNS) + 1
    assert markdown[2] == "| block:4x1 | 90% | 100.0 | 3.00 | 2.00 to 4.00 | 48 | 50 | 0.25 |"
    assert markdown[3].startswith("| pattern | 95.5% | no \\| patterns <here> |")
    assert all(said in markdown[-1] for said in ("Abacus 9", "400.0 ms", "200 MiB", "3 alternated rounds, 75%"))
    table.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["scheme"] for row in rows] == ["block:4x1", "pattern"] and float(rows[0]["speedup"]) == pytest.approx(3)
    table.to_json(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == json.loads(json.dumps(table.to_dict()))
    table.to_html(tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text()
    assert "2.00 to 4.00" in page and "&lt;here&gt;" in page and "<here>" not in page
    frame = table.to_pandas()
    assert (
        frame.speedup[0] == pytest.approx(3)
        and frame.problem[1].startswith("no |")
        and frame.attrs["baseline"] == "torch"
    )
    table.plot(tmp_path / "t.png")
    table.plot(tmp_path / "t.svg")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "t.svg").read_text()


@pytest.mark.parametrize("write", ["to_csv", "to_json", "to_html", "plot"])
def test_a_file_that_cannot_be_written_is_a_usage_error(write, tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        getattr(sample(), write)(tmp_path / "absent" / "t.png")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"target": "arm_cpu"}, UsageError, "give the device that is, by its tracker and key"),
        (
            {"target": "arm_cpu", "baseline": "torch", "device": mest.rpc("127.0.0.1:1", "phone")},
            UsageError,
            "only 'mest-dense' runs",
        ),
        ({"baseline": "abacus"}, UnknownName, "abacus"),
        ({"schemes": ["plaid"]}, UnknownName, "plaid"),
        ({"schemes": []}, UsageError, "one or more schemes"),
        ({"sparsities": [1.0]}, UsageError, "below 1"),
        ({"model": "net.onnx"}, UsageError, ".onnx"),
        ({"width": 0}, UsageError, "width"),
    ],
)
def test_misuse_is_noticed_before_anything_is_measured(options, error, said, monkeypatch):
    monkeypatch.setattr("mest_compile.measuring.speedtable.compare", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(error, match=said):
        speed_table(**{"model": "mlp", "input_shape": (8, 3, 32, 32), **options})


def test_a_baseline_that_is_not_installed_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setattr("mest_compile.measuring.contestants.ENVIRONMENTS", tmp_path)
    with pytest.raises(NotInstalled, match="environments.sh sparseprop"):
        speed_table("mlp", (8, 3, 32, 32), baseline="sparseprop")


def test_a_scheme_that_the_model_cannot_have_is_a_row(monkeypatch):
    def fake(case, baseline, repeats):
        if case.options.scheme == mest.Pattern():
            raise SparsityError("fc1: a linear layer\nhas no patterns")
        return comparison(case.options.scheme, case.options.sparsity)

    monkeypatch.setattr("mest_compile.measuring.speedtable.compare", fake)
    seen = []
    table = mest.speed_table(
        "mlp",
        (8, 3, 32, 32),
        ["unstructured", "pattern"],
        [0.8, 0.9],
        repeats=3,
        progress=lambda *now: seen.append(now),
    )
    why = "fc1: a linear layer has no patterns"
    assert "wanted_rows" in table.facts and "so far" not in table.caption()
    assert [(row.scheme, row.sparsity, row.problem) for row in table.rows] == [
        ("unstructured", 0.8, None),
        ("unstructured", 0.9, None),
        ("pattern", 0.8, why),
        ("pattern", 0.9, why),
    ]
    assert seen[2] == ("pattern 0.8", 2, 4) and table.facts["repeats"] == 3
    with pytest.raises(SparsityError, match="no patterns"):
        speed_table("mlp", (8, 3, 32, 32), ["pattern"], [0.9])


def test_a_table_that_was_stopped_goes_on_where_it_was(monkeypatch, tmp_path):
    measured, shown = [], []

    def fake(case, baseline, repeats):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case.options.sparsity)
        found = comparison(case.options.scheme, case.options.sparsity)
        return replace(found, machine={"cpu": "Abacus 9", "others_cores": 0.7 if len(measured) == 1 else 0.1})

    monkeypatch.setattr("mest_compile.measuring.speedtable.compare", fake)
    wanted = {"schemes": ["block"], "sparsities": [0.5, 0.8, 0.9], "repeats": 3, "out": tmp_path / "table"}

    def start(**options):
        return mest.speed_table("mlp", (8, 3, 32, 32), **wanted | options, on_row=shown.append)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert [len(table.rows) for table in shown] == [1, 2] and "2 of 3 rows so far" in shown[-1].caption()
    assert shown[0].cells()[0][2] == "100.0 busy" and shown[1].cells()[1][2] == "100.0"
    assert "The machine was busy" in shown[1].caption()
    so_far = {path.name for path in (tmp_path / "table").iterdir()}
    assert so_far == {"rows.jsonl", "table.html", "table.csv", "table.json"}
    assert len(json.loads((tmp_path / "table" / "table.json").read_text())["rows"]) == 2
    with pytest.raises(UsageError, match="holds a table whose repeats is 3, not 4"):
        start(repeats=4)
    measured.clear()
    table = start()
    assert measured == [0.9] and [row.sparsity for row in table.rows] == [0.5, 0.8, 0.9]
    assert table.rows[:2] == shown[1].rows
    page = (tmp_path / "table" / "table.html").read_text()
    cells = [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr>(<td>.*?)</tr>", page)]
    assert cells == table.cells() and "Abacus 9" in page and "so far" not in page
    measured.clear()
    assert start().rows == table.rows and measured == []
    (tmp_path / "table" / "rows.jsonl").write_text("{}\n{")
    with pytest.raises(StateError, match="rows.jsonl is damaged"):
        start()


def test_a_comparison_is_a_page_that_says_what_its_json_says(tmp_path):
    found = comparison()
    found = replace(found, machine={"cpu": "Abacus <9>", "load_before": 1.25, "others_cores": 0.75})
    write_sheet(found, tmp_path / "bench.html")
    page, told = (tmp_path / "bench.html").read_text(), found.to_dict()
    rows = [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr>(<td>.*?)</tr>", page)]
    for row, side in zip(rows, (told["ours"], told["rival"])):
        times = [f"{1e3 * side[name]:.2f}" for name in ("median_seconds", "min_seconds", "max_seconds")]
        assert row[:4] == [side["name"], *times]
    about = dict(row for row in rows if len(row) == 2)
    assert about["scheme"] == "block:4x1" and about["measured"] == told["measured_at"]
    assert about["model"] == "resnet32, width 32" and about["load before"] == "1.2"
    assert "torch / mest: 3.00 (75% interval of 3 rounds: 2.00 to 4.00)" in page and "others used 0.8 cores" in page
    assert '<svg class="plot"' in page and "Abacus &lt;9&gt;" in page and "<9>" not in page
    with pytest.raises(UsageError, match="cannot write"):
        write_sheet(found, tmp_path / "absent" / "bench.html")


def test_a_torch_module_of_ones_own_is_measured_and_left_alone():
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 1, 1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 64, 7),
    ).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    table = speed_table(net, (8, 3, 8, 8), ["unstructured"], [0.5], repeats=1)
    (row,) = table.rows
    assert (
        row.problem is None
        and 0 < row.step_seconds < 1
        and 0 < row.baseline_seconds < 1
        and row.planned_bytes > 8 * 8 * 8 * 8 * 4
    )
    assert table.facts["model"] == "Sequential" and not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_files_and_what_is_trained_are_measured_beside_our_dense_step(tmp_path):
    net = build_model("mlp", (16, 1, 8, 8), 7, 16)  # with other classes than cases have that do not say
    step = mest.compile(net, (16, 1, 8, 8), "unstructured", 0.5, threads=1)
    mest.to_onnx(step, tmp_path / "net.onnx")
    (tmp_path / "run").mkdir()
    step.save(tmp_path / "run" / "checkpoint.safetensors")
    for name in ("net.onnx", "run", "run/checkpoint.safetensors"):
        case = Case(str(tmp_path / name), (8, 1, 8, 8)).but(scheme="unstructured", sparsity=0.5, threads=1)
        for side in ("mest", "mest-dense"):
            assert np.isfinite(find_contestant(side).build(case).step()), (name, side)
        for side in ("torch", "torch-best"):
            with pytest.raises(UsageError, match="torch cannot train an .onnx file, a run folder.*--vs mest-dense"):
                find_contestant(side).build(case)
        with pytest.raises(UsageError, match="torch cannot train"):
            speed_table(case.model, case.input_shape, ["unstructured"], [0.5])


def test_a_torch_module_is_compared_with_torch_only(monkeypatch, tmp_path):
    import torch

    python = tmp_path / "onnxruntime-training" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr("mest_compile.measuring.contestants.ENVIRONMENTS", tmp_path)
    with pytest.raises(UsageError, match="torch and torch-compile"):
        speed_table(torch.nn.Linear(4, 2), (8, 4), ["unstructured"], baseline="onnxruntime-training")


def test_the_command_measures_and_writes_its_files(mest_compile_command, tmp_path):
    ran = mest_compile_command(
        "table",
        "--model",
        "mlp",
        "--width",
        32,
        "--batch",
        8,
        "--schemes",
        "unstructured",
        "--sparsities",
        "0.9",
        "--repeats",
        1,
        "--json",
        "--csv",
        tmp_path / "t.csv",
        "--html",
        tmp_path / "t.html",
    )
    assert ran.code == 0, ran.err
    (row,) = ran.document["rows"]
    assert "unstructured  90%  " in ran.err and row["others_cores"] >= 0
    assert row["scheme"] == "unstructured" and row["speedup"] > 0 and row["peak_bytes"] > 0 and row["planned_bytes"] > 0
    assert (tmp_path / "t.csv").exists() and (tmp_path / "t.html").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--target", "arm_cpu"], 2, "which is not this machine"),
        (["--tracker", "127.0.0.1:1"], 2, "go together"),
        (["--sparsities", "0.8;0.9"], 2, "separated by commas"),
        (["--csv", "absent/t.csv"], 2, "no folder"),
        (["--model", "abacus"], 2, "abacus"),
    ],
)
def test_what_the_command_cannot_mean_is_one_line(mest_compile_command, tmp_path, monkeypatch, options, code, said):
    monkeypatch.chdir(tmp_path)
    ran = mest_compile_command("table", *options)
    assert (
        ran.code == code
        and ran.out == ""
        and ran.err.startswith("error: ")
        and ran.err.count("\n") == 1
        and said in ran.err
    )


def test_the_harness_resumes_and_records_what_is_skipped_or_failed(repository, tmp_path, monkeypatch):
    measured = []

    def fake(case, rival, repeats):
        measured.append((str(case.options.scheme), rival, repeats))
        if rival == "sparseprop":
            raise NotInstalled("run the script")
        if case.options.scheme == mest.Pattern():
            raise SparsityError("no patterns")
        return Comparison(case, comparison().ours, comparison().rival, {}, {}, "")

    monkeypatch.setattr(run, "compare", fake)
    cases = [
        (Case("mlp").but(scheme=scheme), rival)
        for scheme, rival in (("block", "torch"), ("block", "sparseprop"), ("pattern", "torch"))
    ]
    monkeypatch.setattr(run, "quick", lambda: iter(cases))
    options = ["--quick", "--rounds", "3", "--folder", str(tmp_path)]
    assert run.main(options) == 1
    entries = json.loads((tmp_path / "quick.json").read_text())["entries"]
    assert [next(iter({"ratio", "skipped", "failed"} & set(entry))) for entry in entries.values()] == [
        "ratio",
        "skipped",
        "failed",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]
    measured.clear()
    run.main(options)
    assert [what[:2] for what in measured] == [("block:4x1", "sparseprop"), ("pattern", "torch")]
    measured.clear()
    run.main(["--quick", "--rounds", "4", "--folder", str(tmp_path), "--only", "block"])
    assert measured == [("block:4x1", "torch", 4), ("block:4x1", "sparseprop", 4)]
    (tmp_path / "quick.json").write_text("{")
    with pytest.raises(StateError, match="no file of results"):
        run.main(options)


def test_published_cases_have_keys_of_their_own_and_can_be_compiled_for(repository):
    cases = list(run.full())
    assert len({run.key(case, rival) for case, rival in cases}) == len(cases)
    assert {case.model for case, _ in cases} == {"resnet32", "vgg11", "mlp"} and {
        case.threads for case, _ in cases
    } == {1, 2}
    assert {rival for _, rival in cases} == {
        "torch",
        "torch-compile",
        "sparseprop",
        "onnxruntime-training",
        "mest-one-thread",
        "mest-untuned",
        "mest-avx2",
    }


def test_the_readme_shows_the_recorded_table(repository):
    pages = readme_table.pages()
    assert set(pages) == {readme_table.README, readme_table.DOCUMENT, readme_table.TUNING}
    for path, text in pages.items():
        assert path.read_text() == text, "run python benchmarks/readme_table.py"
    assert f"]({readme_picture.PICTURE.relative_to(repository)})" in readme_table.README.read_text()
    drawn = ElementTree.parse(readme_picture.PICTURE).iter("{http://www.w3.org/2000/svg}text")
    words = [element.text for element in drawn]
    results = json.loads((readme_table.FOLDER / "full.json").read_text())
    bars = [f"{row.speedup:.2f}" for row in readme_table.speeds(results).rows]
    assert len(bars) == 15 and [word for word in words if re.fullmatch(r"\d+\.\d\d", word)] == bars, "readme_picture.py"


def test_the_readme_table_takes_the_headline_net_only(repository):
    entries = {
        "a": comparison().to_dict(),
        "b": comparison("pattern", threads=2).to_dict(),
        "c": {"skipped": "no", "case": {}},
        "d": comparison("filter").to_dict(),
    }
    text = readme_table.table({"entries": entries})
    assert "block:4x1" in text and "filter" in text and "pattern" not in text
    assert readme_table.table(None) == readme_table.NOT_MEASURED
    with pytest.raises(StateError, match="the page has no"):
        readme_table.embed("no markers", text)


def test_importing_the_table_loads_neither_torch_nor_tvm():
    import subprocess

    code = (
        "import sys, mest_compile; mest_compile.speed_table; print(sorted({'torch', 'tvm', 'pandas', "
        "'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
