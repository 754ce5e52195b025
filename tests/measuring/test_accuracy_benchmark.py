"""benchmarks/accuracy.py: what is run, how a run becomes an entry, and the table made of them."""

import json
from dataclasses import asdict

import accuracy
import documents
import leaderboard
import numpy as np
import pytest

from mest_compile.base.errors import StateError
from mest_compile.data import Split, as_dataset
from mest_compile.training.recipe import Recipe

PACE = {
    "seconds": {
        "dense torch": 1.0,
        "unstructured 0.9 at 0.9": 0.2,
        "unstructured 0.9 at 0.875": 0.25,
        "unstructured 0.9 at 0.85": 0.3,
    },
    "mutation_seconds": {"unstructured 0.9": 1.0},
}


def entry(run, accuracies, iterations=80, saved=0):
    recipe = Recipe(len(accuracies), "static" if run.method == "torch" else run.method, mutate_every=1)
    return {
        "run": asdict(run),
        "test_accuracy": accuracies[-1],
        "sparsity": run.sparsity,
        "recipe": recipe.resolved(run.sparsity).to_dict(),
        "epochs": [
            {"test_accuracy": found, "iterations": iterations, "iterations_saved": saved} for found in accuracies
        ],
    }


def test_every_run_has_its_own_key_and_each_seed_all_rows():
    keys = [run.key for run in accuracy.runs()]
    assert len(set(keys)) == len(keys) == 3 * 21
    rows = {seed: {run.row for run in accuracy.runs() if run.seed == seed} for seed in accuracy.SEEDS}
    assert (
        rows[0]
        == rows[1]
        == rows[2]
        >= {
            "dense torch",
            "em_s unstructured 0.9 sieve",
            "em_s block:4x1 0.9 sieve",
            "em_s pattern 0.9",
            "em_s block:4x1 0.9 float16",
            "em_s block:4x1 0.9 sieve float16",
            "em_s block:4x1 0.9 bfloat16",
            "em_s block:4x1 0.95",
            "em_s block:4x1 0.95 float16",
            "em_s block:4x1 0.95 bfloat16",
            "set unstructured 0.95",
        }
    )


def test_the_table_compares_with_dense_of_the_same_seed():
    dense = [accuracy.Run("torch", seed=seed) for seed in (0, 1)]
    ours = [accuracy.Run("em_s", "unstructured", 0.9, True, seed) for seed in (0, 1)]
    entries = {
        dense[0].key: entry(dense[0], [0.8, 0.92]),
        dense[1].key: entry(dense[1], [0.8, 0.94]),
        ours[0].key: entry(ours[0], [0.926, 0.92], saved=20),
        ours[1].key: entry(ours[1], [0.8, 0.93], saved=20),
    }
    lines = accuracy.table({"entries": entries, "pace": PACE}).splitlines()
    assert lines[2].startswith("| dense torch | 2 | 93.00 | 1.41 | - | 0.000 | 0.0% | - | - |")
    # An epoch of 80 iterations is 80 s of dense torch, 16 s of ours; a mutation before the second epoch. Dense seed 0
    # never reaches 92.5%.
    assert lines[3].startswith("| em_s unstructured 0.9 sieve | 2 | 92.50 | 0.71 | -0.50 | 0.900 | 20.0% |")
    assert lines[3].endswith(f"| {160 / 33:.2f} | {160 / 33:.2f} (1 of 2) |")
    assert accuracy.table({"entries": entries}).splitlines()[3].endswith("| -0.50 | 0.900 | 20.0% | - | - |")
    half = accuracy.Run("em_s", "block:4x1", 0.9, activations="bfloat16")  # a kind whose pace was not measured
    lines = accuracy.table({"entries": entries | {half.key: entry(half, [0.8, 0.93])}, "pace": PACE}).splitlines()
    assert lines[4] == "| em_s block:4x1 0.9 bfloat16 | 1 | 93.00 | - | +1.00 | 0.900 | 0.0% | - | - |"


def test_time_counts_the_pace_of_each_epochs_density_and_the_mutations_until_the_accuracy_is_met():
    run = accuracy.Run("em_s", "unstructured", 0.9)
    made = entry(run, [0.5, 0.7, 0.9, 0.9], 100)
    recipe = Recipe.from_dict(made["recipe"])
    assert accuracy.densities(recipe, 0.9) == [(0.9, False), (0.85, True), (0.875, True), (0.9, True)]
    after = [20.0, 20 + 1 + 30, 51 + 1 + 25, 77 + 1 + 20]
    wanted = [(0.5, after[0]), (0.6, after[1]), (0.9, after[2]), (0.91, None), (None, after[3])]
    assert [accuracy.seconds_to(made, PACE, goal) for goal, _ in wanted] == [
        pytest.approx(seconds) for _, seconds in wanted
    ]


