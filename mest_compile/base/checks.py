"""Whether a caller's value is of the kind that was wanted. Python's and NumPy's numbers count alike; what comes back is
Python's."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from mest_compile.base.errors import BudgetError, MestError, UsageError

FLOAT32_MOST = 3.4028234663852886e38  # the largest finite one
MIB = 2**20
UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": MIB, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
SIZE = re.compile(rf"(\d+\.?\d*|\.\d+)\s*({'|'.join(UNITS)})", re.IGNORECASE)
_SHOWN = 80  # characters of a value in a message


def whole(name: str, value: Any, at_least: int = 0, also: str = "", error: type[MestError] = UsageError) -> int:
    """`value` as an int. also: what else could be meant, as the message ends. Raises `error`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise error(f"{name} is {shown(value)}; wanted a whole number of {at_least} or more{also}")
    return int(value)


def number(
    name: str,
    value: Any,
    at_least: float = 0.0,
    below: float = math.inf,
    also: str = "",
    error: type[MestError] = UsageError,
) -> float:
    """`value` as a float of at_least <= value < below, finite in float32 as well. Raises `error`."""
    found = _as_float(value)
    if at_least <= found < below and abs(found) <= FLOAT32_MOST:
        return found
    bounds = "" if at_least == -math.inf else f" of {at_least:g} or more"
    bounds += "" if below == math.inf else f"{' and' if bounds else ''} below {below:g}"
    raise error(f"{name} is {shown(value)}; wanted a finite number{bounds}{also}")


def size(name: str, value: Any, also: str = "", error: type[MestError] = UsageError, at_least: int = 1) -> int:
    """`value` as bytes, at_least so many: a whole number, or a text such as "64MiB". Raises `error`."""
    if isinstance(value, str) and (found := SIZE.fullmatch(value.strip())):
        value = float(found[1]) * UNITS[found[2].lower()]
        value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise error(f'{name} is {shown(value)}; wanted bytes, a whole number or a text such as "64MiB"{also}')
    return int(value)


def is_number(value: Any) -> bool:
    """Whether it is a real number, whatever its value; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def shape(name: str, value: Any, error: type[MestError] = UsageError) -> tuple[int, ...]:
    """`value` as (N, C, H, W), (N, C, L) or (N, features), sizes of 1 or more. Raises `error`."""
    sizes = list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes) else []
    if len(sizes) not in (2, 3, 4) or any(
        isinstance(size, bool) or not isinstance(size, Integral) or size < 1 for size in sizes
    ):
        raise error(
            f"{name} is {shown(value)}; wanted (N, C, H, W), (N, C, L) or (N, features), whole numbers of 1 or more"
        )
    return tuple(map(int, sizes))


def shapes(
    name: str, value: Any, error: type[MestError] = UsageError
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(shape of the input, as `shape` has it; those of several inputs, none where there is one). Several go in as
    features, one behind another: of ((4, 3, 32, 32), (4, 10)) the first is (4, 3082). Raises `error`."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0
    if not listed or not all(isinstance(one, Sequence) and not isinstance(one, str | bytes) for one in value):
        return shape(name, value, error), ()
    several = tuple(shape(f"{name}[{place}]", one, error) for place, one in enumerate(value))
    if len({batch for batch, *_ in several}) > 1:
        raise error(f"{name} is {shown(value)}; wanted the same batch for all inputs")
    return (several[0][0], sum(math.prod(one[1:]) for one in several)), several


def names(name: str, value: Any, also: str = "", error: type[MestError] = UsageError) -> list[str]:
    """`value` as a list of strings. Raises `error`: a single string is no list of its letters."""
    listed = isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)
    if not listed or not all(isinstance(one, str) for one in value):
        raise error(f"{name} is {shown(value)}; wanted a list of names{also}")
    return list(value)


def flag(name: str, value: Any, error: type[MestError] = UsageError) -> bool:
    """Raises `error` when `value` is not True or False."""
    if not isinstance(value, bool):
        raise error(f"{name} is {shown(value)}; wanted True or False")
    return value


def memory(need_bytes: int, what: str, also: str = "") -> None:
    """Raises BudgetError when this machine has less memory than that: before anything tries to get it."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need_bytes > there:
        raise BudgetError(
            f"{what} needs {need_bytes / MIB:,.0f} MiB, this machine has {there / MIB:,.0f} MiB; use a smaller "
            "batch, image "
            f"or model{also}"
        )


def shown(value: Any) -> str:
    """What came, in one short line, with the type of what is more than a number, a string or a small list."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({type(value).__name__})"


def _as_float(value: Any) -> float:
    """NaN for what is no number; infinity for what no float can hold."""
    try:
        return float(value) if is_number(value) else math.nan
    except OverflowError:
        return math.inf
