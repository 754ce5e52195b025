"""`mest-compile bench`: our step against a rival's, side by side on this machine, or our step by itself, operator by
operator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.options import (
    Activations,
    Batch,
    Classes,
    Distribution,
    Image,
    Microbatch,
    Model,
    Scheme,
    Seed,
    Sparsity,
    TargetName,
    Weights,
    Width,
    given_options,
    said_schemes,
    said_sparsity,
    shape_of,
)
from mest_compile.cli.output import Json, print_json, print_table, stderr_console

if TYPE_CHECKING:
    from mest_compile.measuring.case import Case


def bench(
    context: typer.Context,
    model: Model = "resnet32",
    width: Width = None,
    weights: Weights = None,
    image: Image = None,
    classes: Classes = 10,
    batch: Batch = 64,
    scheme: Scheme = "block",
    sparsity: Sparsity = None,
    distribution: Distribution = "uniform",
    threads: Annotated[int, typer.Option(help="Threads of each side.", min=1)] = 1,
    target: TargetName = "local",
    vs: Annotated[
        str,
        typer.Option(help="Rival: torch, torch-bf16, torch-best, torch-compile, sparseprop or onnxruntime-training."),
    ] = "torch",
    rival_python: Annotated[
        Path | None,
        typer.Option(
            help="Python of the rival's own environment, if not the one that benchmarks/environments.sh makes."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Bytes, or 64MiB, that our step may need; it computes activations again to meet them."),
    ] = None,
    microbatch: Microbatch = None,
    activations: Activations = "float32",
    repeats: Annotated[int, typer.Option(help="Rounds in which both sides have a turn.", min=1)] = 7,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time the kernels of our step instead of comparing it.")
    ] = False,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Also write this HTML page, with every round.")] = None,
    as_json: Json = False,
) -> None:
    """Time whole training steps in alternation with a rival, or, with --profile, the parts of our step.

    SGD with momentum. The rivals torch and torch-compile are dense,
    channels_last.
    """
    from mest_compile.measuring.case import Case

    if profile and (others := sorted(given_options(context) & {"vs", "rival_python", "html"})):
        raise UsageError(
            f"--profile times our step alone; leave out --{others[0].replace('_', '-')}, or --profile to compare"
        )
    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {html.absolute().parent} to write {html.name} into")
    case = Case(model, shape_of(model, batch, image), width, classes, None if weights is None else str(weights)).but(
        scheme=said_schemes(scheme),
        sparsity=said_sparsity(sparsity),
        distribution=distribution,
        target=target,
        threads=threads,
        seed=seed,
        memory_budget=memory_budget,
        microbatch=microbatch,
        activations=activations,
    )
    if profile:
        _profile(case, repeats, as_json)
    else:
        _compare(case, vs, rival_python, repeats, html, as_json)


def _compare(case: Case, vs: str, rival_python: Path | None, repeats: int, html: Path | None, as_json: bool) -> None:
    from mest_compile.measuring.benchmark import compare
    from mest_compile.measuring.sheet import COLUMNS, caption, cells, write_sheet

    with stderr_console().status("starting") as status:
        comparison = compare(
            case,
            rival=vs,
            repeats=repeats,
            rival_python=rival_python,
            progress=lambda what, done, total: status.update(f"{what}: {done} of {total} rounds done"),
        )
    if html is not None:
        write_sheet(comparison, html)
    if as_json:
        print_json(comparison.to_dict())
        return

    print_table(COLUMNS, cells(comparison))
    print(f"\n{caption(comparison)}")
    for side in (comparison.ours, comparison.rival):
        for note in side.notes:
            print(f"{side.name}: {note}")


def _profile(case: Case, repeats: int, as_json: bool) -> None:
    from mest_compile.compiling import compile_step
    from mest_compile.measuring.profiling import PHASES, LayerTime, profile

    with stderr_console().status("compiling"):
        step = compile_step(case.source(), case.input_shape, case.options)
        images, labels = replace(case, classes=step.classes).batch()
        found = profile(step, images, labels, repeats)
    if as_json:
        print_json(found.to_dict())
        return
    print(f"one step: {found.step_seconds * 1e3:.2f} ms\n")
    print_table(
        ["operator", "phase", "calls", "ms", "share %"],
        [
            [row.kernel, row.phase, row.calls, round(row.seconds * 1e3, 3), round(row.share * 100, 1)]
            for row in found.operators
        ],
    )
    phases = [phase for phase in PHASES if phase != "grad_bias" and any(phase in row.seconds for row in found.layers)]
    print()

    def cells(row: LayerTime, phase: str) -> list[str]:
        return [f"{row.seconds[phase] * 1e3:.3f}", f"{row.gflops(phase):.1f}"] if phase in row.seconds else ["", ""]

    print_table(
        [
            "layer",
            "weight",
            "output",
            "live",
            *(column for phase in phases for column in (f"{phase} ms", "GFLOP/s")),
            "kernels",
        ],
        [
            [
                row.layer.removesuffix(".weight"),
                "x".join(map(str, row.weight_shape)),
                "x".join(map(str, row.output_size)),
                row.live_weights,
                *(cell for phase in phases for cell in cells(row, phase)),
                ", ".join(dict.fromkeys(row.kernels.values())),
            ]
            for row in found.layers
        ],
    )
