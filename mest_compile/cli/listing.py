"""`mest-compile models|schemes|targets`: what there is to choose from."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

from mest_compile.cli.output import Json, print_json, print_table


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
    """List the devices that kernels can be compiled for."""
    from mest_compile.hardware.target import boards_of, find_target, target_names

    found = [find_target(name) for name in target_names()]
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
