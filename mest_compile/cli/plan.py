"""`mest-compile plan`: which kernel every phase of every layer should run on, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.options import (
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
    Seed,
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
    from mest_compile.runtime.step import TrainStep
    from mest_compile.training.recipe import Recipe


def plan(
    context: typer.Context,
    model: Model = "resnet32",
    width: Width = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    image: Image = None,
    classes: Classes = 10,
    batch: Batch = 64,
    microbatch: Microbatch = None,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    distribution: Distribution = "uniform",
    dense_layers: DenseLayers = None,
    output: Output = None,
    steps_between_mutations: Annotated[
        int | None, typer.Option(help="Steps that a compiled kernel serves; without it masks never change.", min=1)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the step.", min=1)] = None,
    target: TargetName = "local",
    trainable: Trainable = None,
    update_budget: UpdateBudget = None,
    data: ChoiceData = None,
    data_folder: DataFolder = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe with a table [freeze], or budget_at_mutations: say also what freezes after which epoch, or "
            "what trains first."
        ),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compile and time specialized kernels beside the indexed ones, and say for every phase of every layer which is
    chosen and why; then what trains, and the memory that the step needs, and of a recipe that freezes what is left of a
    step and its memory by and by.

    With --data image and classes are those of the data. With an --update-budget also what every
    layer costs and matters, and the chosen step's time, predicted and measured.
    """
    from mest_compile.budgeting import sampled
    from mest_compile.compiling import compile_step
    from mest_compile.models.sources import model_to_read
    from mest_compile.options import StepOptions
    from mest_compile.training.recipe import Recipe

    options = StepOptions(
        scheme=said_schemes(scheme),
        sparsity=said_sparsity(sparsity),
        distribution=distribution,
        dense_layers=said_dense_layers(dense_layers),
        output=said_output(output),
        target=target,
        threads=threads,
        seed=seed,
        trainable=trainable,
        update_budget=update_budget,
        microbatch=microbatch,
    )
    chosen_recipe = None if recipe is None else Recipe.from_file(recipe)
    if chosen_recipe is not None and update_budget is None:
        options = replace(options, update_budget=chosen_recipe.budget_at_mutations)
    examples = chosen_by(options.update_budget, data, data_folder, options.loss)
    if examples is None:
        shape = shape_of(model, batch, image)
    elif others := sorted({"image", "classes"} & given_options(context)):
        raise UsageError(f"--data has its {others[0]} already; leave out --{others[0]}")
    else:
        shape, classes = (batch, *examples.images.shape[1:]), examples.outputs
    if chosen_recipe is not None:
        options = chosen_recipe.step_options(options)
    with stderr_console().status("compiling and timing"):
        net = model_to_read(model, shape, classes, width, seed, pretrained, weights)
        batches = None if examples is None else sampled(examples, shape, options)
        step = compile_step(net, shape, options, batches=batches)
        planned = step.plan(steps_between_mutations)
        by_microbatch = step.memory_by_microbatch()
        freezing = _freezing(step, chosen_recipe)
    saved = sum(
        one.times.indexed_seconds - one.times.specialized_seconds
        for one in planned
        if one.times and one.choice.variant == "specialized"
    )
    facts, memory = step.describe(), step.memory()
    chosen = sum(one.choice.variant == "specialized" for one in planned)
    if as_json:
        print_json(
            {
                "steps_between_mutations": steps_between_mutations,
                "saved_seconds_a_step": saved,
                "sparsity_of_all": facts["sparsity_of_all"],
                "trainable": facts["trainable"],
                "frozen": facts["frozen"],
                "memory": memory,
                "bytes_by_microbatch": by_microbatch,
                "vector": facts["vector"],
                "slice_examples": facts["slice_examples"],
                "update_budget": facts.get("update_budget"),
                "freezing": freezing,
                "calls": [
                    {
                        "layer": one.layer,
                        "phase": one.phase,
                        "variant": one.choice.variant,
                        "why": one.choice.why,
                        "times": one.times and asdict(one.times),
                    }
                    for one in planned
                ],
            }
        )
        return
    print_table(
        ["layer", "phase", "variant", "why"],
        [[one.layer.removesuffix(".weight"), one.phase, one.choice.variant, one.choice.why] for one in planned],
    )
    print(f"\n{chosen} of {len(planned)} kernels specialized, which saves {saved * 1e3:.2f} ms a step")
    print(f"sparsity of all weights of convolutions and linear layers together: {facts['sparsity_of_all']:.3f}")
    trained, frozen = facts["trainable"], facts["frozen"]
    print(f"{len(trained)} of {len(trained) + len(frozen)} parameters train: {', '.join(_parts(trained, frozen))}")
    if (choice := facts.get("update_budget")) is not None:
        _print_units(choice)
        print_choice(facts)
    each, lanes = facts["slice_examples"], facts["vector"]
    beside = "" if each == lanes else f", a vector of {lanes} covers up to {lanes // each} pixels of a row"
    print(f"examples side by side: {each}{beside}")
    print("planned bytes: " + ", ".join(f"{kind} {size}" for kind, size in memory.items()))
    print_table(
        ["examples of a pass (--microbatch)", "planned MiB", "of one pass"],
        [
            [examples, f"{size / 2**20:.1f}", f"{size / by_microbatch[step.batch]:.2f}"]
            for examples, size in by_microbatch.items()
        ],
    )
    if freezing:
        print_table(
            ["after epoch", "freezes", "spared of a step", "planned bytes"],
            [[one["epoch"], ", ".join(one["parts"]), f"{one['saved']:.1%}", one["memory_bytes"]] for one in freezing],
        )


