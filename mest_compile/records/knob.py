"""What tuning may choose of a kernel's text, or of how a step lies in memory: how fast it is, not what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mest_compile.hardware.target import Target


@dataclass(frozen=True, slots=True)
class Knob:
    """name     as records and schedules have it
    default  where nobody chose
    about    what it does
    others   values that it may take beside the default: those, or what (problem, target) gives
    """

    name: str
    default: Any
    about: str
    others: tuple[Any, ...] | Callable[[Any, Target], Iterable[Any]]

    def values(self, problem: Any, target: Target) -> tuple[Any, ...]:
        """All it may take for a problem, the default first."""
        return self.default, *(self.others(problem, target) if callable(self.others) else self.others)

    def of(self, knobs: Mapping[str, Any]) -> Any:
        """Its value among chosen ones."""
        return knobs.get(self.name, self.default)

    def chosen(self, value: Any) -> dict[str, Any]:
        """That value as records have it: those that are not the default are named."""
        return {} if value == self.default else {self.name: value}
