"""What training gives, and what whoever watches it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mest_compile.training.recipe import Recipe


class Progress(Protocol):
    """What a caller that wants to watch implements; epochs and batches are counted from 1, correct is a share of the
    batch."""

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float, correct: float) -> None: ...

    def on_epoch(self, metrics: dict[str, Any]) -> None: ...


class Silent:
    """Watches nothing."""

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float, correct: float) -> None:
        pass

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        pass


@dataclass(slots=True)
class Run:
    """What training gave.

    history  one dict an epoch, the lines of metrics.jsonl
    best     {"epoch", "test_accuracy"} of the best model that met its target sparsity, or None before the first
             evaluation
    folder   where the run's files are, or None
    """

    recipe: Recipe
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    folder: Path | None = None

    @property
    def test_accuracy(self) -> float | None:
        """Of the model after the last epoch: the result to report, for `best` was chosen by looking at the test set."""
        return self.history[-1]["test_accuracy"] if self.history else None
