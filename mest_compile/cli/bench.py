"""`mest-compile bench`: our step against a rival's, side by side on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from mest_compile.cli.output import Json, print_json, print_table, stderr_console


def bench(
    model: Annotated[str, typer.Option(help="Built-in model.")] = "resnet32",
    width: Annotated[int | None, typer.Option(help="Channels of the first stage.")] = None,
    batch: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 64,
    scheme: Annotated[str, typer.Option(help="Sparsity scheme.")] = "block",
    sparsity: Annotated[float, typer.Option(help="Share of weights that are zero.")] = 0.9,
    distribution: Annotated[str, typer.Option(help="uniform or erk.")] = "uniform",
    threads: Annotated[int, typer.Option(help="Threads of each side.", min=1)] = 1,
    target: Annotated[str, typer.Option(help="Target name or TOML file.")] = "local",
    vs: Annotated[str, typer.Option(help="Rival to measure against.")] = "torch",
    repeats: Annotated[int, typer.Option(help="Rounds in which both sides have a turn.", min=1)] = 7,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> None:
    """Time whole training steps in alternation with a rival.

    Model: 32x32 images of 3 channels, 10 classes, SGD with momentum. The rival torch is dense, channels_last.
    """
    from mest_compile.benchmark import Case, Side, compare

    case = Case(model=model, input_shape=(batch, 3, 32, 32), width=width, scheme=scheme, sparsity=sparsity, distribution=distribution,
                target=target, threads=threads, seed=seed)
    with stderr_console().status("starting") as status:
        comparison = compare(case, rival=vs, repeats=repeats,
                             progress=lambda what, done, total: status.update(f"{what}: {done} of {total} rounds done"))
    if as_json:
        print_json(comparison.to_dict())
        return

    def row(side: Side) -> list[object]:
        return [side.name, *(f"{seconds * 1e3:.2f}" for seconds in (side.median_seconds, min(side.round_seconds), max(side.round_seconds))),
                f"{batch / side.median_seconds:.0f}", f"{side.setup_seconds:.1f}", f"{side.training_peak_bytes / 2**20:.0f}"]

    print_table(["", "median ms", "min ms", "max ms", "images/s", "setup s", "peak MiB above import"],
                [row(comparison.ours), row(comparison.rival)])
    print(f"\n{vs} / {comparison.ours.name}: {comparison.ratio:.2f} "
          f"(rounds: {min(comparison.ratios):.2f} to {max(comparison.ratios):.2f}); {threads} thread(s), {comparison.machine['cpu']}")
