"""`mest-compile train`: a built-in model or .onnx file, a data set and a scheme to a run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    Scheme,
    Sparsity,
    TargetName,
    Trainable,
    Width,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console
from mest_compile.cli.progress import TrainingProgress

if TYPE_CHECKING:
    from rich.console import Console

    from mest_compile.data import Split
    from mest_compile.training.loop import Trainer
    from mest_compile.training.ondevice import Job
    from mest_compile.training.recipe import Recipe
    from mest_compile.training.run import Run


@dataclass(frozen=True, slots=True)
class Request:
    """What to train; the fields are the options of the same names."""

    model: str
    data: str
    scheme: str
    sparsity: float
    recipe: Recipe
    width: int | None = None
    data_folder: Path | None = None
    distribution: str = "uniform"
    batch: int = 64
    threads: int | None = None
    target: str = "local"
    memory_budget: int | None = None
    lower_density: bool = False
    activations: str = "float32"
    trainable: str | None = None
    out: Path | None = None
    specialize: bool = False
    tracker: str | None = None
    key: str | None = None


def train(
    context: typer.Context,
    model: Model = "resnet20",
    width: Width = None,
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, folder, arrays.")] = "digits",
    data_folder: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    scheme: Scheme = "block",
    sparsity: Sparsity = 0.9,
    distribution: Distribution = "uniform",
    method: Annotated[str, typer.Option(help="em, em_s, set, rigl or static (the mask never changes).")] = "em",
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 10,
    sieve: Annotated[
        float | None, typer.Option(help="Share of the training examples to drop, those forgotten least often.")
    ] = None,
    batch: Batch = 64,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default: 0.1, or the artifact's.")] = None,
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
    seed: Annotated[int, typer.Option(help="Of initial weights, shuffling, augmentation and mutation.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<model>-<scheme>-<time>.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder; takes no other option but --json.")
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
    from mest_compile.sparsity import parse_scheme
    from mest_compile.training.ondevice import Job, check_artifact_options
    from mest_compile.training.recipe import Recipe
    from mest_compile.training.sieve import SieveRule

    given = {name for name in context.params if _is_given(context, name)}
    if artifact is not None:
        check_artifact_options(given)
    elif resume is not None:
        if others := sorted(given - {"resume", "as_json"}):
            raise UsageError(
                f"a resumed run keeps its settings; leave out --{others[0].replace('_', '-')} or start a new run"
            )
        _show(continue_run(resume), as_json)
        return
    elif runtime is not None:
        raise UsageError("--runtime belongs to --artifact; a step that is compiled here finds TVM by itself")
    where: dict[str, Any] = {
        "model": model,
        "width": width,
        "data": data,
        "scheme": scheme,
        "sparsity": sparsity,
        "distribution": distribution,
        "batch": batch,
        "memory_budget": memory_budget,
        "trainable": trainable,
    }
    if recipe is not None:
        where |= {name: value for name, value in Recipe.run_options(recipe).items() if name not in given}
    if artifact is None and parse_scheme(where["scheme"]).name == "dense":
        if "sparsity" in given and sparsity:
            raise UsageError(f"scheme dense has no zeros; leave out --sparsity {sparsity} or choose another scheme")
        where["sparsity"] = 0.0
        if "method" not in given:
            method = "static"
            given.add("method")
    settings: dict[str, Any] = {
        "epochs": epochs,
        "method": method,
        "lr": lr,
        "seed": seed,
        "sieve": None if sieve is None else SieveRule(drop=sieve),
    }
    if recipe is None:
        chosen = Recipe(**settings)
    else:
        chosen = replace(Recipe.from_file(recipe), **{name: value for name, value in settings.items() if name in given})
    if artifact is not None:
        job = Job(
            artifact, where["data"], out or _new_folder(artifact.name), chosen, data_folder, resume, threads, runtime
        )
        _show(_run_artifact(job), as_json)
        return
    _show(
        start_run(
            Request(
                **where,
                recipe=chosen,
                data_folder=data_folder,
                threads=threads,
                target=target,
                lower_density=lower_density,
                activations=activations,
                out=out,
                tracker=tracker,
                key=key,
                specialize=specialize,
            )
        ),
        as_json,
    )


def _run_artifact(job: Job) -> Run:
    from mest_compile.training.ondevice import open_job

    console = stderr_console()
    trainer, split = open_job(job)
    with TrainingProgress(console, trainer.step.batch) as progress:
        trainer.progress = progress
        return _fit(trainer, split, console, f"--artifact {job.artifact} --data {job.data} ")


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def start_run(request: Request) -> Run:
    """Compiles and trains. What can be checked is checked before anything is compiled or written."""
    from mest_compile.data import load
    from mest_compile.hardware.target import find_target, obstacle
    from mest_compile.training.loop import Trainer
    from mest_compile.training.runfolder import RunFolder

    console = stderr_console()
    folder = RunFolder(request.out or _new_folder(f"{Path(request.model).stem}-{request.scheme.replace(':', '')}"))
    folder.require_free()
    target = find_target(request.target)
    if find_device(request.tracker, request.key) is None and (why := obstacle(target)):
        raise UsageError(
            f"--target {request.target} is not this machine ({why}); give the --tracker and --key of a device "
            "that it is, "
            "or build an artifact and train there"
        )
    split = load(request.data, request.data_folder)
    with console.status(f"compiling {request.model} for {request.target}"):
        step = _compile(request, split)
    with TrainingProgress(console, step.batch) as progress:
        trainer = Trainer(step, request.recipe, folder.path, progress, request.specialize)
        source: dict[str, Any] = {
            "data": request.data,
            "data_folder": request.data_folder and str(request.data_folder.resolve()),
        }
        if request.tracker is not None:
            source |= {"tracker": request.tracker, "key": request.key}
        if request.specialize:
            source["specialize"] = True
        trainer.source = source
        return _fit(trainer, split, console)


def continue_run(folder: Path) -> Run:
    """Resumes the run in `folder` on its own data."""
    from mest_compile.data import load
    from mest_compile.training.loop import Trainer
    from mest_compile.training.runfolder import RunFolder

    source = RunFolder(folder).read_source()
    split = load(source["data"], source.get("data_folder"))
    device = find_device(source.get("tracker"), source.get("key"))
    console = stderr_console()
    with console.status(f"compiling the run in {folder}"):
        trainer = Trainer.resume(folder, device=device)
    with TrainingProgress(console, trainer.step.batch) as progress:
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


def _compile(request: Request, split: Split) -> Any:
    import mest_compile as mest
    from mest_compile.models.catalog import build_model
    from mest_compile.sparsity import parse_scheme

    shape = (request.batch, *split.train.images.shape[1:])
    if request.model.endswith(".onnx"):
        if request.width is not None:
            raise UsageError(f"an .onnx file has its width already; leave out --width {request.width}")
        model = request.model
    else:
        model = build_model(request.model, shape, split.train.classes, request.width, request.recipe.seed)
    optimizer = mest.SGD() if request.recipe.lr is None else mest.SGD(lr=request.recipe.lr)
    return mest.compile(
        model,
        shape,
        scheme=parse_scheme(request.scheme),
        sparsity=request.sparsity,
        distribution=request.distribution,
        optimizer=optimizer,
        target=request.target,
        threads=request.threads,
        seed=request.recipe.seed,
        label_smoothing=request.recipe.label_smoothing,
        memory_budget=request.memory_budget,
        lower_density=request.lower_density,
        grow_to=request.recipe.densest(request.sparsity),
        activations=request.activations,
        trainable=request.trainable,
        device=find_device(request.tracker, request.key),
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _show(run: Run, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "folder": str(run.folder),
                "test_accuracy": run.test_accuracy,
                "best": run.best,
                "recipe": run.recipe.to_dict(),
                "epochs": run.history,
            }
        )
        return
    last = run.history[-1]
    print_table(
        ["epochs", "loss", "train accuracy", "test accuracy", "images/s", "run folder"],
        [
            [
                last["epoch"],
                f"{last['loss']:.4f}",
                f"{last['train_accuracy']:.2%}",
                f"{last['test_accuracy']:.2%}",
                f"{last['images_per_second']:.0f}",
                run.folder,
            ]
        ],
    )
