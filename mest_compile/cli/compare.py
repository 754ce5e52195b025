"""`mest-compile compare`: methods, schemes and sparsities beside dense torch, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mest_compile.cli.options import Batch, BuiltIn, DataFolder, Width, said_list, said_numbers
from mest_compile.cli.output import Json, print_json, print_table
from mest_compile.cli.sweep import LiveTable


def compare(
    methods: Annotated[str, typer.Option(help="Training methods, separated by commas.")] = "em_s,rigl,static",
    schemes: Annotated[str, typer.Option(help="Schemes, separated by commas.")] = "block,pattern",
    sparsities: Annotated[str, typer.Option(help="Shares of zero weights, separated by commas.")] = "0.9",
    seeds: Annotated[int, typer.Option(help="Runs of each, from seed 0 on.", min=1)] = 3,
    model: BuiltIn = "resnet20",
    width: Width = None,
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, folder, arrays.")] = "digits",
    data_folder: DataFolder = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.", min=1)] = 40,
    batch: Batch = 64,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default: SGD's 0.1.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of each pair that is timed.", min=1)] = 9,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: runs/compare-MODEL-DATA.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="File for the page. Default: compare.html in it.")] = None,
    as_json: Json = False,
) -> None:
    """Train every method with every scheme at every sparsity, and dense torch beside them, time their steps, and make
    one table: accuracy with its spread, speed-up with its interval, memory. What is there is not done again."""
    from mest_compile.sweeping.comparing import COLUMNS
    from mest_compile.sweeping.comparing import compare as run

    where: dict[str, Any] = {"model": model, "data": data, "batch": batch}
    where |= {} if width is None else {"width": width}
    where |= {} if data_folder is None else {"data_folder": str(data_folder)}
    base: dict[str, Any] = {"epochs": epochs, "run": where} | ({} if lr is None else {"lr": lr})
    folder = out or Path("runs") / f"compare-{Path(model).stem.replace(':', '-')}-{data}"
    with LiveTable() as table:
        found = run(
            base,
            said_list(methods),
            said_list(schemes),
            said_numbers("sparsities", sparsities),
            seeds,
            folder,
            repeats,
            table.told,
            table.say,
        )
    found.to_html(html or folder / "compare.html")
    if as_json:
        print_json(found.to_dict())
        return
    print_table(COLUMNS, [row.cells() for row in found.rows])
    print(f"\n{found.caption()}\n{html or folder / 'compare.html'}")
