"""`mest-compile eval`: how good a trained model is, class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.output import Json, print_json, print_table, stderr_console
from mest_compile.cli.running import load_source

MOST_SHOWN = 20  # classes whose confusion matrix is printed; --json has every one


def evaluate(
    model: Annotated[Path, typer.Argument(help="Run folder, checkpoint, such as RUN/best.safetensors, or artifact.")],
    data: Annotated[str | None, typer.Option(help="Data set. Default: the run's own.")] = None,
    data_folder: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: as it was trained with.", min=1)] = None,
    runtime: Annotated[
        Path | None, typer.Option(help="TVM's libtvm_runtime.so for an artifact, if no tvm package is installed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Test a trained model: its metrics, every class, what classes are called instead, how sure answers are beside how
    right."""
    from mest_compile.training.predicting import evaluated, open_step
    from mest_compile.training.runfolder import RunFolder

    source: dict[str, Any] = {"data": data, "data_folder": data_folder}
    if data is None:
        if data_folder is not None:
            raise UsageError("--data-folder belongs to --data; give both, or neither for the run's own data")
        run = model if model.is_dir() else model.parent
        if not RunFolder(run).source.is_file():
            raise UsageError(f"{model} does not say what data it was trained on; give --data")
        source = RunFolder(run).read_source()
    with stderr_console().status(f"opening {model}"):
        step = open_step(model, threads, runtime)
        source["numbers"] = step.loss.takes_numbers
        if data == "folder" and step.reading is not None and step.reading.inputs is not None:
            source["resize"] = step.reading.inputs.size
        split = load_source(source)
        found = {"model": str(model), "data": split.test.name, **evaluated(step, split.test)}
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from mest_compile.training.metrics import METRICS

    metrics = [METRICS[name] for name in found if name in METRICS]
    print_table(
        ["data", "examples", *(metric.label for metric in metrics)],
        [[found["data"], found["examples"], *(metric.shown(found[metric.name]) for metric in metrics)]],
    )
    if "classes" not in found:
        return
    print()
    rows = [
        [name, one["examples"], _share(one["recall"]), _share(one["precision"])]
        for name, one in found["classes"].items()
    ]
    print_table(["class", "examples", "found", "of its answers right"], rows)
    if len(rows) <= MOST_SHOWN:
        print("\na row a class as it is, a column as it was called")
        names = [row[0] for row in rows]
        lines = [[name, *(count or "" for count in line)] for name, line in zip(names, found["confusion"], strict=True)]
        print_table(["", *names], lines)
    about = found["calibration"]
    print(f"\ncalibration: answers are off by {about['error']:.3f} from how sure they are")
    bins = [
        [f"from {one['from']:.1f}", one["examples"], f"{one['probability']:.3f}", f"{one['accuracy']:.3f}"]
        for one in about["bins"]
    ]
    print_table(["probability", "examples", "mean", "right"], bins)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
