"""Commands of the design that this version does not have: they are named, so that scripts and readers can tell them from typing errors."""

from __future__ import annotations

import typer

from mest_compile.cli.output import Json
from mest_compile.errors import NotYet

_COMMANDS = {
    "build": "Build an artifact that runs on a device without the compiler.",
    "tracker": "Keep a list of devices that serve.",
    "serve": "Run kernels sent by a tracker's clients.",
}


def add_commands(app: typer.Typer) -> None:
    """Adds every command of `_COMMANDS`; each raises NotYet whatever its options are."""
    for name, summary in _COMMANDS.items():
        app.command(name, help=f"{summary} (not in this version)",
                    context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(_refuse(name))


def _refuse(name: str):
    def command(as_json: Json = False) -> None:
        raise NotYet(f"mest-compile {name} is not in this version yet; `mest-compile --help` lists the commands that are")

    return command
