"""`mest-compile train`: a built-in model or .onnx file, a data set and a scheme to a run folder."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.options import (
    Activations,
    Batch,
    DenseLayers,
    Distribution,
    Microbatch,
    Model,
    Output,
    Pretrained,
    Scheme,
    Sparsity,
    TargetName,
    Trainable,
    UpdateBudget,
    Weights,
    Width,
    given_options,
    said_dense_layers,
    said_output,
    said_schemes,
    said_sparsity,
    sizes_of,
)
from mest_compile.cli.output import Json
from mest_compile.cli.running import Request, continue_run, new_folder, run_artifact, show, start_run
from mest_compile.cli.settings import Setting, recipe_settings


def train(
    context: typer.Context,
    model: Model = "resnet20",
    width: Width = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, folder, arrays.")] = "digits",
    data_folder: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    resize: Annotated[
        str | None, typer.Option(help="Height x width that images of a folder are cut and resized to.")
    ] = None,
    val_split: Annotated[
        float, typer.Option(help="Share of the training examples to choose the best model by instead of the test set.")
    ] = 0.0,
    augment: Annotated[
        str | None,
        typer.Option(help="none, shift, mirror or shift,mirror. Default: what a data set is known to allow."),
    ] = None,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    distribution: Distribution = "uniform",
    dense_layers: DenseLayers = None,
    output: Output = None,
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
    microbatch: Microbatch = None,
    drop_last: Annotated[
        bool | None,
        typer.Option(
            "--drop-last/--keep-last",
            help="Whether the examples that do not fill a last batch are left out, others each epoch. Default: no, but "
            "of an artifact.",
        ),
    ] = None,
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
        str | None,
        typer.Option(
            help="Bytes, or 64MiB, that the step may need at its densest, which em_s is in its first phase; "
            "activations are computed again to meet them."
        ),
    ] = None,
    lower_density: Annotated[
        bool, typer.Option(help="Raise the sparsity when the memory budget cannot be met otherwise.")
    ] = False,
    activations: Activations = "float32",
    trainable: Trainable = None,
    update_budget: UpdateBudget = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without a better model after which training ends.", min=1)
    ] = None,
    setting: Setting = None,
    until: Annotated[
        int | None, typer.Option(help="Epoch after which the run pauses; --resume goes on as if it had not.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, shuffling, augmentation and mutation.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<model>-<scheme>-<time>.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue the run in this folder; takes --epochs to make it longer, --until, --batch, "
            "--target and --json."
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

    given = given_options(context)
    if artifact is not None:
        check_artifact_options(given)
    elif resume is not None:
        if others := sorted(given - {"resume", "as_json", "epochs", "batch", "target", "until"}):
            raise UsageError(
                f"a resumed run keeps its settings; leave out --{others[0].replace('_', '-')} or start a new run"
            )
        asked: dict[str, Any] = {"epochs": epochs, "batch": batch, "target": target, "until": until}
        show(continue_run(resume, **{name: value for name, value in asked.items() if name in given}), as_json)
        return
    elif runtime is not None:
        raise UsageError("--runtime belongs to --artifact; a step that is compiled here finds TVM by itself")
    where: dict[str, Any] = {
        "model": model,
        "width": width,
        "pretrained": pretrained,
        "weights": weights,
        "data": data,
        "data_folder": data_folder,
        "resize": resize,
        "val_split": val_split,
        "batch": batch,
        "scheme": scheme,
        "sparsity": sparsity,
        "distribution": distribution,
        "dense_layers": said_dense_layers(dense_layers),
        "output": said_output(output),
        "target": target,
        "threads": threads,
        "memory_budget": memory_budget,
        "microbatch": microbatch,
        "lower_density": lower_density,
        "activations": activations,
        "loss": loss,
        "optimizer": optimizer,
        "trainable": trainable,
        "update_budget": update_budget,
    }
    if recipe is not None:
        where |= {name: value for name, value in Recipe.run_options(recipe).items() if name not in given}
    if where["data_folder"] is not None:
        where["data_folder"] = Path(where["data_folder"])
    where["resize"] = sizes_of("resize", where["resize"])
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
        "augment": augment,
        "patience": patience,
        "drop_last": drop_last,
    }
    more = recipe_settings(setting, given)
    if recipe is None:
        chosen = Recipe(**settings | more)
    else:
        said = {name: value for name, value in settings.items() if name in given}
        chosen = replace(Recipe.from_file(recipe), **said | more)
    if artifact is not None:
        longer = epochs if resume is not None and "epochs" in given else None
        folder = out or new_folder(artifact.name)
        job = Job(artifact, where["data"], folder, chosen, where["data_folder"], resume, threads, runtime, longer)
        show(run_artifact(job), as_json)
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
        teacher=teacher,
        out=out,
        tracker=tracker,
        key=key,
        specialize=specialize,
        until=until,
    )
    show(start_run(request), as_json)
