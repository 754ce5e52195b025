"""`mest-compile report`: plots and a page of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mest_compile.cli.output import Json, print_json, print_table


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, of a finished run or one that still trains.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and the plots. Default: RUN/report.")] = None,
    as_json: Json = False,
) -> None:
    """Plots and one self-contained HTML page from a run folder."""
    from mest_compile.training.metrics import main_metric
    from mest_compile.training.reporting import write_report

    facts = write_report(run, out)
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
