"""`mest-compile report`: plots and a page of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mest_compile.cli.output import Json, print_json, print_table, stderr_console


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folder, of a finished run or one that trains; several are laid over each other."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is written. Default: RUN/report, of several runs: report.")
    ] = None,
    against_dense: Annotated[
        bool,
        typer.Option("--against-dense", help="Time the run's step beside the same one with all weights alive, first."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Plots and one self-contained HTML page from a run folder, or a page that lays several runs over each other."""
    from mest_compile.training.metrics import main_metric
    from mest_compile.training.overlay import write_overlay
    from mest_compile.training.reporting import write_report

    if against_dense:
        from mest_compile.training.against import against_dense as measure

        for run in runs:
            with stderr_console().status(f"timing the step of {run} beside a dense one"):
                measure(run)
    if len(runs) > 1:
        _beside(write_overlay(runs, out or Path("report")), as_json)
        return
    facts = write_report(runs[0], out)
    if as_json:
        print_json(facts)
        return
    metric = main_metric(facts)
    print_table(
        ["epochs", "loss", f"test {metric.label}", "mutations", "iterations saved", "report"],
        [
            [
                f"{facts['epochs']}/{facts['of_epochs']}",
                f"{facts['loss']:.4f}",
                metric.shown(facts[f"test_{metric.name}"]),
                facts["mutations"],
                facts["iterations_saved"],
                facts["files"][0],
            ]
        ],
    )


def _beside(found: dict[str, Any], as_json: bool) -> None:
    from mest_compile.training.metrics import main_metric

    if as_json:
        print_json(found)
        return
    metric = main_metric(found["runs"][0])
    tested = f"test_{metric.name}"
    rows = [
        [one["folder"], f"{one['epochs']}/{one['of_epochs']}", f"{one['loss']:.4f}", metric.shown(one[tested])]
        for one in found["runs"]
    ]
    print_table(["run", "epochs", "loss", f"test {metric.label}"], rows)
    print(f"\n{found['files'][0]}")
