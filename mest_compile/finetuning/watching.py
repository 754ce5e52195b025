"""Who watches a fine-tuning, and what they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mest_compile.training.run import Progress, Silent

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep


class Watches(Protocol):
    def on_stage(self, what: str) -> None:
        """What begins."""

    def on_features(self, done: int, count: int) -> None:
        """Images that features are computed of."""

    def of_training(self, step: TrainStep) -> Progress:
        """Who watches that step train."""
        ...


class Quiet:
    """Watches nothing."""

    def on_stage(self, what: str) -> None:
        pass

    def on_features(self, done: int, count: int) -> None:
        pass

    def of_training(self, step: TrainStep) -> Progress:
        return Silent()
