"""benchmarks/freezing.py: the table that its entries make, and the page that holds it."""

import json

import freezing
import pytest

from mest_compile.training.freezer import Freezer

PACE = {
    "seconds": {"sparsity 0.850, 0 parts frozen": 0.3, "sparsity 0.900, 0 parts frozen": 0.2}
    | {"sparsity 0.900, 4 parts frozen": 0.1}
}


def entry(run, accuracy, iterations, frozen):
    epochs = [(0.85, 0), (0.9, 0), (0.9, 4 * frozen)]
    return {
        "test_accuracy": accuracy,
        "epochs": [
            {
                "test_accuracy": accuracy,
                "iterations": iterations,
                "iterations_saved": 100 - iterations,
                "state": f"sparsity {sparsity:.3f}, {parts} parts frozen",
                "saved": 0.1 * parts,
                "memory_bytes": 100 - 10 * parts,
                "exchange_seconds": 1.0 if parts else 0.0,
            }
            for sparsity, parts in epochs
        ],
    }


def test_the_table_compares_with_plain_training_of_the_same_seed():
    entries = {}
    for seed in (0, 1):
        plain, both = freezing.Run(False, False, seed), freezing.Run(True, True, seed)
        entries[plain.key] = entry(plain, 0.9 + 0.02 * seed, 100, 0)
        entries[both.key] = entry(both, 0.91 + 0.02 * seed, 80, 1)
    lines = freezing.table({"entries": entries, "pace": PACE}).splitlines()
    assert lines[2].endswith("| 2 | 91.00 | 1.41 | +0.00 | 0.0% | 0.0% | 1.00 | 1.00 |")
    share = 80 * (0.3 + 0.2 + 0.1) + 1
    assert lines[3].endswith(f"| 2 | 92.00 | 1.41 | +1.00 | 13.3% | 20.0% | {share / 70:.2f} | 0.60 |")
    assert freezing.table({"entries": entries}).splitlines()[3].endswith("| 20.0% | - | 0.60 |")


def test_runs_are_what_the_page_says():
    assert len({run.key for run in freezing.runs(freezing.FULL)}) == 12
    recipe = freezing.recipe_of(freezing.Run(True, True, 0), freezing.FULL).resolved(freezing.SPARSITY)
    assert recipe.freezing_epochs() == [5, 6, 7] and not Freezer.of_run(
        freezing.recipe_of(freezing.Run(False, True, 0), freezing.FULL), None
    )
    drop = recipe.sieve.drop * (recipe.epochs - recipe.sieve.first(recipe.epochs)) / recipe.epochs
    assert drop == pytest.approx(0.2, abs=0.005)


def test_the_page_of_results_is_made_of_the_recorded_runs():
    document = freezing.DOCUMENT.read_text()
    results = json.loads(freezing.RESULTS.read_text()) if freezing.RESULTS.exists() else None
    text = "" if results is None else freezing.table(results)
    assert freezing.embed(document, text) == document
