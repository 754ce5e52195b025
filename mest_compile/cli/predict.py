"""`mest-compile predict`: what a trained model says of pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.output import Json, print_json, print_table, stderr_console


def predict(
    model: Annotated[Path, typer.Argument(help="Run folder, checkpoint, such as RUN/best.safetensors, or artifact.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    top: Annotated[int, typer.Option(help="Classes to tell, the most probable first.", min=1)] = 5,
    csv: Annotated[Path | None, typer.Option(help="Write a line a picture to this CSV file; - is stdout.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: as it was trained with.", min=1)] = None,
    runtime: Annotated[
        Path | None, typer.Option(help="TVM's libtvm_runtime.so for an artifact, if no tvm package is installed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a trained model sees in pictures of any size: they are cut, resized and scaled as its data was."""
    from mest_compile.training.predicting import answers, by_name, open_step, pictures_in, write_csv

    if csv is not None and as_json:
        raise UsageError("--csv and --json are two forms of one result; leave one out")
    files = pictures_in(images)
    with stderr_console().status(f"opening {model}") as status:
        step = open_step(model, threads, runtime)
        found = []
        for one in answers(step, files, top):
            found.append(one)
            status.update(f"{len(found)} of {len(files)} pictures")
    if as_json:
        print_json(found)
    elif csv is not None and str(csv) == "-":
        write_csv(sys.stdout, found)
    elif csv is not None:
        try:
            with csv.open("w", newline="", encoding="utf-8") as file:
                write_csv(file, found)
        except OSError as problem:
            raise UsageError(f"{csv} cannot be written: {problem.strerror}; give another --csv") from problem
        print(f"{csv}: {len(found)} pictures")
    elif "top" in found[0]:
        rows = [
            [
                one["file"],
                one["class"],
                f"{one['probability']:.1%}",
                ", ".join(f"{best['class']} {best['probability']:.1%}" for best in one["top"][1:]),
            ]
            for one in found
        ]
        print_table(["picture", "class", "probability", "then"], rows)
    else:
        shown = "{:.1%}" if "probabilities" in found[0] else "{:.4g}"
        rows = [[one["file"], *map(shown.format, by_name(one).values())] for one in found]
        print_table(["picture", *by_name(found[0])], rows)
