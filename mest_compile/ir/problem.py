"""What the fields of a problem say of themselves to whoever looks for records of one like it.

A problem is a frozen dataclass: all that the text of a kernel, or the layout of a step, depends on. Two problems are
alike where they differ in sizes only; other fields make them different things, unless they stand aside.

    channels: int = field(metadata=SIZE)
    eps: float = field(metadata=ASIDE)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

SIZE = MappingProxyType({"likeness": "size"})
ASIDE = MappingProxyType({"likeness": "aside"})  # changes the code, but not which knobs are good


def likeness(problem: Any) -> dict[str, str]:
    """{dotted name of a field: "size" or "aside"} of those that say so, in the dataclasses that it holds too."""
    found: dict[str, str] = {}
    if is_dataclass(problem):
        for entry in fields(problem):
            if "likeness" in entry.metadata:
                found[entry.name] = entry.metadata["likeness"]
            inner = likeness(getattr(problem, entry.name))
            found |= {f"{entry.name}.{name}": mark for name, mark in inner.items()}
    return found


def told_apart(facts: Mapping[str, Any], marks: Mapping[str, str], live: int) -> tuple[str, dict[str, float]]:
    """(structure, sizes) of a problem: equal structures differ in sizes only. Of a list of dataclasses the length
    counts, and a size that is 0 is structure: what it counts is not there.

    facts  the problem as records have it
    marks  `likeness` of the problem that it is compared with
    live   live cells of its layer, a size as well
    """
    sizes: dict[str, float] = {"live": max(live, 1)}
    structure: dict[str, Any] = defaultdict(list)

    def walk(name: str, value: Any) -> None:
        mark = marks.get(name)
        if mark == "aside":
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{name}.{key}" if name else key, item)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            structure[name].append(len(value))
        elif mark == "size" and isinstance(value, int | float) and value > 0:
            sizes[f"problem.{name}"] = value
        else:
            structure[name].append(value)

    walk("", facts)
    return json.dumps(structure, sort_keys=True), sizes
