"""benchmarks/memory.py: what it measures and the tables that its entries make."""

import memory
import pytest


def test_passes_are_compared_with_one_pass():
    passes = {
        "64": {"seconds": [2.0, 2.0], "planned_bytes": 8 * 2**20},
        "16": {"seconds": [1.0, 3.0], "planned_bytes": 2 * 2**20},
    }
    lines = memory.passes_table({"64, float32": passes}).splitlines()
    assert lines[2:] == [
        "| 64, float32 | 64 | 8.0 | 1.00 | 1.00 |",
        "| 64, float32 | 16 | 2.0 | 0.25 | 1.00 |",
    ]


def test_rates_stand_under_the_size_that_they_are_of():
    rates = {"forward": {"112": 79.2, "7": 62.0}, "grad_input": {"7": 34.0}, "grad_weight": {"112": 82.0}}
    found = {"resnet18": {"planned_bytes": 2**20, "seconds": [0.2, 0.1, 0.3], "gflops": rates}}
    forward, grad_input, grad_weight = memory.images_table(found).splitlines()[2:]
    assert forward.endswith("| 1 | 200 | forward | 79 |  |  |  | 62 |")
    assert grad_input == "| | | | input gradient |  |  |  |  | 34 |"
    assert grad_weight == "| | | | weight gradient | 82 |  |  |  |  |"


@pytest.mark.slow
def test_small_steps_are_measured(monkeypatch):
    monkeypatch.setattr(memory, "MODEL", "resnet8")
    monkeypatch.setattr(memory, "WIDTH", 16)
    monkeypatch.setattr(memory, "IMAGES", (1, 3, 64, 64))
    passes = memory.measure_passes(8, "float32", rounds=1)
    assert list(passes) == ["8", "4", "2", "1"]
    assert passes["1"]["planned_bytes"] < 0.5 * passes["8"]["planned_bytes"]
    found = memory.measure_images("resnet18", repeats=1)
    assert set(found["gflops"]) == set(memory.PHASES) and min(found["gflops"]["forward"].values()) > 0
    assert set(found["gflops"]["forward"]) == {"32", "16", "8", "4", "2"}
