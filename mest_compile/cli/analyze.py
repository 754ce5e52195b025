"""`mest-compile analyze`: what a step's convolution kernels execute on an ARM core, without the core."""

from __future__ import annotations

from typing import Annotated

import typer

from mest_compile.cli.options import (
    Activations,
    Classes,
    Distribution,
    Image,
    Model,
    Scheme,
    Sparsity,
    Weights,
    Width,
    said_schemes,
    said_sparsity,
    shape_of,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console


def analyze(
    target: Annotated[str, typer.Option(help="ARM target name or TOML file.")] = "cortex-a76",
    model: Model = "resnet32",
    width: Width = None,
    weights: Weights = None,
    image: Image = None,
    classes: Classes = 10,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    distribution: Distribution = "uniform",
    batch: Annotated[int, typer.Option(help="Examples of a call; figures grow with it in proportion.", min=1)] = 8,
    activations: Activations = "float32",
    as_json: Json = False,
) -> None:
    """Executed instructions and modelled cycles of every convolution kernel of the sparse layers, beside our dense
    kernels.

    Kernels run under emulation; a cycle is one of LLVM's model of the core's pipeline. There are no caches in it and no
    branch predictor, and no device has confirmed it.
    """
    from mest_compile.devices.cycles import VERSION
    from mest_compile.measuring.analysis import PHASES, analyse
    from mest_compile.models.sources import model_to_read
    from mest_compile.options import StepOptions
    from mest_compile.runtime.trained import read_any

    shape = shape_of(model, batch, image)
    options = StepOptions(
        scheme=said_schemes(scheme),
        sparsity=said_sparsity(sparsity),
        distribution=distribution,
        target=target,
        activations=activations,
    )
    graph, _ = read_any(model_to_read(model, shape, classes, width, weights=weights), shape)
    with stderr_console().status("emulating") as status:
        found = analyse(
            graph,
            options,
            progress=lambda done, total: status.update(f"emulating: {done} of {total} kernels done"),
        )
    if as_json:
        print_json(found.to_dict() | {"model": model, "width": width, "activations": activations})
        return
    columns = [
        "instructions, million",
        "modelled cycles, million",
        "share of FMA floor, %",
        "dense cycles, million",
        "dense share, %",
        "dense / sparse",
    ]
    print_table(
        ["phase", "layers", "weight", "output", "live", *columns],
        [
            [
                kernel.phase,
                len(kernel.layers),
                "x".join(map(str, kernel.weight_shape)),
                "x".join(map(str, kernel.output_size)),
                kernel.live_weights,
                *(f"{value:.2f}" for value in (kernel.sparse.instructions / 1e6, kernel.sparse.cycles / 1e6)),
                f"{kernel.sparse.share_of_floor * 100:.1f}",
                f"{kernel.dense.cycles / 1e6:.2f}",
                f"{kernel.dense.share_of_floor * 100:.1f}",
                f"{kernel.dense.cycles / kernel.sparse.cycles:.2f}",
            ]
            for kernel in found.kernels
        ],
    )
    print()
    rows = []
    for phase in (*PHASES, None):
        total = found.totals(phase)
        rows.append(
            [
                phase or "all",
                f"{total['sparse_instructions'] / 1e6:.1f}",
                f"{total['sparse_cycles'] / 1e6:.1f}",
                f"{total['share_of_floor'] * 100:.1f}",
                f"{total['dense_cycles'] / 1e6:.1f}",
                f"{total['dense_share_of_floor'] * 100:.1f}",
                f"{total['times_fewer_cycles']:.2f}",
            ]
        )
    print_table(["all sparse layers", *columns], rows)
    print(f"\n{batch} examples, one thread; cycles are modelled on {found.core} (LLVM {VERSION}), not measured.")
