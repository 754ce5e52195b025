"""Options that several commands have, said once."""

from __future__ import annotations

from typing import Annotated

import typer

BuiltIn = Annotated[str, typer.Option(help="Built-in model.")]
Model = Annotated[str, typer.Option(help="Built-in model, or a path to an .onnx file.")]
Width = Annotated[int | None, typer.Option(help="Channels of the first stage, for models that have one.")]
Batch = Annotated[int, typer.Option(help="Examples per step.", min=1)]
Scheme = Annotated[str, typer.Option(help="Sparsity scheme: block, block:4x1, unstructured, dense ...")]
Sparsity = Annotated[float, typer.Option(help="Share of weights that are zero in sparse layers.")]
Distribution = Annotated[str, typer.Option(help="How sparsity spreads over layers: uniform or erk.")]
TargetName = Annotated[str, typer.Option(help="Target name or TOML file.")]
Trainable = Annotated[
    str | None,
    typer.Option(
        help='What trains, the rest is frozen: patterns with commas between them, "head.*,*.bias", or "last:3" blocks. '
        "Default: all."
    ),
]
Seed = Annotated[int, typer.Option(help="Of initial weights, and of all else that is drawn.")]
Activations = Annotated[
    str, typer.Option(help="What values between layers are stored as: float32, or float16 where the target can.")
]


def given_options(context: typer.Context) -> set[str]:
    """Parameters that the command line named, whatever their values."""
    return {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