def noise():
    rng = np.random.default_rng(0)
    train = as_dataset((rng.integers(0, 255, (128, 1, 8, 8), dtype=np.uint8), rng.integers(0, 4, 128)), name="noise")
    return Split(train, as_dataset((train.images[:16], train.labels[:16]), like=train, name="noise"))


def test_the_pace_of_every_published_kind_is_measured(monkeypatch):
    monkeypatch.setattr("mest_compile.data.load", lambda name, folder: noise())
    for name, value in (("WIDTH", 8), ("BATCH", 16), ("PACE_ROUNDS", 1), ("PACE_BATCHES", 2)):
        monkeypatch.setattr(accuracy, name, value)
    chosen = [
        accuracy.Run("torch"),
        accuracy.Run("em_s", "unstructured", 0.9),
        accuracy.Run("set", "unstructured", 0.9),
    ]
    monkeypatch.setattr(accuracy, "runs", lambda: chosen)
    found = accuracy.measure_pace(None)
    assert set(found["seconds"]) == set(PACE["seconds"]) and set(found["mutation_seconds"]) == set(
        PACE["mutation_seconds"]
    )
    assert all(found["lowest"][name] <= seconds <= found["highest"][name] for name, seconds in found["seconds"].items())
    assert min(found["lowest"].values()) > 0


@pytest.mark.parametrize(
    "run",
    [accuracy.Run("torch"), accuracy.Run("em_s", "block:4x1", 0.9, sieve=True, activations="bfloat16")],
    ids=lambda run: run.method,
)
def test_a_run_becomes_an_entry(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mest_compile.data.load", lambda name, folder: noise())
    monkeypatch.setattr(accuracy, "WIDTH", 8)
    monkeypatch.setattr(accuracy, "BATCH", 16)
    found = json.loads(json.dumps(accuracy.train(run, tmp_path / "run", None)))
    assert [metrics["epoch"] for metrics in found["epochs"]] == list(range(1, accuracy.EPOCHS + 1))
    assert found["epochs"][-1]["loss"] < found["epochs"][0]["loss"] and found["train_seconds"] > 0
    assert found["sparsity"] == (0.0 if run.method == "torch" else pytest.approx(0.9, abs=0.01))
    assert sum(metrics["iterations_saved"] for metrics in found["epochs"]) == (0 if run.method == "torch" else 5 * 2)
    assert (
        accuracy.train(run, tmp_path / "run", None)["epochs"] == found["epochs"]
    )  # a finished run is read, not run again


def test_the_page_of_results_is_made_of_the_recorded_runs():
    document = accuracy.DOCUMENT.read_text()
    results = json.loads(accuracy.RESULTS.read_text())
    assert accuracy.embed(document, accuracy.table(results)) == document
    assert set(results["entries"]) <= {run.key for run in accuracy.runs()} and results["entries"]


def test_the_leaderboard_has_the_fastest_run_that_gets_there_from_every_seed():
    def made(row, *accuracies):
        entries = [entry(accuracy.Run(*row, seed=seed), list(found)) for seed, found in enumerate(accuracies)]
        return {accuracy.Run(**one["run"]).key: one | {"versions": {"mest-compile": "0.10.0"}} for one in entries}

    dense = made(("torch",), (0.9, 0.92), (0.9, 0.91), (0.92, 0.93))
    often = made(("static", "unstructured", 0.9), (0.92, 0.9), (0.92, 0.9), (0.9, 0.91))  # sooner, from two of three
    always = made(("em_s", "unstructured", 0.9), (0.9, 0.92), (0.93, 0.91), (0.9, 0.94))
    old = {"old": {**next(iter(always.values())), "versions": {"mest-compile": "0.9.0"}}}
    begun = {"begun": {**next(iter(always.values())), "versions": {"mest-compile": "0.11.0"}}}  # of few runs so far
    unpaced = made(("em_s", "pattern", 0.9), (0.99,), (0.99,), (0.99,))
    entries = dense | often | always | old | begun | unpaced
    found = leaderboard.row({"entries": entries, "pace": PACE | {"machine": {}, "measured_at": "a"}})
    assert found["release"] == "0.10.0" and found["run"] == "em_s unstructured 0.9" and found["seeds"] == 3
    assert found["seconds"] == accuracy.seconds_to(next(iter(always.values())), PACE, 0.92)
    assert found["dense_seconds"] == (160 + 80) / 2 and found["dense_seeds"] == 2
    with pytest.raises(StateError, match="come to 92% in all seeds"):
        leaderboard.row({"entries": dense | often, "pace": PACE})
    with pytest.raises(StateError, match="no pace"):
        leaderboard.row({"entries": dense})


def test_the_leaderboard_page_has_the_recorded_rows():
    rows, page = json.loads(leaderboard.ROWS.read_text())["rows"], leaderboard.DOCUMENT.read_text()
    assert page == documents.embed(page, leaderboard.table(rows), "leaderboard"), "run python benchmarks/leaderboard.py"
    made = leaderboard.row(json.loads(accuracy.RESULTS.read_text()))
    assert rows[made.pop("release")] == made
