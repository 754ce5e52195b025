"""The benchmark of fine-tuning: its images and its table."""

import json

import continual
import finetune
import numpy as np
import pytest

from mest_compile.data.drawn import drawn_digits


def test_digits_are_drawn_by_seed():
    images, labels = drawn_digits(2, 96, 0)
    assert images.shape == (20, 96, 96, 3) and images.dtype == np.uint8 and np.bincount(labels).tolist() == [2] * 10
    assert np.array_equal(images, drawn_digits(2, 96, 0)[0]) and not np.array_equal(images, drawn_digits(2, 96, 1)[0])


def test_each_class_has_as_many_examples():
    labels = np.arange(100) % 10
    places = finetune.chosen(labels, labels, 3, np.random.default_rng(0))
    (x, y), (vx, vy) = finetune.halves((np.arange(100), labels))
    assert np.bincount(vy).tolist() == [2] * 10 and np.bincount(y).tolist() == [8] * 10 and not set(x) & set(vx)
    assert len(set(places)) == 30 and np.bincount(labels[places]).tolist() == [3] * 10
    assert finetune.grown(np.full((1, 28, 28), 7, np.uint8)).tolist() == np.full((1, 96, 96, 3), 7).tolist()


def test_the_table_has_medians_over_seeds():
    runs = [
        {
            "contestant": contestant,
            "data": "digits",
            "rate": 0.001,
            "accuracy": 0.5 + seed / 10,
            "seconds": 2.0 + seed,
            "cold_compiling_seconds": 1.0,
            "peak_bytes": 2.0**20 * (seed + 1),
        }
        for contestant in finetune.CONTESTANTS
        for seed in range(3)
    ]
    table = finetune.table({"runs": runs})
    assert "| digits | ours | 0.001 | 60.0% | 3.0 | 1.0 | 2 | 1.0 | 1.0 |" in table and table.count("\n") == 1 + len(
        finetune.CONTESTANTS
    )


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def alone(said, cache):
        contestant, *_, rate, part = said
        asked.append((contestant, rate, part))
        if len(asked) == 16:
            raise KeyboardInterrupt
        accuracy = 0.9 if rate == "0.004" and contestant == "ours" else 0.5
        return {"compiling_seconds": 3.0 if len(asked) == 13 else 0.1, "accuracy": accuracy, "peak_bytes": len(asked)}

    monkeypatch.setattr(finetune, "alone", alone)
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        finetune.measure(file, ["digits"], 20, 5, 1)
    rates = ("0.0005", "0.0015", "0.004")
    some = [contestant for contestant in finetune.CONTESTANTS if contestant != finetune.KEPT]
    assert asked[:12] == [(contestant, rate, "validate") for contestant in some for rate in rates]
    dense = ("ours, dense", "0.0015", "test")  # the middle of rates that are as good
    assert asked[12:] == [("ours", "0.004", "test")] * 2 + [dense] * 2
    runs = finetune.measure(file, ["digits"], 20, 5, 1)["runs"]
    assert [run["contestant"] for run in runs] == list(finetune.CONTESTANTS) and len(asked) == 21
    assert asked.count(("ours", "0.004", "test")) == 2 and asked[-1] == (finetune.KEPT, "0.0015", "test")
    assert runs[0]["cold_compiling_seconds"] == 3.0 and runs[0]["cold_peak_bytes"] == 13
    assert json.loads(file.read_text())["runs"] == runs
    with pytest.raises(SystemExit, match="was measured otherwise"):
        finetune.measure(file, ["digits"], 20, 6, 1)


def test_the_continual_table_compares_with_ours():
    runs = [
        {
            "contestant": contestant,
            "learnt": [0.9, 0.8],
            "accuracies": [0.5, 0.8],
            "seconds": 10.0 * times,
            "operations": 1e9 * times,
        }
        for contestant, times in zip(continual.CONTESTANTS, (1, 5, 20))
    ]
    table = continual.table({"runs": runs})
    assert "| ours | 65.0% | 40.0% | 10 | 1.0 | 1.0 |" in table
    assert "| torch, full replay | 65.0% | 40.0% | 200 | 20.0 | 20.0 |" in table


def test_each_continual_contestant_has_the_rate_that_validates_best(tmp_path, monkeypatch):
    asked = []

    def alone(contestant, count, epochs, seed, rate, part):
        asked.append((contestant, count, rate, part))
        return {"accuracies": [0.9 if (contestant, rate) == ("ours", 0.003) else 0.5] * 5}

    monkeypatch.setattr(continual, "alone", alone)
    file = tmp_path / "results.json"
    runs = continual.measure(file, 100, 5, 1)["runs"]
    assert [run["rate"] for run in runs] == [0.003, 0.001, 0.001] and len(asked) == 12
    assert asked[0] == ("ours", 25, 0.0003, "validate") and asked[9] == ("ours", 100, 0.003, "test")
    assert continual.measure(file, 100, 5, 1)["runs"] == runs and len(asked) == 12
