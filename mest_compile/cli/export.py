"""`mest-compile export`: the model of a run for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mest_compile.base.errors import UnknownName, UsageError
from mest_compile.cli.output import Json, print_json, print_table

FORMATS = ("onnx", "torch", "safetensors")


def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or a checkpoint of one, such as RUN/best.safetensors.")],
    form: Annotated[str, typer.Option("--format", help="onnx, torch (a state_dict) or safetensors (with masks).")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    opset: Annotated[int | None, typer.Option(help="Of the .onnx file. Default: 17.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="The .onnx file that was trained: write that file with the weights of the run.")
    ] = None,
    scaled: Annotated[
        bool,
        typer.Option(
            "--scaled",
            help="The .onnx file takes images that are scaled already, as the step does, not pixels.",
        ),
    ] = False,
    compressed: Annotated[
        bool,
        typer.Option(
            "--compressed", help="Of sparse weights the safetensors file holds what lives, and a bit a weight."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the trained model as ONNX, torch state_dict or safetensors. Nothing is compiled.

    An .onnx file of a model that was trained on pixels takes pixels, 0 to 255 as float32, and scales them itself.
    """
    if form not in FORMATS:
        raise UnknownName(f"no format {form!r}; there are: {', '.join(FORMATS)}")
    asked = [
        name for name, value in (("opset", opset), ("into", into), ("scaled", scaled or None)) if value is not None
    ]
    if form != "onnx" and asked:
        raise UsageError(f"--{asked[0]} belongs to --format onnx; leave it out")
    if form != "safetensors" and compressed:
        raise UsageError("--compressed belongs to --format safetensors; leave it out")
    from mest_compile import exporting
    from mest_compile.runtime.trained import read_step

    step = read_step(run)
    known = step.reading is not None and step.reading.inputs is not None
    pixels = form == "onnx" and into is None and not scaled and known
    if form == "onnx":
        exporting.to_onnx(step, out, opset, into, pixels)
    elif form == "torch":
        exporting.save_torch(step, out)
    else:
        exporting.to_safetensors(step, out, compressed)
    size = out.stat().st_size
    if as_json:
        told = {"reading": None if step.reading is None else step.reading.to_json()}
        takes = {"takes": "pixels" if pixels else "scaled images"} if form == "onnx" else {}
        print_json({"file": str(out), "format": form, "bytes": size, "sparsity": step.sparsity(), **takes, **told})
    else:
        print_table(["file", "format", "KiB"], [[str(out), form, round(size / 1024, 1)]])
        if form == "onnx":
            print(f"\nits input: {'pixels 0 to 255, float32' if pixels else 'images scaled as in training'}")
