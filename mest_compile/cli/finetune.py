"""`mest-compile finetune`: a pretrained net and a folder of images to a personal model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.options import (
    Activations,
    Scheme,
    Seed,
    Sparsity,
    TargetName,
    UpdateBudget,
    given_options,
    image_sizes,
    said_schemes,
    said_sparsity,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console
from mest_compile.training.showing import TrainingProgress

if TYPE_CHECKING:
    from rich.console import Console

    from mest_compile.finetuning.ondevice import Learnt
    from mest_compile.finetuning.tuning import Tuned
    from mest_compile.models.inputs import Inputs
    from mest_compile.runtime.step import TrainStep
    from mest_compile.training.run import Progress


CONTINUED = {"data_folder", "continue_from", "epochs", "time_limit", "patience", "artifact", "buffer", "out", "as_json"}
LEARNT = {"data_folder", "continue_from", "epochs", "threads", "seed", "buffer", "out", "as_json"}  # by an artifact


def finetune(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--from", help="Pretrained net, timm:NAME, torchvision:NAME, a built-in one with --weights, an .onnx file."
        ),
    ] = "efficientnet-lite0",
    data_folder: Annotated[
        Path | None,
        typer.Option(help="Folder with a folder of images for each class, or a CSV file of file and label."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the net: safetensors, or a state_dict that torch.save wrote.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Channels x height x width. Default: as the net was trained.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of pixels 0 to 255, a channel's, for a net of your own: 123.7,116.3,103.5.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="The same of their standard deviation: 58.4,57.1,57.4.")] = None,
    trainable: Annotated[
        str, typer.Option(help='What trains beside the classifier: "last:3" blocks, or patterns.')
    ] = "last:3",
    update_budget: UpdateBudget = None,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    epochs: Annotated[int, typer.Option(help="Of the last blocks, at most.", min=1)] = 30,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds beside compiling; epochs are planned by measured speed.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without a better accuracy that end it.", min=1)] = 10,
    batch: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 16,
    optimizer: Annotated[str | None, typer.Option(help="Name, with options. Default: adamw:lr=0.003.")] = None,
    augment: Annotated[
        bool, typer.Option("--augment", help="Shift images; the whole net then runs for each image and epoch.")
    ] = False,
    artifact: Annotated[
        bool, typer.Option("--artifact", help="Leave an artifact as well, from which a device predicts and trains.")
    ] = False,
    target: TargetName = "local",
    threads: Annotated[int | None, typer.Option(help="Default: all cores.", min=1)] = None,
    activations: Activations = "float32",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/finetuned-<time>.")] = None,
    continue_from: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            help="In the place of --from: run folder whose net learns these images and classes as well; an artifact "
            "does so without a compiler.",
        ),
    ] = None,
    buffer: Annotated[str, typer.Option(help="Bytes of examples that are kept for --continue.")] = "16MiB",
    spare_classes: Annotated[
        int, typer.Option(help="Outputs for classes that come later, for which nothing is compiled.", min=0)
    ] = 0,
    resume: Annotated[Path | None, typer.Option(help="Go on with what was stopped in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Make a pretrained net one of your own images."""
    from mest_compile.finetuning.continuing import continued_job
    from mest_compile.finetuning.folder import TunedFolder
    from mest_compile.finetuning.job import Job
    from mest_compile.finetuning.ondevice import EPOCHS, is_artifact, learn
    from mest_compile.finetuning.tuning import new_folder, tune, tuning_options

    given = given_options(context)
    if resume is not None:
        if others := sorted(given - {"resume", "as_json"}):
            name = {"model": "from", "continue_from": "continue"}.get(others[0], others[0].replace("_", "-"))
            raise UsageError(f"a run that goes on keeps its settings; leave out --{name} or start a new run")
        job, folder = Job.from_json(TunedFolder(resume).read()), resume
    elif data_folder is None:
        raise UsageError("finetune: give --data-folder, a folder with a folder of images for each class, or a CSV file")
    elif continue_from is not None:
        device = is_artifact(continue_from)
        if others := sorted(given - (LEARNT if device else CONTINUED)):
            name = "from" if others[0] == "model" else others[0].replace("_", "-")
            what = "an artifact" if device else "a run"
            raise UsageError(f"what continues {what} keeps its net and settings; leave out --{name} or start a new run")
        if device:
            asked: dict[str, Any] = {"threads": threads, "seed": seed, "buffer_bytes": buffer}
            asked["epochs"] = epochs if "epochs" in given else EPOCHS
            with _Shown(stderr_console()) as watch:
                learnt = learn(continue_from, data_folder, out or new_folder(), watch=watch, **asked)
            _show_learnt(learnt, as_json)
            return
        said = {"epochs": epochs, "seconds": time_limit, "patience": patience, "artifact": artifact}
        job = continued_job(continue_from, data_folder, None, None, {**said, "buffer_bytes": buffer})
        folder = out or new_folder()
    else:
        options = tuning_options(
            said_schemes(scheme),
            said_sparsity(sparsity),
            optimizer,
            target=target,
            threads=threads,
            activations=activations,
            trainable=None if update_budget is not None and "trainable" not in given else trainable,
            update_budget=update_budget,
            seed=seed,
        )
        sizes = None if image is None else image_sizes(image)
        job = Job(
            model,
            data_folder,
            options,
            weights=weights,
            inputs=_inputs(sizes, mean, std),
            image=sizes,  # type: ignore[arg-type]
            batch=batch,
            epochs=epochs,
            seconds=time_limit,
            patience=patience,
            augment=augment,
            artifact=artifact,
            buffer_bytes=buffer,  # type: ignore[arg-type]
            spare_classes=spare_classes,
        )
        folder = out or new_folder()
    console = stderr_console()
    with _Shown(console) as watch:
        tuned = tune(job, folder, resume is not None, watch=watch)
    _show(tuned, as_json)


