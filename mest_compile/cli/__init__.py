"""`mest-compile ...`: results on stdout, progress on stderr, errors as one line; exit codes 0 done, 1 failed, 2
misused.

Nothing here or in the modules imported below loads torch or tvm: that happens inside the commands.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from mest_compile import __version__
from mest_compile.base.commandline import INTERRUPTED, complain, guarded, refuse_empty, results_alone
from mest_compile.base.names import near
from mest_compile.base.plugins import plug_in
from mest_compile.cli import (
    analyze,
    bench,
    build,
    check,
    compare,
    demo,
    devices,
    doctor,
    evaluate,
    export,
    finetune,
    listing,
    plan,
    predict,
    report,
    sweep,
    table,
    train,
    tune,
)

app = typer.Typer(
    name="mest-compile",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    train.train,
    finetune.finetune,
    sweep.sweep,
    compare.compare,
    predict.predict,
    report.report,
    bench.bench,
    check.check,
    plan.plan,
    table.table,
    tune.tune,
    analyze.analyze,
    demo.demo,
    listing.models,
    listing.schemes,
    listing.targets,
    doctor.doctor,
    build.build,
    export.export,
    devices.tracker,
    devices.serve,
):
    app.command()(command)
app.command("eval")(evaluate.evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mest-compile {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(help="Python file of a scheme, an operator, ..., or a target's TOML file; anywhere in the line."),
    ] = None,
) -> None:
    """A compiler for sparse training on devices: training steps that compute at the live weights only."""
    plug_in(*(plugin or ()))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits. Whatever the caller can mend is one line on stderr; other exceptions are faults
    of ours."""
    given = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    sys.exit(guarded(lambda: _run(given)))


def _run(arguments: list[str]) -> int:
    refuse_empty(arguments)
    arguments = _plugins_first(arguments)
    try:
        with results_alone() if "--json" in arguments else nullcontext():
            code = app(arguments, prog_name="mest-compile", standalone_mode=False)
    except typer.TyperException as error:
        return complain(f"{error.format_message()}{_meant(error)}", error.exit_code)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    if code == INTERRUPTED:  # typer tells it so
        raise KeyboardInterrupt
    return code or 0


def _meant(error: typer.TyperException) -> str:
    """Which option was meant by one that there is not and that is spelt like none."""
    name, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if name is None or context is None or getattr(error, "possibilities", None):
        return ""
    there = [option.lstrip("-") for parameter in context.command.params for option in parameter.opts]
    found = near(name.lstrip("-"), there)
    return "" if found is None else f"; did you mean --{found}?"


def _plugins_first(arguments: list[str]) -> list[str]:
    """The line with every --plugin and its file before the command, whose options are read by then."""
    first: list[str] = []
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--plugin":
            first += [argument, *([path] if (path := next(left, None)) is not None else [])]
        else:
            (first if argument.startswith("--plugin=") else rest).append(argument)
    return [*first, *rest]
