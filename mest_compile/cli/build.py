"""`mest-compile build`: an artifact, from which a device trains without the compiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.options import (
    Activations,
    Batch,
    ChoiceData,
    Classes,
    DataFolder,
    DenseLayers,
    Distribution,
    Image,
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
    chosen_by,
    given_options,
    print_choice,
    said_dense_layers,
    said_output,
    said_schemes,
    said_sparsity,
    shape_of,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console

if TYPE_CHECKING:
    from mest_compile.training.recipe import Recipe


def build(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the artifact.")],
    model: Model = "resnet20",
    width: Width = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    image: Image = None,
    classes: Classes = 10,
    batch: Batch = 64,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    distribution: Distribution = "uniform",
    dense_layers: DenseLayers = None,
    output: Output = None,
    target: TargetName = "arm_cpu",
    threads: Annotated[int | None, typer.Option(help="Of the device. Default: its cores.", min=1)] = None,
    activations: Activations = "float32",
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes, or 64MiB, that the step may need at its densest; activations are computed again to meet them."
        ),
    ] = None,
    microbatch: Microbatch = None,
    grow_to: Annotated[
        float | None, typer.Option(help="Lowest sparsity that mutations will grow to, which memory is planned for.")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="Name, with options as in cross_entropy:smoothing=0.1,weight=[1,2].")
    ] = "cross_entropy",
    optimizer: Annotated[
        str, typer.Option(help="Name, with options as in adamw:weight_decay=0.05,decay_weights_only=true.")
    ] = "sgd",
    trainable: Trainable = None,
    dense_start: Annotated[
        bool, typer.Option("--dense-start", help="Begin with all weights, for the method gradual.")
    ] = False,
    update_budget: UpdateBudget = None,
    data: ChoiceData = None,
    data_folder: DataFolder = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe that the device will train by: memory is planned for its densest phase, and what it freezes "
            "is built to freeze. Its table [run] counts where no option is given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this run folder or checkpoint, with its weights, masks and momentum; of the other options "
            "only --target, --batch and --threads can change what it was, and it stays what it was without them."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build an artifact that trains on a device without the compiler."""
    import mest_compile as mest
    from mest_compile.budgeting import sampled
    from mest_compile.compiling import compile_step
    from mest_compile.models.sources import is_trained, model_to_read
    from mest_compile.options import StepOptions, find_loss, find_optimizer
    from mest_compile.runtime.artifact import size_bytes
    from mest_compile.training.fitting import resolved
    from mest_compile.training.freezer import Freezer
    from mest_compile.training.recipe import Recipe

    given = given_options(context)
    if checkpoint is not None and (
        others := sorted(given - {"checkpoint", "out", "target", "batch", "threads", "as_json"})
    ):
        raise UsageError(
            f"the checkpoint has its --{others[0].replace('_', '-')} already; leave it out, or compile another model"
        )
    if (model.endswith(".onnx") or is_trained(model)) and "classes" in given:
        raise UsageError(f"{model} has its classes already; leave out --classes")
    examples = chosen_by(update_budget, data, data_folder, find_loss(loss))
    with stderr_console().status(f"building {'from ' + str(checkpoint) if checkpoint else 'for ' + target}"):
        if checkpoint is not None:
            step = mest.load(
                checkpoint,
                threads=threads,
                target=target if "target" in given else None,
                batch=batch if "batch" in given else None,
            )
        else:
            where: dict[str, Any] = {
                "model": model,
                "width": width,
                "batch": batch,
                "scheme": scheme,
                "sparsity": sparsity,
                "distribution": distribution,
                "dense_layers": said_dense_layers(dense_layers),
                "output": said_output(output),
                "loss": loss,
                "optimizer": optimizer,
                "memory_budget": memory_budget,
                "microbatch": microbatch,
                "trainable": trainable,
                "dense_start": dense_start,
                "update_budget": update_budget,
            }
            chosen = None
            if recipe is not None:
                chosen = _recipe(recipe, given, seed)
                said = Recipe.run_options(recipe).items()
                where |= {name: value for name, value in said if name in where and name not in given}
            model, width = where.pop("model"), where.pop("width")
            shape = shape_of(model, where.pop("batch"), image)
            net = model_to_read(model, shape, classes, width, seed, pretrained, weights)
            where |= {
                "scheme": said_schemes(where["scheme"]),
                "sparsity": said_sparsity(where["sparsity"]),
                "loss": find_loss(where["loss"]),
                "optimizer": find_optimizer(where["optimizer"]),
            }
            options = StepOptions(
                **where, target=target, threads=threads, seed=seed, activations=activations, grow_to=grow_to
            )
            if chosen is not None:
                options = chosen.step_options(options)
            batches = None if examples is None else sampled(examples, shape, options)
            step = compile_step(net, shape, options, batches=batches)
            if chosen is not None:
                Freezer.of_run(resolved(chosen, step), step).prepare(step)
        print_choice(step.describe())
        manifest = step.export(out)
        need = step.memory(at_capacity=True)["total"]
    if as_json:
        print_json(
            {
                "folder": str(out),
                "bytes": size_bytes(manifest),
                "files": manifest["files"],
                "memory_bytes": need,
                "target": step.describe()["target"],
            }
        )
    else:
        print_table(
            ["file", "KiB"], [[name, round(entry["bytes"] / 1024, 1)] for name, entry in manifest["files"].items()]
        )
        print(
            f"\n{out}: {size_bytes(manifest) / 1024:.0f} KiB for {step.describe()['target']}, {need / 2**20:.1f} "
            "MiB of memory at its "
            f"densest; on the device: mest-compile train --artifact {out} --data ..."
        )


def _recipe(path: Path, given: set[str], seed: int) -> Recipe:
    """The recipe that a device will train by. Raises UsageError where it contradicts options, or times decide."""
    from mest_compile.training.recipe import Recipe

    if "grow_to" in given:
        raise UsageError("the recipe says how dense the model becomes; leave --grow-to out")
    recipe = Recipe.from_file(path)
    if recipe.freeze is not None and recipe.freeze.of == "time":
        raise UsageError('what is to freeze by time is measured where it trains, and built before; give of = "flops"')
    if recipe.budget_at_mutations is not None:
        raise UsageError(
            "budget_at_mutations chooses what trains while it trains, for which an artifact has no compiler; give "
            "--update-budget, which chooses once, or train where the compiler is"
        )
    return replace(recipe, seed=seed) if "seed" in given else recipe
