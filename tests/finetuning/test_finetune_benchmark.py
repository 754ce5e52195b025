"""The benchmark of fine-tuning: its images and its table."""

import json
from types import SimpleNamespace

import continual
import finetune
import numpy as np
import pytest

from mest_compile.data.drawn import drawn_digits


def test_digits_are_drawn_by_seed():
    images, labels = drawn_digits(2, 96, 0)
    assert images.shape == (20, 96, 96, 3) and images.dtype == np.uint8 and np.bincount(labels).tolist() == [2] * 10
    assert np.array_equal(images, drawn_digits(2, 96, 0)[0]) and not np.array_equal(images, drawn_digits(2, 96, 1)[0])


def test_each_class_has_as_many_examples_and_what_validates_is_no_other_part(monkeypatch):
    labels = np.arange(100) % 10
    places = finetune.chosen(labels, labels, 3, np.random.default_rng(0))
    assert len(set(places)) == 30 and np.bincount(labels[places]).tolist() == [3] * 10
    monkeypatch.setattr(finetune, "TESTED", 2)
    monkeypatch.setattr(finetune, "grown", lambda images: images)
    split = SimpleNamespace(
        train=SimpleNamespace(images=np.arange(100).reshape(100, 1, 1, 1), labels=labels),
        test=SimpleNamespace(images=np.arange(100, 140).reshape(40, 1, 1, 1), labels=labels[:40]),
    )
    monkeypatch.setattr("mest_compile.data.load", lambda *_: split)
    train, test = finetune.data_of("fashion-mnist", 3, 0)
    trained, others = finetune.data_of("fashion-mnist", 3, 0, validates=True)
    for (images, its), count in (train, 3), (trained, 3), (test, 2), (others, 2):
        assert np.bincount(its).tolist() == [count] * 10 and (images.ravel() % 10 == its).all()
    assert set(test[0].ravel()) <= set(range(100, 140)) and not set(others[0].ravel()) & {
        *trained[0].ravel(),
        *range(100, 140),
    }
    monkeypatch.undo()
    assert finetune.grown(np.full((1, 28, 28), 7, np.uint8)).tolist() == np.full((1, 96, 96, 3), 7).tolist()


def test_the_table_has_medians_over_seeds():
    runs = [
        {
            "contestant": contestant,
            "data": "digits",
            "examples": 20,
            "epochs": 5,
            "classifier_accuracy": 0.4,
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
    assert "| digits of 20 a class, 5 epochs | ours | 0.001 | 60.0% | 3.0 | 1.0 | 2 | 1.0 | 1.0 |" in table
    assert "ours, classifier alone | | 40.0% |" in table and table.count("\n") == 2 + len(finetune.CONTESTANTS)


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def alone(said, cache):
        contestant, *_, rate, part = said
        asked.append((contestant, rate, part))
        if len(asked) == 22:
            raise KeyboardInterrupt
        accuracy = 0.9 if rate == "0.004" and contestant == "ours" else 0.5
        return {
            "compiling_seconds": 3.0 if len(asked) == 19 else 0.1,
            "accuracy": accuracy,
            "peak_bytes": len(asked),
            "rate": float(rate),
        }

    monkeypatch.setattr(finetune, "alone", alone)
    file = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        finetune.measure(file, ["digits"], 20, 5, 1)
    rates = ("0.0005", "0.0015", "0.004")
    some = [contestant for contestant in finetune.CONTESTANTS if contestant != finetune.KEPT]
    assert asked[:18] == [(contestant, rate, "validate") for contestant in some for rate in rates]
    sparser = ("ours, 90%", "0.0015", "test")  # the middle of rates that are as good
    assert asked[18:] == [("ours", "0.004", "test")] * 2 + [sparser] * 2
    runs = finetune.measure(file, ["digits"], 20, 5, 1)["runs"]
    assert [run["contestant"] for run in runs] == list(finetune.CONTESTANTS) and len(asked) == 31
    assert asked.count(("ours", "0.004", "test")) == 2 and asked[-1] == (finetune.KEPT, "0.0015", "test")
    assert runs[0]["cold_compiling_seconds"] == 3.0 and runs[0]["cold_peak_bytes"] == 19
    results = json.loads(file.read_text())
    assert results["runs"] == runs
    assert len(finetune.measure(file, ["digits"], 20, 6, 1)["runs"]) == 14  # other epochs stand beside them
    results["validated"]["digits 20 5"]["ours"]["0.0005"] = 0.95  # what was validated since then
    file.write_text(json.dumps(results))
    again = finetune.measure(file, ["digits"], 20, 5, 1)["runs"]
    assert [run["rate"] for run in again if run["contestant"] == "ours"] == [0.0005] and len(again) == 7
    file.write_text(json.dumps(results | {"size": 97}))
    with pytest.raises(SystemExit, match="was measured otherwise"):
        finetune.measure(file, ["digits"], 20, 5, 1)


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
    assert [run["rate"] for run in runs] == [0.003, 0.001, 0.001] and len(asked) == 15
    assert asked[0] == ("ours", 25, 0.0001, "validate") and asked[12] == ("ours", 100, 0.003, "test")
    assert continual.measure(file, 100, 5, 1)["runs"] == runs and len(asked) == 15


def test_one_class_more_is_timed_beside_compiling(tmp_path, monkeypatch):
    asked = []

    class Step:
        def predict(self, images):
            return np.eye(10)[np.minimum(np.arange(len(images)) % 10, 8)]  # the tenth is not known

    def finetune_(*args, data=None, **given):
        asked.append((args[1] if args else data)[1])
        return SimpleNamespace(step=Step(), seconds={"total": 3.0 + len(asked), "compiling": 1.0})

    monkeypatch.setattr("mest_compile.finetune", finetune_)
    monkeypatch.setattr(continual, "digits", lambda count, seed: (drawn_digits(1, 96, 0), drawn_digits(2, 96, 1)))
    file = tmp_path / "results.json"
    file.write_text('{"runs": []}')
    found = continual.one_more(file)
    assert asked[0].tolist() == list(range(9)) and all(labels.tolist() == [9] for labels in asked[1:])
    assert found == {"seconds": 7.0, "compiling_seconds": 1.0, "old": 1.0, "new": 0.0}
    kept = {"examples": 20, "epochs": 5, **found, **continual.made_on()}
    assert json.loads(file.read_text()) == {"runs": [], "class": kept} and "torch" in kept["versions"]
