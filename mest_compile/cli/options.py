"""Options that several commands have, said once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.output import stderr_console

USUAL_IMAGE = "3x32x32"
CHANNELS = (1, 3, 4)  # of pictures

if TYPE_CHECKING:
    from mest_compile.data import Dataset
    from mest_compile.operators.losses.loss import Loss
    from mest_compile.sparsity import scheme as schemes

BuiltIn = Annotated[str, typer.Option(help="Built-in model, timm:NAME, torchvision:NAME or file.py:FACTORY.")]
NAMES = (
    "Built-in model, timm:NAME, torchvision:NAME, file.py:FACTORY, or the path of an .onnx file, a run folder, a "
    "checkpoint or an artifact."
)
Model = Annotated[str, typer.Option(help=NAMES)]
Weights = Annotated[
    Path | None, typer.Option(help="Weights of the model: safetensors, or a state_dict that torch.save wrote.")
]
Classes = Annotated[int, typer.Option(help="Classes to tell apart, or numbers to give.", min=1)]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="Begin with weights that come with a package, and a new classifier."),
]


def width_of(text: str) -> float:
    """An int of "8", a float of "0.25"."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError as problem:
        raise typer.BadParameter(f"{text!r} is no number") from problem


Width = Annotated[
    float | None,
    typer.Option(
        parser=width_of,
        metavar="NUMBER",
        help="Channels of the first stage, or, with a point as in 0.35, what a model's own are multiplied by.",
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        help="Channels x height x width of the images, or the number of features. Default: 3x32x32, or a trained "
        "model's own."
    ),
]
Batch = Annotated[int, typer.Option(help="Examples per step.", min=1)]
Scheme = Annotated[
    str,
    typer.Option(
        help="Sparsity scheme: block, block:4x1, unstructured, 2:4, dense ...; or those of layers, "
        '"layer1.*=pattern,*=block".'
    ),
]
Sparsity = Annotated[
    str | None,
    typer.Option(
        help='Share of weights that are zero in sparse layers; or those of layers, "layer1.*=0.8,*=0.9"; or as-given: '
        "the zeros of the model's weights. Default: 0.9, or what the scheme has."
    ),
]
Distribution = Annotated[str, typer.Option(help="How sparsity spreads over layers: uniform or erk.")]
TargetName = Annotated[str, typer.Option(help="Target name or TOML file.")]
Trainable = Annotated[
    str | None,
    typer.Option(
        help='What trains, the rest is frozen: patterns with commas between them, "head.*,*.bias", or "last:3" blocks. '
        "Default: all."
    ),
]
DenseLayers = Annotated[
    str | None,
    typer.Option(
        help='Names of the layers that stay dense, with commas between them; "" for none. Default: the first '
        "convolution, 1x1 convolutions of shortcuts, depthwise layers, the classifier, and what the scheme has no "
        "units for."
    ),
]
Output = Annotated[
    str | None,
    typer.Option(help="Of a model that gives several values, the name or number of the one that is the logits."),
]
UpdateBudget = Annotated[
    str | None,
    typer.Option(
        help="What a step may cost: a share of the full step's time, 0.5, or bytes of all its memory, 24MiB. What "
        "trains is chosen by what layers cost and what they gain on the data."
    ),
]
Microbatch = Annotated[
    str | None,
    typer.Option(
        help="Examples of a pass: a step makes as many as the batch has of them, whose gradients add up, in the memory "
        "of one; or auto: the largest that a --memory-budget has room for."
    ),
]
ChoiceData = Annotated[
    str | None, typer.Option("--data", help="Data set that --update-budget chooses by; it decides shape and classes.")
]
DataFolder = Annotated[Path | None, typer.Option(help="Where the data set's files are.")]
Seed = Annotated[int, typer.Option(help="Of initial weights, and of all else that is drawn.")]
Activations = Annotated[
    str,
    typer.Option(
        help="What values between layers are stored as: float32, bfloat16, float16 where the target can, or auto: what "
        "is fastest here."
    ),
]


def chosen_by(
    update_budget: float | int | str | None, data: str | None, data_folder: Path | None, loss: Loss
) -> Dataset | None:
    """The examples that an update budget is to choose by; None: there is no budget. Raises UsageError where one is
    given without the other."""
    from mest_compile.data import load

    if (update_budget is None) != (data is None):
        raise UsageError(
            "--update-budget chooses by gradients on your data: give --data with it"
            if data is None
            else f"--data is what an --update-budget chooses by, and there is none; leave out --data {data}"
        )
    return None if data is None else load(data, data_folder, numbers=loss.takes_numbers).train


