"""What all commands share: the --json option, tables on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.commandline import print_result

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OF_A_FILE = 200  # characters; rich would fold at 80 where there is no terminal

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def print_json(document: Any) -> None:
    """The command's whole result, on stdout."""
    print_result(json.dumps(document, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows under a header, on stdout; numbers to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    numeric = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(columns))
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE).print(table)


def stderr_console() -> Console:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True)
