"""`mest-compile tune`: the fastest right kernels for a model's step on a device."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.devices import find_device
from mest_compile.cli.options import (
    Activations,
    Batch,
    Classes,
    DenseLayers,
    Distribution,
    Image,
    Model,
    Output,
    Scheme,
    Seed,
    Sparsity,
    TargetName,
    Weights,
    Width,
    said_dense_layers,
    said_output,
    said_schemes,
    said_sparsity,
    shape_of,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console

if TYPE_CHECKING:
    from rich.console import Console

    from mest_compile.records.log import Record
    from mest_compile.tuning.session import SessionResult
    from mest_compile.tuning.task import Task


def tune(
    target: TargetName = "local",
    model: Model = "resnet32",
    width: Width = None,
    weights: Weights = None,
    image: Image = None,
    classes: Classes = 10,
    batch: Batch = 64,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    distribution: Distribution = "uniform",
    dense_layers: DenseLayers = None,
    output: Output = None,
    trials: Annotated[
        int, typer.Option(help="Candidates of each kernel, those of earlier sessions among them.", min=1)
    ] = 64,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which to stop; start again to go on.", min=0)
    ] = None,
    tracker: Annotated[str | None, typer.Option(help="HOST:PORT of an RPC tracker whose devices measure.")] = None,
    key: Annotated[str | None, typer.Option(help="Key that the devices are listed under.")] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Devices of that key that may measure at once; default: all. Without a tracker: emulators.", min=1
        ),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            help="Vector widths to compare first, by whole steps: 8,16; default: those that the CPU may gain from."
        ),
    ] = None,
    runner: Annotated[
        str | None,
        typer.Option(
            "--runner",
            "--measure",
            help="Who measures: local, rpc, or for an ARM target without a "
            "device model (cycles) or instructions; default: rpc with a tracker, else local.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that one candidate may take to compile, and to run.", min=0.1)
    ] = 30.0,
    log: Annotated[
        Path | None, typer.Option(help="File of records to read and append to; default: the user's log of the target.")
    ] = None,
    activations: Activations = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Search the fastest kernels for a device.

    Every candidate's answer is checked, every trial is recorded at once: a session that was stopped, even killed, goes
    on where it was. `mest.compile` and the other commands then use the best records.
    """
    began = monotonic()
    from mest_compile.options import StepOptions
    from mest_compile.tuning.command import Request
    from mest_compile.tuning.command import tune as run
    from mest_compile.tuning.runner import RunnerOptions

    try:
        widths = [int(part) for part in vectors.split(",")] if vectors else None
    except ValueError as problem:
        raise UsageError(f"--vectors {vectors}; wanted whole numbers with commas between them") from problem
    if find_device(tracker, key) is not None and runner not in (None, "rpc"):
        raise UsageError(
            f"the {runner} runner asks no tracker; leave out --tracker and --key, or --runner for their devices "
            "to measure"
        )
    chosen = StepOptions(
        scheme=said_schemes(scheme),
        sparsity=said_sparsity(sparsity),
        distribution=distribution,
        dense_layers=said_dense_layers(dense_layers),
        output=said_output(output),
        target=target,
        seed=seed,
        activations=activations,
    )
    request = Request(model, shape_of(model, batch, image), width, chosen, runner, widths, log, classes, weights)
    options = RunnerOptions(tracker, key, timeout, devices=devices)
    left = None if time_limit is None else max(0.0, time_limit - (monotonic() - began))
    with TuningProgress(stderr_console()) as progress:
        result = run(request, options, trials, left, progress)
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _show(result: SessionResult) -> None:
    from mest_compile.records.log import Measure
    from mest_compile.records.record import unit_of

    unit, scale = unit_of(Measure(result.measure), result.cpu)

    def scaled(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * scale:.3f}"

    rows = []
    for task in result.tasks:
        gain = f"{task.default_seconds / task.best_seconds:.2f}" if task.default_seconds and task.best_seconds else "-"
        failed = ", ".join(f"{count} {outcome}" for outcome, count in task.outcomes.items() if outcome != "ok")
        knobs = " ".join(f"{name}={value}" for name, value in task.knobs.items())
        rows.append(
            [
                task.name,
                task.kernel,
                task.calls,
                scaled(task.default_seconds),
                scaled(task.best_seconds),
                gain,
                task.trials,
                failed,
                knobs or "default",
            ]
        )
    print_table(
        ["first call", "kernel", "calls", f"default {unit}", f"best {unit}", "gain", "trials", "failed", "knobs"], rows
    )
    state = "finished" if result.finished else "stopped; start again to go on"
    print(
        f"\n{result.measured} trials in {result.seconds:.0f} s, {state}. Vectors of {result.vector}. "
        f"Records ({result.measure}): {result.log}"
    )
    if result.left_out:
        print(f"No time was left for: {'; '.join(result.left_out)}.")
    if result.measure == "emulated":
        print("The device is emulated: its times are kept apart and choose no kernels.")


class TuningProgress:
    """Implements tuning.session.Progress on a rich console; a context manager. Time left is what the trials so far
    say."""

    def __init__(self, console: Console):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._whole = self._bar.add_task("starting", total=1, best="")
        self._tasks: dict[str, Any] = {}
        self._said = monotonic()

    def __enter__(self) -> TuningProgress:
        self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.stop()

    def on_stage(self, stage: str, done: int, total: int) -> None:
        self._bar.update(self._whole, description=stage, completed=done, total=max(total, 1))
        if not self._console.is_terminal and done == 0:
            self._console.print(f"{stage}: {total}", highlight=False, soft_wrap=True)

    def on_trial(
        self, task: Task, record: Record, best: float | None, default: float | None, done: int, total: int
    ) -> None:
        from mest_compile.records.record import unit_of

        unit, scale = unit_of(record.measure, record.cpu)
        said = "none right yet" if best is None else f"best {best * scale:.3f} {unit}"
        if best and default:
            said += f", {default / best:.2f} times as fast as the default"
        if task.name not in self._tasks:
            self._tasks[task.name] = self._bar.add_task(task.name, total=total, best="")
        self._bar.update(self._tasks[task.name], completed=done, total=total, best=said)
        if not self._console.is_terminal and monotonic() - self._said > 5:
            self._said = monotonic()
            self._console.print(f"{task.name}: {done} of {total} trials, {said}", highlight=False, soft_wrap=True)
