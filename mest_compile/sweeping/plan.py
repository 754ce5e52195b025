"""What a sweep is to train: a recipe, and what its cells have otherwise."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.sweeping.asha import AshaRule
from mest_compile.training.tables import RUN_OPTIONS, check_keys, read_toml

AXES = ("grid", "zip", "list")


@dataclass(frozen=True, slots=True)
class Plan:
    """cells  the whole settings of each: a recipe's table, with its table [run]
    varied   of each, what the sweep says and the recipe does not: {key: value}, the same keys in all that have them
    asha     how cells are stopped early; None: all train to their end
    """

    cells: tuple[dict[str, Any], ...]
    varied: tuple[dict[str, Any], ...]
    asha: AshaRule | None = None


def read_plan(given: str | os.PathLike | Mapping[str, Any]) -> Plan:
    """The sweep in a TOML file, or in a table as such a file has it: a recipe, and

    [grid]    key = [values]: every combination of them
    [zip]     key = [values], all as long: first with first, second with second
    [[list]]  key = value: a table for each alternative
    [asha]    first, factor, seed: as in `AshaRule`

    where keys are those of a recipe or of its table [run]. What is given of the first three is combined, each with
    each. Raises UsageError.
    """
    where = "sweep" if isinstance(given, Mapping) else str(given)
    document = dict(given) if isinstance(given, Mapping) else read_toml(given)
    rule, axes = document.pop("asha", None), {name: document.pop(name, None) for name in AXES}
    varied = [dict(itertools.chain.from_iterable(one.items() for one in parts)) for parts in _combined(axes, where)]
    if len({_frozen(one) for one in varied}) < len(varied):
        raise UsageError(f"{where}: two cells have the same settings; name each value and each combination once")
    cells = tuple(_with(document, one) for one in varied)
    return Plan(cells, tuple(varied), None if rule is None else _asha(rule, where))


def _asha(rule: Any, where: str) -> AshaRule:
    if not isinstance(rule, Mapping):
        raise UsageError(f"{where}: asha must be a table, for example [asha] with factor = 3")
    check_keys(AshaRule, rule, f"{where}, asha")
    return AshaRule(**rule)


def _combined(axes: Mapping[str, Any], where: str) -> list[tuple[dict[str, Any], ...]]:
    said: dict[str, str] = {}
    parts = [read(axes[name], f"{where}, {name}") for name, read in _READ.items() if axes[name] is not None]
    for name, part in zip([name for name in AXES if axes[name] is not None], parts):
        for key in dict.fromkeys(key for one in part for key in one):
            if key in said:
                raise UsageError(f"{where}: {key} stands in [{said[key]}] and in [{name}]; leave it out of one")
            said[key] = name
    return list(itertools.product(*parts))


def _grid(table: Any, where: str) -> list[dict[str, Any]]:
    lists = _lists(table, where)
    return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]


def _zip(table: Any, where: str) -> list[dict[str, Any]]:
    lists = _lists(table, where)
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(values)}" for key, values in lists.items())
        raise UsageError(f"{where}: lists must be equally long, and {lengths}")
    return [dict(zip(lists, values)) for values in zip(*lists.values())]


def _list(tables: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(tables, list) or not tables or not all(isinstance(one, Mapping) for one in tables):
        raise UsageError(f'{where} must be tables, each beginning with [[list]], such as scheme = "block"')
    return [dict(one) for one in tables]


_READ = {"grid": _grid, "zip": _zip, "list": _list}


def _lists(table: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(table, Mapping) or not table:
        raise UsageError(f"{where} must be a table of lists, for example sparsity = [0.8, 0.9]")
    for key, values in table.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{where}: {key} must be a list of one or more values, not {checks.shown(values)}")
    return dict(table)


def _with(document: Mapping[str, Any], varied: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what one cell has otherwise. Keys are checked where the cell is made."""
    run = {key: value for key, value in varied.items() if key in RUN_OPTIONS}
    said = document.get("run", {})
    table = {**said, **run} if isinstance(said, Mapping) else said
    return {**document, **{key: value for key, value in varied.items() if key not in run}, "run": table}


def _frozen(value: Any) -> Any:
    """Equal for equal settings, hashable."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, _frozen(one)) for key, one in value.items()))
    return tuple(map(_frozen, value)) if isinstance(value, list) else (type(value) is bool, value)


def folder_of(given: str | os.PathLike | Mapping[str, Any]) -> Path:
    """Where a sweep that is not told keeps its runs."""
    return Path("runs") / ("sweep" if isinstance(given, Mapping) else Path(given).stem)
