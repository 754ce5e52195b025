"""mest-compile compare: a sweep, dense torch beside it, and one table of both."""

import json

import pytest
from here import Here

from mest_compile.base.errors import UsageError
from mest_compile.measuring.table import Row, SpeedTable
from mest_compile.sweeping import comparing, dense, running
from mest_compile.sweeping.cell import make_cell
from mest_compile.sweeping.comparing import Compared, compare

FACTS = {"model": "mlp", "width": 16, "input_shape": [64, 1, 8, 8], "threads": 1, "machine": {}, "baseline": "torch"}
FACTS |= {"repeats": 9, "versions": {}, "measured_at": "today"}
ROWS = (
    Row("block:4x1", 0.8, 0.01, 0.02, 2.0, 1.8, 2.2, 0.95, 100, 50 * 2**20, 100 * 2**20),
    Row("unstructured", 0.8, problem="there is no such layer"),
)
ARGUMENTS = ["--methods", "em_s,static", "--schemes", "block", "--sparsities", "0.8", "--seeds", "1", "--model", "mlp"]


@pytest.fixture
def here(monkeypatch):
    """Cells and torch in this process, one after the other; speeds as written above."""
    workers = Here()
    monkeypatch.setattr("mest_compile.sweeping.sweep.local_workers", lambda cells, threads: workers)
    monkeypatch.setattr(running, "LOOKS_SECONDS", 0.0)
    monkeypatch.setattr(dense, "trained", lambda cells: [dense.train(cell) for cell in cells])
    monkeypatch.setattr(comparing, "speed_table", lambda *given, **options: SpeedTable(ROWS, FACTS))
    return workers


def test_it_ends_in_a_table_of_accuracy_speed_and_memory(here, mest_compile_command, tmp_path):
    asked = ["compare", *ARGUMENTS, "--width", "16", "--epochs", "2", "--lr", "0.05", "--out", tmp_path / "compare"]
    found = mest_compile_command(*asked, "--json").document
    torch, *ours = found["rows"]
    assert torch["scheme"] == "dense torch" and torch["speedup"] == 1 and torch["peak_bytes"] == 100 * 2**20
    assert 0.05 < torch["mean"] < 1 and torch["spread"] is None
    assert [(row["scheme"], row["method"]) for row in ours] == [("block:4x1", "em_s"), ("block:4x1", "static")]
    by_key = {cell["settings"]["method"]: cell["test"] for cell in found["sweep"]["cells"]}
    assert all(row["accuracies"] == [by_key[row["method"]]] and row["of_dense"] == 0.5 for row in ours)
    page = (tmp_path / "compare" / "compare.html").read_text()
    assert page.count("<svg") == 2 and f"{100 * torch['mean']:.2f}" in page and "1.80 to 2.20" in page
    assert json.loads((tmp_path / "compare" / "compare.json").read_text()) == found
    commands = len(here.commands)
    assert "block:4x1" in mest_compile_command(*asked).out and len(here.commands) == commands == 2


def test_spread_is_over_seeds_and_what_is_missing_says_why():
    row = Compared("block:4x1", 0.9, "em_s", (0.5, 0.7), 2.0, 1.9, 2.1)
    assert row.mean == pytest.approx(0.6) and row.spread == pytest.approx(0.2 / 2**0.5)
    assert row.cells()[1:4] == ["90%", "em_s", "60.00 ± 14.14"]
    cell = {"state": "finished", "test": 0.5, "problem": None}
    cells = [{**cell, "settings": {"scheme": "unstructured", "sparsity": 0.8, "method": "set", "seed": 0}}]
    cells += [{**cells[0], "state": "diverged", "test": 0.1, "problem": "the loss is nan"}]
    _, found = comparing._rows(comparing.SweepResults(tuple(cells), "accuracy", ""), [0.9], ROWS)
    assert found.accuracies == (0.5,) and found.problem == "the loss is nan; there is no such layer"
    assert found.cells()[5:] == ["-"] * 4


def test_dense_torch_learns_by_the_same_rates_and_is_kept(monkeypatch, tmp_path):
    run = {"model": "mlp", "width": 64, "data": "digits", "scheme": "dense"}
    cell = make_cell({"epochs": 4, "method": "static", "lr": 0.1, "run": run}, {}, tmp_path)
    found = dense.train(cell)
    assert found["test"] > 0.8 and found["epochs"] == 4
    assert dense.train(cell)["test"] == found["test"]
    cell.folder.mkdir(parents=True)
    (cell.folder / "torch.json").write_text(json.dumps({"test": 0.5}))
    monkeypatch.setattr(dense.subprocess, "run", None)
    assert dense.trained([cell]) == [{"test": 0.5}]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": "distill"}, "cross_entropy"),
        ({"sieve": {"drop": 0.1}}, "without sieve"),
        ({"methods": []}, "one or more methods"),
        ({"methods": ["em_x"]}, "no method"),
    ],
)
def test_what_torch_cannot_be_beside_is_refused(changed, said, tmp_path):
    base = {"epochs": 4, "run": {"model": "mlp", "data": "digits"}}
    if "loss" in changed:
        base["run"]["loss"] = changed["loss"]
    base |= {name: value for name, value in changed.items() if name == "sieve"}
    with pytest.raises(UsageError, match=said):
        compare(base, changed.get("methods", ["static"]), ["block"], [0.8], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
