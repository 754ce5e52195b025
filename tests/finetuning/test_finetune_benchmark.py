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
    assert len(set(places)) == 30 and np.bincount(labels[places]).tolist() == [3] * 10
    assert finetune.grown(np.full((1, 28, 28), 7, np.uint8)).tolist() == np.full((1, 96, 96, 3), 7).tolist()


def test_the_table_has_medians_over_seeds():
    runs = [
        {
            "contestant": contestant,
            "data": "digits",
            "accuracy": 0.5 + seed / 10,
            "seconds": 2.0 + seed,
            "cold_compiling_seconds": 1.0,
            "peak_bytes": 2.0**20 * (seed + 1),
        }
        for contestant in finetune.CONTESTANTS
        for seed in range(3)
    ]
    table = finetune.table({"runs": runs})
    assert "| digits | ours | 60.0% | 3.0 | 1.0 | 2 |" in table and table.count("\n") == 1 + len(finetune.CONTESTANTS)


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def alone(said, cache):
        asked.append(said[0])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"compiling_seconds": 3.0 if len(asked) == 1 else 0.1, "accuracy": 0.5}

    monkeypatch.setattr(finetune, "alone", alone)
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        finetune.measure(file, ["digits"], 20, 5, 1)
    assert asked == ["ours", "ours", "ours, dense", "ours, dense"]
    runs = finetune.measure(file, ["digits"], 20, 5, 1)["runs"]
    assert [run["contestant"] for run in runs] == list(finetune.CONTESTANTS) and asked.count("ours") == 2
    assert runs[0]["cold_compiling_seconds"] == 3.0 and json.loads(file.read_text())["runs"] == runs
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
