"""benchmarks/small.py: what it measures, the table that its entries make, and the page that holds it."""

import pytest
import small


def test_the_faster_layout_of_torch_counts():
    seconds = {"block": [1.0], "unstructured": [2.0], "dense": [4.0], "channels_last": [8.0], "contiguous": [6.0]}
    found = {
        "seconds": seconds,
        "planned_bytes": {"block": 3_000_000},
        "torch_bytes": {"channels_last": 10**7, "contiguous": 6 * 10**6},
    }
    lines = small.table({"nets": {"net": {"16": found, "2": found}}}).splitlines()
    assert lines[2:] == [
        f"| net | {batch} | 1000.0 | 6.00 | 3.00 | 1.50 | 3.0 | 6 | 0.50 |" for batch in (2, 16)
    ]  # by batch, not by its text
    assert small.embed(small.DOCUMENT.read_text(), "text\n").count("text\n") >= 1


@pytest.mark.slow
def test_every_side_takes_its_turns(monkeypatch):
    found = small.measure("resnet8", 1, 2)
    assert {len(seconds) for seconds in found["seconds"].values()} == {2}
    assert found["planned_bytes"]["block"] < found["planned_bytes"]["dense"]
    assert min(found["torch_bytes"].values()) > 0
