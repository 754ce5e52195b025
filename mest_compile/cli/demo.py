"""`mest-compile demo`: the whole story in a few minutes, without a download of data."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mest_compile.cli.output import Json, print_json, print_table, stderr_console

EXAMPLES, EPOCHS = 20, 10  # of each digit
QUICK = (2, 1)
SCRATCH_EPOCHS = 40


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="One epoch of few images, or of narrow nets: that it works, not how well.")
    ] = False,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Train ResNet-20 from scratch instead, and time a step of ResNet-32.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune EfficientNet-lite0 to drawn digits, 200 images, beside dense torch that trains all of it."""
    if scratch:
        _scratch(quick, as_json)
    else:
        _finetuned(quick, as_json)


def _finetuned(quick: bool, as_json: bool) -> None:
    from mest_compile.finetuning.beside import ALL, LAST, OURS, asked
    from mest_compile.models.pretrained import pretrained_file

    console = stderr_console()
    pretrained_file("efficientnet-lite0")  # before anything is begun
    count, epochs = QUICK if quick else (EXAMPLES, EPOCHS)
    folder = Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    console.print(
        f"EfficientNet-lite0, pretrained, made one of drawn digits: {10 * count} images of 96x96, {epochs} epochs of "
        "the last three blocks, 80% of their weights zero; each on one thread, in a process of its own",
        highlight=False,
        soft_wrap=True,
    )
    who = {OURS: "mest-compile", ALL: "dense torch, all of it trained", LAST: "dense torch, the same blocks trained"}
    found: dict[str, dict[str, Any]] = {}
    for contestant, name in who.items():
        with console.status(name):
            found[contestant] = asked(contestant, count, epochs, 0, folder)
    if as_json:
        print_json({"folder": str(folder), "contestants": found})
        return
    print_table(
        ["", "accuracy", "seconds", "compiling", "processor seconds", "peak MiB"],
        [
            [
                name,
                f"{one['accuracy']:.1%}",
                f"{one['seconds']:.1f}",
                f"{one['compiling_seconds']:.1f}",
                f"{one['processor_seconds']:.1f}",
                f"{one['peak_bytes'] / 2**20:.0f}",
            ]
            for name, one in zip(who.values(), found.values())
        ],
    )
    print(f"\n{folder / 'report.html'} shows what it gets wrong; {folder / 'model.onnx'} takes pixels 0 to 255")


def _scratch(quick: bool, as_json: bool) -> None:
    """ResNet-20 at 90% block sparsity on scikit-learn's digits, then a step of ResNet-32 against dense torch."""
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
    recipe = Recipe(epochs=1 if quick else SCRATCH_EPOCHS, method="em")
    run = start_run(Request("resnet20", "digits", recipe, StepOptions(), width=8 if quick else None))
    case = Case("resnet20", (8, 3, 32, 32), 8) if quick else Case("resnet32", (64, 3, 32, 32), 32)
    console.print(
        f"One whole training step of {case.model}, width {case.width}, batch {case.input_shape[0]}, 90% 4x1 "
        "blocks, one thread, against dense torch in channels_last",
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
        f"{last['images_per_second']:.0f} images/s; run folder {run.folder}"
    )
    print(
        f"{case.model} step: {comparison.ours.median_seconds * 1e3:.0f} ms, dense torch "
        f"{comparison.rival.median_seconds * 1e3:.0f} ms: {comparison.ratio:.2f} times as fast"
    )
