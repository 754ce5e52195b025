"""Fields of a recipe on the command line, whatever it has: --set warmup_epochs=2."""

from __future__ import annotations

import tomllib
from collections.abc import Set
from dataclasses import fields
from typing import Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.base.names import meant

Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="NAME=VALUE of a recipe's key, as in --set warmup_epochs=2 --set lr_schedule=step; as often as wanted.",
    ),
]
TABLES = ("sieve", "freeze", "phases")  # of a recipe's file


def recipe_settings(said: list[str] | None, given: Set[str]) -> dict[str, Any]:
    """What the recipe is to have by `--set`. given: options that the command line named. Raises UsageError."""
    from mest_compile.training.recipe import Recipe

    there = [field.name for field in fields(Recipe) if field.name not in TABLES]
    found: dict[str, Any] = {}
    for one in said or ():
        name, sign, value = (part.strip() for part in one.partition("="))
        if not sign or name not in there:
            raise UsageError(f"--set {one}: wanted NAME=VALUE of {', '.join(there)}{meant(name, there)}")
        if name in given or name in found:
            raise UsageError(f"{name} is said twice; leave out --set {one}")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value  # a text without quotes
    return found
