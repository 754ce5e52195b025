"""`mest-compile train`: a built-in model or .onnx file, a data set and a scheme to a run folder."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.devices import find_device
from mest_compile.cli.options import (
    Activations,
    Batch,
    Distribution,
    Model,
    Pretrained,
    Scheme,
    Sparsity,
    TargetName,
    Trainable,
    UpdateBudget,
    Weights,
    Width,
    print_choice,
    said_schemes,
    said_sparsity,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console
from mest_compile.cli.progress import TrainingProgress

if TYPE_CHECKING:
    from rich.console import Console

    from mest_compile.data import Split
    from mest_compile.devices.session import Device
    from mest_compile.hardware.target import Target
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
    width: int | None = None
    pretrained: bool = False
    weights: Path | None = None
    data_folder: Path | None = None
    batch: int = 64
    teacher: Path | None = None
    out: Path | None = None
    specialize: bool = False
    tracker: str | None = None
    key: str | None = None


def train(
    context: typer.Context,
    model: Model = "resnet20",
    width: Width = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, folder, arrays.")] = "digits",
    data_folder: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    distribution: Distribution = "uniform",
    method: Annotated[
        str,
        typer.Option(help="em, em_s, set, rigl, gradual (prunes a dense model) or static (the mask never changes)."),
    ] = "em",
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 10,
    sieve: Annotated[
        float | None, typer.Option(help="Share of the training examples to drop, those forgotten least often.")
    ] = None,
    freeze: Annotated[
        float | None,
        typer.Option(help="Share of the training's operations to save by freezing layers, front to back."),
    ] = None,
    batch: Batch = 64,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate. Default: the optimizer's, or the artifact's.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="Name, with options as in cross_entropy:smoothing=0.1,weight=[1,2].")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Name, with options as in adamw:weight_decay=0.05,decay_weights_only=true.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint whose model teaches, for the loss distill.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.", min=1)] = None,
    target: TargetName = "local",
    tracker: Annotated[
        str | None, typer.Option(help="host:port of an RPC tracker: train on a device there, not here.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Name under which such devices serve.")] = None,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            help="Bytes that the step may need at its densest, which em_s is in its first phase; "
            "activations are computed again to meet them.",
            min=1,
        ),
    ] = None,
    lower_density: Annotated[
        bool, typer.Option(help="Raise the sparsity when the memory budget cannot be met otherwise.")
    ] = False,
    activations: Activations = "float32",
    trainable: Trainable = None,
    update_budget: UpdateBudget = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, shuffling, augmentation and mutation.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<model>-<scheme>-<time>.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder; takes --epochs to make it longer, --batch, --target and --json."
        ),
    ] = None,
    artifact: Annotated[
        Path | None,
        typer.Option(
            help="Train from this artifact, which decides model, scheme, sparsity, batch and "
            "target; nothing is compiled."
        ),
    ] = None,
    runtime: Annotated[
        Path | None, typer.Option(help="TVM's libtvm_runtime.so for --artifact, if no tvm package is installed.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe as TOML; options given beside it override it.")] = None,
    specialize: Annotated[
        bool,
        typer.Option(
            "--specialize", help="Compile kernels for the masks at hand, in the background, where that pays (see plan)."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a sparse model; its mask mutates as it learns."""
    from mest_compile.options import StepOptions, find_loss, find_optimizer
    from mest_compile.sparsity.schemes.dense import Dense
    from mest_compile.training.freezing import FreezeRule
    from mest_compile.training.ondevice import Job, check_artifact_options
    from mest_compile.training.recipe import Recipe
    from mest_compile.training.sieve import SieveRule

    given = {name for name in context.params if _is_given(context, name)}
    if artifact is not None:
        check_artifact_options(given)
    elif resume is not None:
        if others := sorted(given - {"resume", "as_json", "epochs", "batch", "target"}):
            raise UsageError(
                f"a resumed run keeps its settings; leave out --{others[0].replace('_', '-')} or start a new run"
            )
        asked: dict[str, Any] = {"epochs": epochs, "batch": batch, "target": target}
        _show(continue_run(resume, **{name: value for name, value in asked.items() if name in given}), as_json)
        return
    elif runtime is not None:
        raise UsageError("--runtime belongs to --artifact; a step that is compiled here finds TVM by itself")
    where: dict[str, Any] = {
        "model": model,
        "width": width,
        "pretrained": pretrained,
        "weights": weights,
        "data": data,
        "batch": batch,
        "scheme": scheme,
        "sparsity": sparsity,
        "distribution": distribution,
        "target": target,
        "threads": threads,
        "memory_budget": memory_budget,
        "lower_density": lower_density,
        "activations": activations,
        "loss": loss,
        "optimizer": optimizer,
        "trainable": trainable,
        "update_budget": update_budget,
    }
    if recipe is not None:
        where |= {name: value for name, value in Recipe.run_options(recipe).items() if name not in given}
    if artifact is None:
        where["scheme"], where["sparsity"] = said_schemes(where["scheme"]), said_sparsity(where["sparsity"])
        if not isinstance(where["scheme"], dict) and where["scheme"].fixed is not None and "sparsity" not in given:
            where["sparsity"] = None
        if isinstance(where["scheme"], Dense) and "method" not in given:
            method = "static"
            given.add("method")
    settings: dict[str, Any] = {
        "epochs": epochs,
        "method": method,
        "lr": lr,
        "seed": seed,
        "sieve": None if sieve is None else SieveRule(drop=sieve),
        "freeze": None if freeze is None else FreezeRule(freeze),
    }
    if recipe is None:
        chosen = Recipe(**settings)
    else:
        chosen = replace(Recipe.from_file(recipe), **{name: value for name, value in settings.items() if name in given})
    if artifact is not None:
        longer = epochs if resume is not None and "epochs" in given else None
        folder = out or _new_folder(artifact.name)
        job = Job(artifact, where["data"], folder, chosen, data_folder, resume, threads, runtime, longer)
        _show(_run_artifact(job), as_json)
        return
    of_step = {field.name: where.pop(field.name) for field in fields(StepOptions) if field.name in where}
    of_step |= {
        "loss": find_loss(of_step["loss"] or "cross_entropy"),
        "optimizer": find_optimizer(of_step["optimizer"]),
    }
    request = Request(
        **where,
        recipe=chosen,
        options=StepOptions(**of_step),
        data_folder=data_folder,
        teacher=teacher,
        out=out,
        tracker=tracker,
        key=key,
        specialize=specialize,
    )
    _show(start_run(request), as_json)


