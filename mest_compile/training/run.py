"""What training gives, and what whoever watches it is told."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mest_compile.base.errors import UsageError
from mest_compile.training.metrics import Metric, main_metric
from mest_compile.training.recipe import Recipe

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class Progress(Protocol):
    """What a caller that wants to watch implements; epochs and batches are counted from 1, correct is the share of the
    batch that was right, or what other metric decides (`Run.metric`). A callback may have any of them, and
    on_mutation(epoch, mutation), before the epoch's first batch, with what metrics.jsonl says of it."""

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float, correct: float) -> None: ...

    def on_epoch(self, metrics: dict[str, Any]) -> None: ...


class Silent:
    """Watches nothing."""

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float, correct: float) -> None:
        pass

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        pass


@dataclass(slots=True, repr=False)
class Run:
    """What training gave.

    history  one dict an epoch, the lines of metrics.jsonl
    best     {"epoch", "val_accuracy", or without a validation set "test_accuracy", or what other metric decides} of the
             best model that met its target sparsity, or None before the first evaluation
    folder   where the run's files are, or None
    """

    recipe: Recipe
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    folder: Path | None = None

    def __repr__(self) -> str:
        metric, last = self.metric, self.history[-1] if self.history else {}
        scores = [
            f"{part} {metric.label} {metric.shown(last[key])}"
            for part in ("train", "val", "test")
            if last.get(key := f"{part}_{metric.name}") is not None
        ]
        done = f"{len(self.history)} of {self.recipe.epochs} epochs"
        where = [] if self.folder is None else [str(self.folder)]
        return f"<Run {', '.join([self.recipe.method, done, *scores, *where])}>"

    def to_pandas(self) -> pandas.DataFrame:
        """A row an epoch: its numbers; those of layers and kinds of memory under names with a dot, "sparsity.conv1"."""
        import pandas

        return pandas.json_normalize(self.history)

    def _repr_html_(self) -> str:
        frame, metric = self.to_pandas(), self.metric.name
        names = ["epoch", "loss", *(f"{part}_{metric}" for part in ("train", "val", "test")), "overall_sparsity"]
        shown = [name for name in [*names, "images_per_second"] if name in frame]
        return f"<p>{html.escape(repr(self))}</p>{frame[shown].to_html(index=False)}"

    def plot(self) -> Figure:
        """A matplotlib figure of what the report draws: loss, accuracy, sparsity, survival, times."""
        from mest_compile.training.drawing import draw_all

        if not self.history:
            raise UsageError("there is no whole epoch to draw yet")
        return draw_all(self.history)

    def gone(self, patience: int | None) -> bool:
        """Whether the last so many evaluations have brought no better model than the best."""
        if patience is None or self.best is None:
            return False
        key = next(name for name in self.best if name != "epoch")
        later = [one for one in self.history if one["epoch"] > self.best["epoch"] and one.get(key) is not None]
        return len(later) >= patience

    @property
    def test_accuracy(self) -> float | None:
        """Of the model after the last epoch: the result to report, for `best` was chosen by looking at the test set
        where there was no validation set. None under a loss without right answers."""
        return self.history[-1].get("test_accuracy") if self.history else None

    @property
    def metric(self) -> Metric:
        """What decides which model is best."""
        return main_metric(self.history[-1] if self.history else {})

    @property
    def test_score(self) -> float | None:
        """The same of the metric that decides."""
        return self.history[-1].get(f"test_{self.metric.name}") if self.history else None