def _freezing(step: TrainStep, recipe: Recipe | None) -> list[dict[str, Any]]:
    """What freezes when, what that spares of a step, and the bytes that the rest needs at its densest. Raises
    UsageError."""
    from mest_compile.training.fitting import resolved
    from mest_compile.training.freezer import Freezer

    if recipe is None or (recipe.freeze is None and recipe.budget_at_mutations is not None):
        return []
    if recipe.freeze is None:
        raise UsageError(
            "the recipe has no table [freeze] and no budget_at_mutations, which is what plan reads of one; leave "
            "--recipe out"
        )

    def profile() -> dict[str, float]:
        images, outputs = np.zeros(step.input_shape, np.float32), step.output_shape
        return step.profile(images, np.zeros((outputs[0], *outputs[2:]), np.int64))

    freezes = Freezer.of_run(resolved(recipe, step), step, profile).freezes
    before, *memory = step.freezing_memory([one.names for one in freezes])
    return [{"epoch": 0, "parts": [], "saved": 0.0, "memory_bytes": before}] + [
        {"epoch": one.epoch, "parts": list(one.parts), "saved": one.saved, "memory_bytes": need}
        for one, need in zip(freezes, memory, strict=True)
    ]


def _print_units(choice: Mapping[str, Any]) -> None:
    """Layers, what each costs and matters, and whether it trains."""
    most = max(unit["importance"] for unit in choice["units"]) or 1.0
    print()
    print_table(
        ["layer", choice["importance"], "cost", "cost alone", "KiB", "trains"],
        [
            [
                unit["name"],
                *(f"{share:.3f}" for share in (unit["importance"] / most, unit["cost"], unit["alone"])),
                round(unit["size_bytes"] / 2**10),
                "yes" if unit["chosen"] else "",
            ]
            for unit in choice["units"]
        ],
    )
    print(f"{choice['importance']}: of the largest; cost: share of the full step's; alone: if nothing else trains")


def _parts(trained: Sequence[str], frozen: Collection[str]) -> list[str]:
    """The parameters, told by the largest parts of the model of which all train: "layer4.*"."""

    def part_of(name: str) -> str:
        pieces = name.split(".")
        for end in range(len(pieces)):
            part = "".join(f"{piece}." for piece in pieces[:end])
            if not any(other.startswith(part) for other in frozen):
                return f"{part}*"
        return name

    return list(dict.fromkeys(map(part_of, trained)))