def _run_artifact(job: Job) -> Run:
    from mest_compile.training.ondevice import open_job

    console = stderr_console()
    trainer, split = open_job(job)
    with TrainingProgress(console, trainer.step.batch, trainer.judge.main) as progress:
        trainer.progress = progress
        return _fit(trainer, split, console, f"--artifact {job.artifact} --data {job.data} ")


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def start_run(request: Request) -> Run:
    """Compiles and trains. What can be checked is checked before anything is compiled or written."""
    import mest_compile as mest
    from mest_compile.data import load
    from mest_compile.hardware.target import find_target
    from mest_compile.training.loop import Trainer
    from mest_compile.training.runfolder import RunFolder

    console = stderr_console()
    scheme, target = request.options.scheme_text.replace(":", ""), find_target(request.options.target)
    name = Path(request.model).stem.replace(":", "-")
    folder = RunFolder(request.out or _new_folder(f"{name}-{scheme}"))
    folder.require_free()
    _check_target(target, find_device(request.tracker, request.key))
    teacher = None if request.teacher is None else mest.load(request.teacher).predict
    split = load(request.data, request.data_folder, numbers=request.options.loss.takes_numbers)
    with console.status(f"compiling {request.model} for {request.options.target}"):
        step = _compile(request, split, teacher)
    print_choice(step.describe())
    trainer = Trainer(step, request.recipe, folder.path, None, request.specialize, teacher)
    with TrainingProgress(console, step.batch, trainer.judge.main) as progress:
        trainer.progress = progress
        source: dict[str, Any] = {
            "data": request.data,
            "data_folder": request.data_folder and str(request.data_folder.resolve()),
        }
        if request.tracker is not None:
            source |= {"tracker": request.tracker, "key": request.key}
        if request.specialize:
            source["specialize"] = True
        if request.options.loss.takes_numbers:
            source["numbers"] = True
        if request.teacher is not None:
            source["teacher"] = str(request.teacher.resolve())
        trainer.source = source
        return _fit(trainer, split, console)


def _check_target(target: Target, device: Device | None) -> None:
    """Raises UsageError for a target that is neither this machine nor a device's."""
    from mest_compile.hardware.target import obstacle

    if device is None and (why := obstacle(target)):
        raise UsageError(
            f"--target {target.name} is not this machine ({why}); give the --tracker and --key of a device that it is, "
            "or build an artifact and train there"
        )


def continue_run(folder: Path, epochs: int | None = None, batch: int | None = None, target: str | None = None) -> Run:
    """Resumes the run in `folder` on its own data; what is given is otherwise than it was."""
    import mest_compile as mest
    from mest_compile.data import load
    from mest_compile.hardware.target import find_target
    from mest_compile.training.loop import Trainer
    from mest_compile.training.runfolder import RunFolder

    source = RunFolder(folder).read_source()
    split = load(source["data"], source.get("data_folder"), numbers=source.get("numbers", False))
    teacher = mest.load(source["teacher"]).predict if "teacher" in source else None
    device = find_device(source.get("tracker"), source.get("key"))
    if target is not None:
        _check_target(find_target(target), device)
    console = stderr_console()
    with console.status(f"compiling the run in {folder}"):
        trainer = Trainer.resume(folder, device=device, epochs=epochs, batch=batch, target=target, teacher=teacher)
    with TrainingProgress(console, trainer.step.batch, trainer.judge.main) as progress:
        trainer.progress, trainer.specialize = progress, source.get("specialize", False)
        return _fit(trainer, split, console)


def _fit(trainer: Trainer, split: Split, console: Console, origin: str = "") -> Run:
    """origin: what to give beside --resume."""
    console.print(trainer.about(split.train, split.test), highlight=False, markup=False, soft_wrap=True)
    try:
        return trainer.fit(split.train, split.test)
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


def _compile(request: Request, split: Split, teacher: Any) -> Any:
    from mest_compile.budgeting import sampled
    from mest_compile.compiling import compile_step
    from mest_compile.models.sources import find_model

    shape = (request.batch, *split.train.images.shape[1:])
    options = request.recipe.step_options(request.options)
    model = find_model(
        request.model,
        shape,
        split.train.outputs,
        request.width,
        options.seed,
        request.pretrained,
        request.weights,
    )
    batches = None if options.update_budget is None else sampled(split.train, shape, options, teacher)
    return compile_step(model, shape, options, find_device(request.tracker, request.key), batches=batches)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _show(run: Run, as_json: bool) -> None:
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
