"""Runs from the command line: begun, gone on with, shown."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mest_compile.base.errors import UsageError
from mest_compile.cli.devices import find_device
from mest_compile.cli.options import print_choice
from mest_compile.cli.output import print_json, print_table, stderr_console
from mest_compile.cli.progress import CompileProgress
from mest_compile.hardware.host import BUSY, load_average
from mest_compile.sparsity.distributions import together
from mest_compile.training.showing import TrainingProgress

if TYPE_CHECKING:
    from rich.console import Console

    from mest_compile.data import Split
    from mest_compile.devices.session import Device
    from mest_compile.hardware.target import Target
    from mest_compile.kernels.cache import Builder
    from mest_compile.options import StepOptions
    from mest_compile.training.loop import Trainer
    from mest_compile.training.ondevice import Job
    from mest_compile.training.recipe import Recipe
    from mest_compile.training.run import Run


@dataclass(frozen=True, slots=True)
class Request:
    """What to train; the fields are the options of the same names. options: of the step, but for what the recipe
    decides."""

    model: str
    data: str
    recipe: Recipe
    options: StepOptions
    width: float | None = None
    pretrained: bool = False
    weights: Path | None = None
    data_folder: Path | None = None
    resize: tuple[int, int] | None = None
    val_split: float = 0.0
    batch: int = 64
    teacher: Path | None = None
    out: Path | None = None
    specialize: bool = False
    tracker: str | None = None
    key: str | None = None
    until: int | None = None


class Until:
    """A trainer's callback that pauses it after an epoch."""

    def __init__(self, trainer: Trainer, epoch: int):
        self._trainer, self._epoch = trainer, epoch

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        if metrics["epoch"] >= self._epoch:
            self._trainer.stop()


def run_artifact(job: Job) -> Run:
    from mest_compile.training.ondevice import open_job

    console, busy = stderr_console(), load_average()
    trainer, split = open_job(job)
    with TrainingProgress(console, trainer.step.batch, trainer.judge.main) as progress:
        trainer.progress = progress
        return _fit(trainer, split, console, busy, f"--artifact {job.artifact} --data {job.data} ")


def new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def start_run(request: Request) -> Run:
    """Compiles and trains. What can be checked is checked before anything is compiled or written."""
    import mest_compile as mest
    from mest_compile.data import load
    from mest_compile.hardware.target import find_target
    from mest_compile.kernels.cache import Builder
    from mest_compile.training.loop import Trainer
    from mest_compile.training.runfolder import RunFolder

    console, busy = stderr_console(), load_average()
    scheme, target = request.options.scheme_text.replace(":", ""), find_target(request.options.target)
    name = Path(request.model).stem.replace(":", "-")
    folder = RunFolder(request.out or new_folder(f"{name}-{scheme}"))
    folder.require_free()
    _check_target(target, find_device(request.tracker, request.key))
    teacher = None if request.teacher is None else mest.load(request.teacher).predict
    kind: dict[str, Any] = {"resize": request.resize, "val_split": request.val_split, "seed": request.recipe.seed}
    split = load(request.data, request.data_folder, request.options.loss.takes_numbers, **kind)
    with CompileProgress(console, f"compiling {request.model} for {request.options.target}") as told:
        step = _compile(request, split, teacher, Builder(progress=told.told))
    print_choice(step.describe())
    trainer = Trainer(step, request.recipe, folder.path, None, request.specialize, teacher)
    with TrainingProgress(console, step.batch, trainer.judge.main) as progress:
        trainer.progress = progress
        source: dict[str, Any] = {
            "model": request.model,
            "command": shlex.join(["mest-compile", *sys.argv[1:]]),
            "data": request.data,
            "data_folder": request.data_folder and str(request.data_folder.resolve()),
        }
        if request.tracker is not None:
            source |= {"tracker": request.tracker, "key": request.key}
        if request.specialize:
            source["specialize"] = True
        if request.options.loss.takes_numbers:
            source["numbers"] = True
        if request.resize is not None:
            source["resize"] = list(request.resize)
        if request.val_split:
            source |= {"val_split": request.val_split, "seed": request.recipe.seed}
        if request.teacher is not None:
            source["teacher"] = str(request.teacher.resolve())
        trainer.source = source
        return _fit(trainer, split, console, busy, until=request.until)


def _check_target(target: Target, device: Device | None) -> None:
    """Raises UsageError for a target that is neither this machine nor a device's."""
    from mest_compile.hardware.target import obstacle

    if device is None and (why := obstacle(target)):
        raise UsageError(
            f"--target {target.name} is not this machine ({why}); give the --tracker and --key of a device that it is, "
            "or build an artifact and train there"
        )


