"""Runs beside each other: one page with their curves in common plots and their figures in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mest_compile.base.errors import UsageError
from mest_compile.base.files import write_atomically
from mest_compile.base.pages import page, plots, table
from mest_compile.training.drawing import Epochs, overlaid
from mest_compile.training.metrics import main_metric
from mest_compile.training.reporting import read_epochs, summary
from mest_compile.training.runfolder import RunFolder


def write_overlay(paths: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Writes compare.html into the folder `out`; returns {"runs": their summaries, "files"}.

    Raises StateError where a path holds no run, UsageError where runs are of other metrics, or `out` cannot be written.
    """
    runs: dict[str, tuple[Epochs, dict[str, Any]]] = {}
    for path in paths:
        folder = RunFolder(path)
        epochs = read_epochs(folder)
        name = folder.path.resolve().name
        runs[name if name not in runs else str(path)] = epochs, summary(folder, epochs)
    metrics = {main_metric(facts) for _, facts in runs.values()}
    if len(metrics) > 1:
        raise UsageError(
            f"the runs are judged by {' and '.join(sorted(one.label for one in metrics))}; give those of one"
        )
    metric = metrics.pop()
    rows = [
        (
            name,
            facts["data"],
            facts["method"],
            "dense" if facts["overall_sparsity"] is None else f"{facts['overall_sparsity']:.3f}",
            f"{facts['epochs']}/{facts['of_epochs']}",
            f"{facts['loss']:.4f}",
            metric.shown(facts[f"test_{metric.name}"]),
            f"{facts['images_per_second']:.0f}",
            f"{facts['train_seconds']:.1f}",
            f"{facts['memory_bytes']['total'] / 2**20:.1f}",
        )
        for name, (_, facts) in runs.items()
    ]
    columns = (
        "run",
        "data",
        "method",
        "sparsity",
        "epochs",
        "loss",
        f"test {metric.label}",
        "images/s",
        "seconds",
        "MiB",
    )
    parts = ["<h1>Runs beside each other</h1>", table(rows, columns)]
    parts.append(plots(overlaid({name: epochs for name, (epochs, _) in runs.items()})))
    place = Path(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / "compare.html", page("Runs beside each other", parts))
    except OSError as problem:
        raise UsageError(f"cannot write to {place}: {problem.strerror}; pass another --out") from problem
    return {"runs": [facts for _, facts in runs.values()], "files": [str(place / "compare.html")]}
