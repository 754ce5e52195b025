"""What stands in a recipe's file: its keys, those of its table [run], and those that belong elsewhere."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.base.names import near
from mest_compile.options import AS_GIVEN

# What a recipe's table [run] may say, and of which type it is.
RUN_OPTIONS: dict[str, type] = {
    "model": str,
    "width": int,
    "pretrained": bool,
    "weights": str,
    "data": str,
    "data_folder": str,
    "resize": str,
    "val_split": float,
    "scheme": str,
    "sparsity": float,
    "distribution": str,
    "dense_layers": list,
    "output": str,
    "batch": int,
    "target": str,
    "threads": int,
    "memory_budget": str,
    "lower_density": bool,
    "activations": str,
    "loss": str,
    "optimizer": str,
    "trainable": str,
    "update_budget": str,
    "microbatch": str,
}
TABLES = ("loss", "optimizer", "scheme", "sparsity")  # which may be tables: of options, or of layers and patterns
NUMBERS = ("update_budget", "memory_budget", "microbatch", "output")  # which are a text or a number
LISTS = ("trainable",)  # which are a text, with commas in it, or a list
KINDS = {bool: "true or false", str: "string", int: "whole number", float: "number", list: "list of names"}
# Keys that are looked for in a recipe and belong elsewhere.
ELSEWHERE = {
    key: f"it belongs to the optimizer: mest.SGD({key}=...), or optimizer in the table [run]"
    for key in ("momentum", "weight_decay", "nesterov")
} | dict.fromkeys(RUN_OPTIONS, "it belongs into the table [run]")


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """Raises UsageError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"the recipe {path} cannot be read: {problem.strerror}") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise UsageError(f"the recipe {path} is not TOML: {problem}") from problem


def read_run_options(table: Any, where: str) -> dict[str, Any]:
    """What a table [run] says: options of `mest-compile train` by name. Raises UsageError."""
    if not isinstance(table, Mapping):
        raise UsageError(f'{where}: run must be a table, for example [run] with model = "resnet32"')
    for key, value in table.items():
        if key not in RUN_OPTIONS:
            raise UsageError(f"{where}, run: unknown key {key!r}; did you mean {nearest(key, RUN_OPTIONS)!r}?")
        wanted = RUN_OPTIONS[key]
        if (
            (key in TABLES and isinstance(value, Mapping))
            or (key in NUMBERS and checks.is_number(value))
            or (key in LISTS and isinstance(value, list))
            or (key == "sparsity" and value == AS_GIVEN)
        ):
            continue
        if isinstance(value, bool) != (wanted is bool) or not isinstance(
            value, (int, float) if wanted is float else wanted
        ):
            raise UsageError(f"{where}, run: {key} must be a {KINDS[wanted]}, not {value!r}")
    return dict(table)


def nearest(name: str, there: Iterable[str]) -> str:
    """The name of those there are that is nearest, however far."""
    known = list(there)
    return near(name, known) or get_close_matches(name, known, 1, 0)[0]


def check_keys(kind: type, data: Mapping[str, Any], where: str) -> None:
    """Whether `data` has the fields of a dataclass. Raises UsageError."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            hint = ELSEWHERE.get(key) or f"did you mean {nearest(str(key), fields)!r}?"
            raise UsageError(f"{where}: unknown key {key!r}; {hint}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in data:
            raise UsageError(f"{where}: the key {name!r} is missing")