def continue_run(
    folder: Path,
    epochs: int | None = None,
    batch: int | None = None,
    target: str | None = None,
    until: int | None = None,
) -> Run:
    """Resumes the run in `folder` on its own data; what is given is otherwise than it was, but
    for `until`, the epoch after which it pauses."""
    import mest_compile as mest
    from mest_compile.hardware.target import find_target
    from mest_compile.training.loop import Trainer
    from mest_compile.training.recovery import kept
    from mest_compile.training.runfolder import RunFolder

    source = RunFolder(folder).read_source()
    if until is not None and until <= (done := len((kept(RunFolder(folder)) or {}).get("history", ()))):
        raise UsageError(f"--until is {until}, and the run in {folder} has made {done} epochs; give a later one")
    split = load_source(source)
    teacher = mest.load(source["teacher"]).predict if "teacher" in source else None
    device = find_device(source.get("tracker"), source.get("key"))
    if target is not None:
        _check_target(find_target(target), device)
    console, busy = stderr_console(), load_average()
    with console.status(f"compiling the run in {folder}"):
        trainer = Trainer.resume(folder, device=device, epochs=epochs, batch=batch, target=target, teacher=teacher)
    with TrainingProgress(console, trainer.step.batch, trainer.judge.main) as progress:
        trainer.progress, trainer.specialize = progress, source.get("specialize", False)
        return _fit(trainer, split, console, busy, until=until)


def load_source(source: Mapping[str, Any]) -> Split:
    """The data of a run, as its source.json says."""
    from mest_compile.data import load

    resize = source.get("resize")
    return load(
        source["data"],
        source.get("data_folder"),
        source.get("numbers", False),
        None if resize is None else (resize[0], resize[1]),
        source.get("val_split", 0.0),
        source.get("seed", 0),
    )


def _fit(
    trainer: Trainer, split: Split, console: Console, load: float, origin: str = "", until: int | None = None
) -> Run:
    """load: of the machine before anything was compiled. origin: what to give beside --resume. until: the epoch after
    which it pauses."""
    if until is not None:
        trainer.callbacks = [*trainer.callbacks, Until(trainer, until)]
    parts = split.train, split.known_test, split.val
    for line in (_header(trainer), trainer.about(*parts), *_busy(load)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    try:
        run = trainer.fit(*parts)
        if run.folder is not None:
            console.print(_next(run.folder), highlight=False, markup=False, soft_wrap=True)
        return run
    except KeyboardInterrupt:
        assert trainer.folder is not None
        if trainer.folder.stamp() is not None:
            console.print(
                f"stopped; continue with: mest-compile train {origin}--resume {trainer.folder.path}",
                markup=False,
                soft_wrap=True,
            )
        raise
    finally:
        trainer.step.close()


def _header(trainer: Trainer) -> str:
    """What is about to be trained, in a line."""
    step = trainer.step
    live, masks = step.live_weights(), step.masks()
    weights = sum(layer.spec.weight_elems for layer in step.layers.values())
    elems = {name: step.layers[name].spec.weight_elems for name in masks}
    sparsity = f", sparsity {together(step.sparsity(), elems):.3f} in sparse layers" if masks else ""
    model = (trainer.source or {}).get("model")
    folder = "" if trainer.folder is None else f"; run folder {trainer.folder.path}"
    return (
        f"{model or 'model'}: {len(masks)} of {len(step.layers)} layers sparse, "
        f"{sum(live.values())} of {weights} weights live{sparsity}; "
        f"{step.memory()['total'] / 2**20:.1f} MiB in steps of {step.batch}; target {step.describe()['target']}, "
        f"{step.describe()['threads']} thread(s){folder}"
    )


def _busy(load: float) -> list[str]:
    """A line where something else runs on this machine."""
    return [f"this machine is busy, its load is {load:.1f}: times do not compare with others"] if load > BUSY else []


def _next(folder: Path) -> str:
    """What to do with a run that has ended."""
    return (
        f"next: mest-compile report {folder} | eval {folder} | predict {folder} PICTURES | "
        f"export {folder} --format onnx --out net.onnx"
    )


def _compile(request: Request, split: Split, teacher: Any, builder: Builder) -> Any:
    from mest_compile.budgeting import sampled
    from mest_compile.compiling import compile_step
    from mest_compile.models.sources import model_to_read

    shape = (request.batch, *split.train.images.shape[1:])
    options = request.recipe.step_options(request.options)
    model = model_to_read(
        request.model,
        shape,
        split.train.outputs,
        request.width,
        options.seed,
        request.pretrained,
        request.weights,
    )
    batches = None if options.update_budget is None else sampled(split.train, shape, options, teacher)
    return compile_step(model, shape, options, find_device(request.tracker, request.key), builder, batches=batches)


def show(run: Run, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "folder": str(run.folder),
                f"test_{run.metric.name}": run.test_score,
                "best": run.best,
                "recipe": run.recipe.to_dict(),
                "epochs": run.history,
            }
        )
        return
    last, metric = run.history[-1], run.metric
    print_table(
        ["epochs", "loss", f"train {metric.label}", f"test {metric.label}", "images/s", "run folder"],
        [
            [
                last["epoch"],
                f"{last['loss']:.4f}",
                metric.shown(last[f"train_{metric.name}"]),
                metric.shown(last[f"test_{metric.name}"]),
                f"{last['images_per_second']:.0f}",
                run.folder,
            ]
        ],
    )
