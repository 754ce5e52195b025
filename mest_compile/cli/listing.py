"""`mest-compile models|schemes|targets`: what there is to choose from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from mest_compile.base.commandline import complain
from mest_compile.base.errors import TargetError
from mest_compile.cli.output import Json, print_json, print_table

if TYPE_CHECKING:
    from mest_compile.hardware.target import Target


def models(as_json: Json = False) -> None:
    """List the built-in models."""
    from mest_compile.models.catalog import MODELS

    _show(
        [{"model": name, "width": model.width, "about": model.summary} for name, model in sorted(MODELS.items())],
        as_json,
    )


def schemes(as_json: Json = False) -> None:
    """List the sparsity schemes."""
    from mest_compile.sparsity.scheme import SCHEMES

    found = [(name, inspect.getdoc(SCHEMES.find(name)) or "") for name in SCHEMES.names()]
    _show([{"scheme": name, "about": doc.split("\n\n")[0].replace("\n", " ")} for name, doc in found], as_json)


def targets(as_json: Json = False) -> None:
    """List the devices that kernels can be compiled for.

    A file with an error is left out and named, and the exit code is 1.
    """
    from mest_compile.hardware.target import find_target, target_names

    found, problems = [], []
    for name in target_names():
        try:
            found.append(find_target(name))
        except TargetError as problem:
            problems.append(problem)
    _print_targets(found, as_json)
    for told in problems:
        complain(told, told.exit_code)
    if problems:
        raise typer.Exit(1)


def _print_targets(found: Sequence[Target], as_json: bool) -> None:
    from mest_compile.hardware.target import boards_of

    if as_json:
        told = [asdict(target) | {"llvm": target.tvm_fields, "boards": boards_of(target.name)} for target in found]
        print_json(told)
        return
    print_table(
        ["target", "device", "cpu", "vector floats", "L1 KiB", "L2 KiB", "cores", "memory GiB", "boards"],
        [
            [
                target.name,
                target.device,
                target.tvm_fields.get("mcpu", ""),
                target.vector,
                target.l1_bytes // 1024,
                target.l2_bytes // 1024,
                target.cores,
                target.memory_bytes / 2**30 if target.memory_bytes else "",
                ", ".join(boards_of(target.name)),
            ]
            for target in found
        ],
    )


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        print_table(list(rows[0]), [list(row.values()) for row in rows])
