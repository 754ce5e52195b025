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
    as_json: Json = False,
) -> None:
    """Write the trained model as ONNX, torch state_dict or safetensors. Nothing is compiled."""
    if form not in FORMATS:
        raise UnknownName(f"no format {form!r}; there are: {', '.join(FORMATS)}")
    if form != "onnx" and (opset, into) != (None, None):
        raise UsageError(f"--{'into' if opset is None else 'opset'} belongs to --format onnx; leave it out")
    from mest_compile import exporting
    from mest_compile.opening import read_step
    from mest_compile.training.runfolder import RunFolder

    step = read_step(RunFolder(run).checkpoint if run.is_dir() else run)
    if form == "onnx":
        exporting.to_onnx(step, out, opset, into)
    else:
        {"torch": exporting.save_torch, "safetensors": exporting.to_safetensors}[form](step, out)
    size = out.stat().st_size
    if as_json:
        print_json({"file": str(out), "format": form, "bytes": size, "sparsity": step.sparsity()})
    else:
        print_table(["file", "format", "KiB"], [[str(out), form, round(size / 1024, 1)]])