def _inputs(sizes: tuple[int, ...] | None, mean: str | None, std: str | None) -> Inputs | None:
    """How a net of one's own was fed; None: as the pretrained one. Raises UsageError."""
    from mest_compile.models.inputs import Inputs

    if mean is None and std is None:
        return None
    if sizes is None or mean is None or std is None:
        raise UsageError("how a net's images were scaled is told by --image, --mean and --std together")
    return Inputs((sizes[1], sizes[2]), mean=_numbers("mean", mean), std=_numbers("std", std))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as problem:
        raise UsageError(
            f"--{option} is {text!r}; wanted numbers with commas between them, a channel's each"
        ) from problem


class _Shown:
    """A fine-tuning on a console: a line a stage, then what training shows; a context manager."""

    def __init__(self, console: Console):
        self._console, self._status, self._shown = console, console.status(""), ExitStack()

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *unused: object) -> None:
        self._shown.close()

    def on_stage(self, what: str) -> None:
        self._shown.close()
        self._console.print(what, highlight=False, markup=False, soft_wrap=True)
        self._status = self._shown.enter_context(self._console.status(what))

    def on_features(self, done: int, count: int) -> None:
        self._status.update(f"features of {done} of {count} images")

    def of_training(self, step: TrainStep) -> Progress:
        from mest_compile.training.metrics import METRICS

        self._shown.close()
        return self._shown.enter_context(TrainingProgress(self._console, step.batch, METRICS["accuracy"]))


def _show(tuned: Tuned, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "folder": str(tuned.folder),
                "accuracy": tuned.accuracy,
                "head_accuracy": tuned.head_accuracy,
                "kept": tuned.kept,
                "classes": tuned.verdict["classes"],
                "tasks": list(tuned.tasks),
                "seconds": dict(tuned.seconds),
            }
        )
        return
    compiling = tuned.seconds["compiling"]
    print_table(
        ["accuracy", "classifier alone", "kept", "seconds", "compiling", "run folder"],
        [
            [
                f"{tuned.accuracy:.2%}",
                f"{tuned.head_accuracy:.2%}",
                tuned.kept,
                f"{tuned.seconds['total'] - compiling:.1f}",
                f"{compiling:.1f}",
                str(tuned.folder),
            ]
        ],
    )
    _show_tasks(tuned.tasks)
    page, net = tuned.folder / "report.html", tuned.folder / "model.onnx"
    print(f"\n{page} shows what it gets wrong; {net} takes pixels 0 to 255")


def _show_learnt(learnt: Learnt, as_json: bool) -> None:
    if as_json:
        print_json(learnt.told())
        return
    print_table(["accuracy", "folder"], [[f"{learnt.accuracy:.2%}", str(learnt.folder)]])
    _show_tasks(learnt.tasks)
    print(f"\n{learnt.artifact} predicts, trains on, and learns more")


def _show_tasks(tasks: Sequence[Mapping[str, Any]]) -> None:
    """Where there is more than one."""
    if len(tasks) > 1:
        print()
        print_table(
            ["task", "classes", "when learnt", "now"],
            [
                [
                    str(number),
                    ", ".join(task["classes"]),
                    *("" if task[when] is None else f"{task[when]:.2%}" for when in ("learnt", "accuracy")),
                ]
                for number, task in enumerate(tasks, 1)
            ],
        )
