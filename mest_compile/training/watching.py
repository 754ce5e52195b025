"""Everybody who watches a run: the progress shown, and callbacks of the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mest_compile.base.errors import UsageError
from mest_compile.training.run import Progress

EVENTS = ("on_batch", "on_epoch", "on_mutation")


def check_callbacks(callbacks: Sequence[Any]) -> list[Any]:
    """Raises UsageError for one that would never be called."""
    found = list(callbacks)
    for one in found:
        if not any(callable(getattr(one, event, None)) for event in EVENTS):
            raise UsageError(
                f"a callback is a {type(one).__name__}, which has none of the methods {', '.join(EVENTS)}; see "
                "mest_compile.training.run.Progress"
            )
    return found


class Watchers:
    """Tells the progress first, then each callback what it has a method for."""

    def __init__(self, progress: Progress, callbacks: Sequence[Any]):
        self._all = [progress, *callbacks]

    def on_batch(self, *told: Any) -> None:
        self._tell("on_batch", *told)

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        self._tell("on_epoch", metrics)

    def on_mutation(self, epoch: int, mutation: dict[str, Any]) -> None:
        self._tell("on_mutation", epoch, mutation)

    def _tell(self, event: str, *told: Any) -> None:
        for one in self._all:
            if call := getattr(one, event, None):
                call(*told)
