"""`mest-compile demo`: the whole story in a few minutes, without a download."""

from __future__ import annotations

from typing import Annotated

import typer

from mest_compile.cli.output import Json, print_json, stderr_console

EPOCHS = 40


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch and one round of narrow nets: that it works, not how well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train ResNet-20 at 90% block sparsity on handwritten digits, then time a step against dense torch."""
    from mest_compile.cli.running import Request, start_run
    from mest_compile.measuring.benchmark import compare
    from mest_compile.measuring.case import Case
    from mest_compile.options import StepOptions
    from mest_compile.training.recipe import Recipe

    console = stderr_console()
    console.print(
        "ResNet-20 on scikit-learn's digits, 90% of the weights zero in 4x1 blocks, the mask mutating (EM)",
        highlight=False,
        soft_wrap=True,
    )
    recipe = Recipe(epochs=1 if quick else EPOCHS, method="em")
    run = start_run(Request("resnet20", "digits", recipe, StepOptions(), width=8 if quick else None))
    case = Case("resnet20", (8, 3, 32, 32), 8) if quick else Case("resnet32", (64, 3, 32, 32), 32)
    console.print(
        f"One whole training step of {case.model}, width {case.width}, batch {case.input_shape[0]}, 90% 4x1 "
        "blocks, one thread, "
        "against dense torch in channels_last",
        highlight=False,
        soft_wrap=True,
    )
    with console.status("starting") as status:
        comparison = compare(case, repeats=1 if quick else 3, progress=lambda what, done, total: status.update(what))
    last = run.history[-1]
    if as_json:
        print_json(
            {
                "folder": str(run.folder),
                "test_accuracy": run.test_accuracy,
                "loss": last["loss"],
                "images_per_second": last["images_per_second"],
                "comparison": comparison.to_dict(),
            }
        )
        return
    print(
        f"digits: loss {last['loss']:.4f}, test accuracy {last['test_accuracy']:.2%}, "
        f"{last['images_per_second']:.0f} images/s; "
        f"run folder {run.folder}"
    )
    print(
        f"{case.model} step: {comparison.ours.median_seconds * 1e3:.0f} ms, dense torch "
        f"{comparison.rival.median_seconds * 1e3:.0f} ms: "
        f"{comparison.ratio:.2f} times as fast"
    )
