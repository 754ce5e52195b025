"""`mest-compile check`: which layers of a model would be sparse, dense, frozen or refused, without compiling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mest_compile.cli.options import (
    NAMES,
    Batch,
    Classes,
    DenseLayers,
    Distribution,
    Image,
    Output,
    Pretrained,
    Scheme,
    Sparsity,
    TargetName,
    Trainable,
    Weights,
    Width,
    given_options,
    said_dense_layers,
    said_output,
    said_schemes,
    said_sparsity,
    shape_of,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console

if TYPE_CHECKING:
    from mest_compile.checking import Check


def check(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help=NAMES),
    ],
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
    target: TargetName = "local",
    trainable: Trainable = None,
    as_json: Json = False,
) -> None:
    """Say of every layer of a model whether it would be sparse, dense and why, frozen, or refused; all that is refused;
    live weights, and planned memory by batch. Nothing is compiled.

    The exit code is 0 when the model is taken, and 1 when something of it is refused.
    """
    import mest_compile as mest
    from mest_compile.base.errors import UsageError
    from mest_compile.models.sources import find_model, is_trained

    with stderr_console().status("reading the model"):
        if is_trained(model):
            if others := sorted(given_options(context) - {"model", "as_json"}):
                raise UsageError(f"the checkpoint has its --{others[0]} already; leave it out")
            found = mest.check(model, ())
        else:
            shape = shape_of(model, batch, image)
            found = mest.check(
                find_model(model, shape, classes, width, 0, pretrained, weights),
                shape,
                scheme=said_schemes(scheme),
                sparsity=said_sparsity(sparsity),
                distribution=distribution,
                dense_layers=said_dense_layers(dense_layers),
                output=said_output(output),
                target=target,
                trainable=trainable,
            )
    if as_json:
        print_json(found.to_dict())
        raise typer.Exit(0 if found.taken else 1)
    print_table(
        ["layer", "operator", "output", "weights", "sparsity", "state", "why"],
        [
            [
                layer.name,
                layer.kind,
                "x".join(map(str, layer.output_shape[1:])),
                layer.weights or "",
                f"{layer.sparsity:.3f}" if layer.state == "sparse" else "",
                f"{layer.state}, frozen" if layer.frozen else layer.state,
                layer.why,
            ]
            for layer in found.layers
        ],
    )
    states = [layer.state for layer in found.layers]
    print(
        f"\n{states.count('sparse')} layers sparse, {states.count('dense')} dense; {found.live_weights} of "
        f"{found.weights} weights live, a sparsity of {found.sparsity:.3f}"
    )
    if found.memory:
        told = ", ".join(f"{need / 2**20:.1f} MiB at batch {batch}" for batch, need in found.memory.items())
        print(f"planned memory on {found.target}: {told}")
    if found.taken:
        print(_step_time(found))
    print("taken: it can be trained" if found.taken else f"refused: {found.words}")
    raise typer.Exit(0 if found.taken else 1)


def _step_time(found: Check) -> str:
    batch, step = found.input_shape[0], found.step
    if step is None:
        return "step time: nothing of this step is on record for this target and machine; mest-compile tune measures it"
    if step.timed == step.calls:
        return f"step time, from tuning records: {step.seconds * 1e3:.1f} ms at batch {batch}"
    least = f"{step.seconds * 1e3:.1f} ms at batch {batch}"
    return f"step time, from tuning records: {least} in the {step.timed} of its {step.calls} kernel calls that have any"
