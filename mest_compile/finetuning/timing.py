"""Where the time of a fine-tuning goes, and how many epochs fit into a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from mest_compile.base.errors import BudgetError

SAVING_SECONDS = 3.0  # that are left for files and the report at the end
SLACK = 1.15  # an epoch beside its steps: batches, evaluation, a checkpoint


class Clock:
    """seconds: {part of the work: seconds}; "compiling" does not count against the limit."""

    def __init__(self, limit_seconds: float | None = None):
        self.limit_seconds = limit_seconds
        self.seconds: dict[str, float] = {}
        self._began = perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - began

    @property
    def total(self) -> float:
        return perf_counter() - self._began

    @property
    def left(self) -> float:
        """Seconds that training may still take; without end where there is no limit."""
        if self.limit_seconds is None:
            return math.inf
        return self.limit_seconds - SAVING_SECONDS - (self.total - self.seconds.get("compiling", 0.0))


def seconds_of(call: Callable[[], object], repeats: int = 3) -> float:
    """The median of some calls, after one that nobody counts."""
    call()
    times = []
    for _ in range(repeats):
        began = perf_counter()
        call()
        times.append(perf_counter() - began)
    return sorted(times)[repeats // 2]


def epochs_within(left: float, epoch_seconds: float, most: int) -> int:
    """Epochs that fit into the seconds that are left, at most `most`. Raises BudgetError where none does."""
    if left < epoch_seconds:
        raise BudgetError(
            f"the time limit leaves {max(left, 0.0):.1f} s to train in, and an epoch takes {epoch_seconds:.1f} s; give "
            "more time, fewer or smaller images, or train less of the net"
        )
    return most if math.isinf(left) else max(1, min(most, int(left / epoch_seconds)))
