"""Plug-ins that are made of options, told as a text, "name:option=value,...", or as a table, as files have them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.base.names import near
from mest_compile.base.registry import Registry


def made(kinds: Registry, value: Any) -> Any:
    """What a value tells of: a name, "name:option=value,..." with values as TOML writes them, or a table with the key
    "name" and options. Raises UnknownName, UsageError, and what the plug-in raises."""
    what = kinds.kind
    if isinstance(value, str):
        name, _, rest = value.partition(":")
        options: dict[str, Any] = _read(what, value, rest)
    elif isinstance(value, Mapping) and isinstance(value.get("name"), str):
        name, options = value["name"], {str(key): one for key, one in value.items() if key != "name"}
    else:
        raise UsageError(f"{what} is {checks.shown(value)}; wanted a name, or a table with the key name and options")
    kind = kinds.find(name)
    known = [field.name for field in fields(kind)]
    for key in options:
        if key not in known:
            found = near(key, known)
            hint = f"did you mean {found!r}?" if found else f"there are: {', '.join(known) or 'none'}"
            raise UsageError(f"{what} {name!r} has no option {key!r}; {hint}")
    return kind(**options)


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def _read(what: str, text: str, options: str) -> dict[str, Any]:
    try:
        return tomllib.loads(f"options = {{{options}}}")["options"]
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        raise UsageError(
            f"{what} {checks.shown(text)} cannot be read ({problem}); write it as name:option=value,option=value"
        ) from problem
