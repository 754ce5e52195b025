"""When a tuning session has to end, for all that takes time in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import KernelSource


class OutOfTime(Exception):
    """Ends from within what there is no time left for."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """end: by time.monotonic(); the default never comes."""

    end: float = float("inf")

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """In so many seconds; None: never."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds, 0 or more."""
        return max(0.0, self.end - time.monotonic())

    def check(self) -> None:
        """Raises OutOfTime."""
        if self.left <= 0:
            raise OutOfTime

    @contextmanager
    def noting(self, what: str, left_out: list[str]) -> Iterator[None]:
        """Adds `what` to `left_out` when there is no time for what is done within, or not enough; goes on in any
        case."""
        try:
            yield
        except OutOfTime:
            left_out.append(what)


@dataclass(slots=True)
class TimedBuilder(Builder):
    """Compiles no kernel after the deadline: raises OutOfTime instead."""

    deadline: Deadline = field(default_factory=Deadline)

    def function(self, source: KernelSource) -> Any:
        self.deadline.check()
        return Builder.function(self, source)
