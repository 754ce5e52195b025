"""What is said of layers by name or shell pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from mest_compile.base import checks
from mest_compile.base.errors import UnknownName, UsageError

V = TypeVar("V")


def weight_name(name: Any, names: Sequence[str], where: str) -> str:
    """The weight that `name` means: "layer1.0.conv1" or "layer1.0.conv1.weight". Raises UnknownName."""
    if (found := _exact(name, names)) is None:
        listed = ", ".join(names)
        raise UnknownName(f"{where} names {checks.shown(name)}, which is no layer of the model; layers: {listed}")
    return found


def by_layer(said: Mapping[str, V], names: Sequence[str], where: str) -> dict[str, tuple[V, bool]]:
    """{weight name: (what is said of it, whether by its own name)}, of the layers that something is said of.

    said  by layers' names or shell patterns of them: a name beats patterns, of these the first that matches counts
    Raises UnknownName where something is said of no layer, UsageError where it is said twice, or never counts.
    """
    exact: dict[str, tuple[V, bool]] = {}
    patterns = []
    for key, value in said.items():
        if (name := _exact(key, names)) is not None:
            if name in exact:
                raise UsageError(f"{where} names {name} twice; name it once")
            exact[name] = value, True
        elif is_pattern(key):
            patterns.append(key)
        else:
            weight_name(key, names, where)
    counts = {name: next((key for key in patterns if _matches(key, name)), None) for name in names}
    for place, key in enumerate(patterns):
        matched = [name for name in names if _matches(key, name)]
        if not matched:
            raise UnknownName(f"{where}: no layer matches {key!r}; there are, for example: {near(key, names)}")
        if not any(counts[name] == key and name not in exact for name in matched):
            others = [*patterns[:place], *(name for name in matched if name in exact)]
            before = next(other for other in others if other in exact or _matches(other, matched[0]))
            raise UsageError(
                f"{where}: {key!r} never counts, since {before!r} takes what it matches; put it first, or leave it out"
            )
    found = {name: (said[key], False) for name, key in counts.items() if key is not None} | exact
    return {name: found[name] for name in names if name in found}


def check_counts(said: Iterable[str], names: Sequence[str], sparse: Collection[str], where: str) -> None:
    """Raises UsageError where a pattern matches no layer but such as stay dense."""
    for key in filter(is_pattern, said):
        matched = [name for name in names if _matches(key, name)]
        if not set(matched) & set(sparse):
            raise UsageError(
                f"{where}: {key!r} matches {', '.join(matched)} alone, which stays dense; name it, or say with "
                "dense_layers which layers stay dense"
            )


def near(pattern: str, names: Iterable[str]) -> str:
    """Names and patterns that resemble one that matches nothing, in a line."""
    there = list(names)
    parts = [".".join(name.split(".")[:end]) + ".*" for name in there for end in range(1, name.count(".") + 1)]
    found = get_close_matches(pattern, dict.fromkeys([*there, *parts]), 3, 0.5)
    return ", ".join(found or [*there[:2], there[-1]])


def is_pattern(key: Any) -> bool:
    return isinstance(key, str) and any(sign in key for sign in "*?[")


def _exact(key: Any, names: Sequence[str]) -> str | None:
    return next((name for name in (key, f"{key}.weight") if name in names), None)


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
