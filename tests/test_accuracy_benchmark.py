"""benchmarks/accuracy.py: what is run, how a run becomes an entry, and the table made of them."""

import json
from dataclasses import asdict

import accuracy
import numpy as np
import pytest

from mest_compile.data import Split, as_dataset


def entry(run, accuracies, seconds=10.0, saved=0):
    return {"run": asdict(run), "test_accuracy": accuracies[-1], "train_seconds": seconds * len(accuracies), "sparsity": run.sparsity,
            "epochs": [{"test_accuracy": found, "train_seconds": seconds, "iterations": 80, "iterations_saved": saved}
                       for found in accuracies]}


def test_every_run_has_its_own_key_and_each_seed_all_rows():
    keys = [run.key for run in accuracy.runs()]
    assert len(set(keys)) == len(keys) == 3 * 15
    rows = {seed: {run.row for run in accuracy.runs() if run.seed == seed} for seed in accuracy.SEEDS}
    assert rows[0] == rows[1] == rows[2] >= {"dense torch", "em_s unstructured 0.9 sieve", "em_s block:4x1 0.9 sieve", "em_s pattern 0.9",
                                             "set unstructured 0.95"}


def test_the_table_compares_with_dense_of_the_same_seed():
    dense = [accuracy.Run("torch", seed=seed) for seed in (0, 1)]
    ours = [accuracy.Run("em_s", "unstructured", 0.9, True, seed) for seed in (0, 1)]
    entries = {dense[0].key: entry(dense[0], [0.8, 0.92]), dense[1].key: entry(dense[1], [0.8, 0.94]),
               ours[0].key: entry(ours[0], [0.926, 0.92], 2.0, saved=20), ours[1].key: entry(ours[1], [0.8, 0.93], 2.5, saved=20)}
    lines = accuracy.table({"entries": entries}).splitlines()
    assert lines[2].startswith("| dense torch | 2 | 93.00 | 1.41 | - | 0.000 | 0.0% | 20 | - |")
    # dense seed 0 never reaches 92.5%; seed 1 in 20 s, ours of seed 1 in 5 s
    assert lines[3] == "| em_s unstructured 0.9 sieve | 2 | 92.50 | 0.71 | -0.50 | 0.900 | 20.0% | 4 | 4.00 (1 of 2) |"


def test_seconds_to_counts_whole_epochs_until_the_accuracy_is_met():
    made = entry(accuracy.Run("torch"), [0.5, 0.7, 0.9], 3.0)
    assert [accuracy.seconds_to(made, wanted) for wanted in (0.5, 0.6, 0.9, 0.91)] == [3.0, 6.0, 9.0, None]


@pytest.mark.parametrize("run", [accuracy.Run("torch"), accuracy.Run("em_s", "block:4x1", 0.9, sieve=True)], ids=lambda run: run.method)
def test_a_run_becomes_an_entry(run, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    train = as_dataset((rng.integers(0, 255, (128, 1, 8, 8), dtype=np.uint8), rng.integers(0, 4, 128)), name="noise")
    test = as_dataset((train.images[:16], train.labels[:16]), like=train, name="noise")
    monkeypatch.setattr("mest_compile.data.load", lambda name, folder: Split(train, test))
    monkeypatch.setattr(accuracy, "WIDTH", 8)
    monkeypatch.setattr(accuracy, "BATCH", 16)
    found = json.loads(json.dumps(accuracy.train(run, tmp_path / "run", None)))
    assert [metrics["epoch"] for metrics in found["epochs"]] == list(range(1, accuracy.EPOCHS + 1))
    assert found["epochs"][-1]["loss"] < found["epochs"][0]["loss"] and found["train_seconds"] > 0
    assert found["sparsity"] == (0.0 if run.method == "torch" else pytest.approx(0.9, abs=0.01))
    assert sum(metrics["iterations_saved"] for metrics in found["epochs"]) == (0 if run.method == "torch" else 5 * 2)
    assert accuracy.train(run, tmp_path / "run", None)["epochs"] == found["epochs"]  # a finished run is read, not run again


def test_the_page_of_results_is_made_of_the_recorded_runs():
    document = accuracy.DOCUMENT.read_text()
    results = json.loads(accuracy.RESULTS.read_text())
    assert accuracy.embed(document, accuracy.table(results)) == document
    assert set(results["entries"]) <= {run.key for run in accuracy.runs()} and results["entries"]
