"""benchmarks/growth.py and peak.py: what grows, the rows that are kept, their table and their picture."""

import json
import sys
from xml.etree import ElementTree

import growth
import peak
import pytest


def row(factor, value, float32, bfloat16, torch):
    seconds = {"float32": [float32] * 3, "bfloat16": [bfloat16] * 3, "torch": [torch] * 3}
    return {"factor": factor, "value": value, "seconds": seconds, "flop": 10**9, "torch": "float32, contiguous"}


RESULTS = {
    "rows": {
        "a": row("block:4x1", 0.5, 4.0, 1.0, 2.0),
        "b": row("block:4x1", 0.9, 1.0, 0.5, 2.0),
        "c": {"factor": "pattern", "value": 0.5, "refused": "less than 5/9"},
        "d": row("pattern", 0.9, 4.0, 4.0, 2.0),
        "e": row("threads", 2, 0.1, 0.05, 0.2),
        "f": row("batch", 8, 0.1, 0.05, 0.2),
    },
    "peak": {"float32": 100.0, "bfloat16": 200.0},
}


def test_one_thing_grows_at_a_time():
    every = list(growth.cases(growth.whole()))
    names = [f"{factor} {value}" for factor, value, _ in every]
    assert len(set(names)) == len(names)
    start = growth.whole().case.to_json()
    for factor, value, case in every:
        differs = {name for name, said in case.to_json().items() if said != start[name]}
        allowed = {"threads": {"threads"}, "batch": {"input_shape"}, "image": {"input_shape"}, "width": {"width"}}
        assert differs <= allowed.get(factor, {"scheme", "sparsity"}), (factor, value)


def test_the_table_tells_where_sparse_begins_to_pay():
    lines = growth.table(RESULTS).splitlines()
    assert lines[2:6] == [
        "| block:4x1 | float32 | 0.50 | 2.00 | 70% |",
        "| block:4x1 | bfloat16 | 2.00 | 4.00 | 50% or less |",
        "| pattern | float32 | - | 0.50 | - |",
        "| pattern | bfloat16 | - | 0.50 | - |",
    ]
    assert lines[-2] == "| threads | 2 | 100.0 | 50.0 | 200.0 | 2.00 | 4.00 | 5% | 5% | float32, contiguous |"
    assert lines[-1] == "| batch | 8 | 100.0 | 50.0 | 200.0 | 2.00 | 4.00 | 10% | 10% | float32, contiguous |"
    texts = {element.text for element in ElementTree.fromstring(growth.draw(RESULTS)).iter() if element.text}
    assert {"block:4x1", "pattern", "batch"} <= texts


@pytest.mark.slow
def test_rows_are_kept_and_not_measured_again(tmp_path, monkeypatch, capsys):
    command = ["growth.py", "--quick", str(tmp_path), "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "batch 8"])
    assert growth.main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "pattern 0.3"])
    assert growth.main() == 0
    kept = json.loads((tmp_path / "growth.json").read_text())
    assert list(kept["rows"]) == ["pattern 0.3", "batch 8"] and "refused" in kept["rows"]["pattern 0.3"]
    found = kept["rows"]["batch 8"]
    assert {len(seconds) for seconds in found["seconds"].values()} == {growth.ROUNDS} and found["flop"] > 0
    assert "| batch | 8 | " in capsys.readouterr().out
    monkeypatch.setattr(growth, "measure", lambda case: pytest.fail("measured again"))
    monkeypatch.setattr(sys, "argv", [*command, "batch 8"])
    assert growth.main() == 0


def test_registers_alone_compute_more_than_a_step(monkeypatch):
    monkeypatch.setattr(peak, "TURNS", 100_000)
    assert 1 < peak.peak("float32") < 1000


def test_the_page_has_the_tables_of_the_recorded_rows():
    results, page = json.loads(growth.FILE.read_text()), growth.DOCUMENT.read_text()
    assert growth.embed(page, growth.table(results)) == page, "run python benchmarks/growth.py"
    assert ElementTree.parse(growth.PICTURE).getroot() is not None
