"""`mest-compile table`: training speed by scheme and sparsity, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.devices import find_device
from mest_compile.cli.options import (
    Activations,
    Batch,
    Classes,
    Distribution,
    Image,
    Model,
    Seed,
    Weights,
    Width,
    said_list,
    said_numbers,
    shape_of,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console


def table(
    model: Model = "resnet32",
    width: Width = None,
    weights: Weights = None,
    image: Image = None,
    classes: Classes = 10,
    batch: Batch = 64,
    target: Annotated[
        str, typer.Option(help="local: this machine. Another one with the tracker and key of such a device.")
    ] = "local",
    tracker: Annotated[
        str | None, typer.Option(help="HOST:PORT of an RPC tracker: measure on a device there, by its own clock.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Key that the device is listed under.")] = None,
    schemes: Annotated[str, typer.Option(help="Names, separated by commas.")] = "unstructured,block,pattern",
    sparsities: Annotated[str, typer.Option(help="Shares of zero weights, separated by commas.")] = "0.8,0.9,0.95",
    distribution: Distribution = "uniform",
    threads: Annotated[int, typer.Option(help="Threads of each side.", min=1)] = 1,
    vs: Annotated[
        str | None,
        typer.Option(
            help="Baseline: torch, torch-compile, sparseprop, onnxruntime-training or mest-dense. Default: "
            "torch; on a device mest-dense, our dense step, which alone runs there."
        ),
    ] = None,
    activations: Activations = "float32",
    repeats: Annotated[int, typer.Option(help="Rounds of each pair.", min=1)] = 9,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the rows as they finish, and the table so far as page, CSV and JSON. A table that was "
            "stopped goes on from there."
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write this CSV file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write this HTML page.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw this picture: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a table of training speed and memory, scheme by sparsity, against dense torch, or on a device against our
    dense step.

    SGD with momentum. Every row is a pair of processes that take turns.
    """
    device = find_device(tracker, key)
    wanted = said_numbers("sparsities", sparsities)
    for path in (csv, html, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {path.absolute().parent} to write {path.name} into")

    from mest_compile.measuring.speedtable import speed_table
    from mest_compile.measuring.table import COLUMNS, SpeedTable

    console = stderr_console()

    def shown(so_far: SpeedTable) -> None:
        cells = so_far.cells()[-1]
        console.print("  ".join(filter(None, cells)), highlight=False, markup=False, soft_wrap=True)
        for path, write in ((csv, so_far.to_csv), (html, so_far.to_html), (plot, so_far.plot)):
            if path is not None:
                write(path)

    with console.status("starting") as status:
        found = speed_table(
            model,
            shape_of(model, batch, image),
            said_list(schemes),
            wanted,
            target,
            vs,
            threads,
            repeats,
            width,
            distribution=distribution,
            seed=seed,
            activations=activations,
            device=device,
            classes=classes,
            weights=weights,
            out=out,
            on_row=shown,
            progress=lambda what, done, total: status.update(f"{what}: {done} of {total} rows done"),
        )
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(COLUMNS, found.cells())
        print(f"\n{found.caption()}")