def print_choice(facts: Mapping[str, Any]) -> None:
    """A line on what an update budget chose, on stderr; nothing where there was none. facts: a step's `describe()`."""
    choice = facts.get("update_budget")
    if choice is None:
        return
    budget, chosen = choice["budget"], sum(unit["chosen"] for unit in choice["units"])
    whole = f"{budget:g} of the full step" if isinstance(budget, float) else f"{budget} bytes"
    measured = "" if choice["measured"] is None else f", {choice['measured']:.3f} measured"
    stderr_console().print(
        f"update budget of {whole}: {chosen} of {len(choice['units'])} layers train, {choice['predicted']:.3f} of the "
        f"full step's cost ({choice['costs']}) predicted{measured}, {choice['chosen_bytes'] / 2**20:.1f} of "
        f"{choice['full_bytes'] / 2**20:.1f} MiB",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def given_options(context: typer.Context) -> set[str]:
    """Parameters that the command line named, whatever their values."""
    return {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }


def by_layer(option: str, text: str) -> str | dict[str, str]:
    """What "layer1.*=0.8,*=0.9" says, or the text itself where it says one thing of all layers. Raises UsageError."""
    if "=" not in text:
        return text
    found: dict[str, str] = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.rpartition("="))
        if not (name and sign and value) or name in found:
            raise UsageError(
                f'--{option} is {text!r}; wanted layers or patterns, each once, as in {option}="layer1.*=...,*=..."'
            )
        found[name] = value
    return found


def said_sparsity(said: Any) -> Any:
    """The sparsity that an option's text tells, or a recipe's number, text or table. Raises UsageError."""
    from mest_compile.options import AS_GIVEN

    if not isinstance(said, str) or said == AS_GIVEN:
        return said
    try:
        told = by_layer("sparsity", said)
        return _share(told) if isinstance(told, str) else {name: _share(value) for name, value in told.items()}
    except ValueError as problem:
        raise UsageError(
            f"--sparsity is {said!r}; wanted a number, {AS_GIVEN}, or numbers of layers as in layer1.*=0.8,*=0.9"
        ) from problem


def said_dense_layers(text: str | None) -> list[str] | None:
    """The names that an option's text tells."""
    return None if text is None else said_list(text)


def said_output(text: str | None) -> str | int | None:
    """The name, or the number, that an option's text tells."""
    return int(text) if text is not None and text.isdecimal() else text


def said_list(text: str) -> list[str]:
    """Of "block, pattern"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def said_numbers(option: str, text: str) -> list[float]:
    """Of "0.8,0.9". Raises UsageError."""
    try:
        return [float(part) for part in said_list(text)]
    except ValueError as problem:
        raise UsageError(f"--{option} is {text!r}; wanted numbers separated by commas, such as 0.8,0.9") from problem


def _share(text: str) -> float:
    """Of "0.9"; "90%" is one as well."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def said_schemes(said: Any) -> schemes.Scheme | dict[str, schemes.Scheme]:
    """The schemes that an option's text, or a recipe's text or table, tells. Raises UnknownName, UsageError."""
    from mest_compile.sparsity import parse_schemes

    return parse_schemes(by_layer("scheme", said) if isinstance(said, str) else said)


def shape_of(model: str, batch: int, image: str | None) -> tuple[int, ...]:
    """Of a step's input: (N, C, H, W) or (N, features). Raises UsageError, and StateError of a damaged checkpoint."""
    from mest_compile.models.sources import is_trained

    if image is None and is_trained(model):
        from mest_compile.runtime.trained import read_step

        return (batch, *read_step(model).input_shape[1:])
    return (batch, *image_sizes(image or USUAL_IMAGE))


def sizes_of(option: str, text: str | None) -> tuple[int, int] | None:
    """(height, width) that "32x48" says, or "32" of both. Raises UsageError."""
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--{option} is {text!r}; wanted height x width, such as 32x48, or one number for both")
    return int(parts[0]), int(parts[-1])


def image_sizes(text: str) -> tuple[int, ...]:
    """(channels, height, width) or (features,). Raises UsageError."""
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) == 3 and sizes[2] in CHANNELS and sizes[0] == sizes[1] > max(CHANNELS):
        raise UsageError(f"--image is {text!r}, channels last; did you mean {sizes[2]}x{sizes[0]}x{sizes[1]}?")
    if len(sizes) not in (1, 3) or min(sizes) < 1:
        raise UsageError(
            f"--image is {text!r}; wanted channels x height x width, such as 3x32x32, or a number of features, such as "
            "20"
        )
    return sizes
