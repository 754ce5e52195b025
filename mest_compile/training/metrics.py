"""What a model is judged by: metrics by name, which its loss chooses.

A metric adds numbers up over batches, so that the last batch may be smaller than the others, and makes one number of
the sums. Metrics of answers take the class scores and labels; those of numbers what the model gives and what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.operators.losses.loss import Loss

Sums = np.ndarray  # (k,) float64
TOP = 5


@dataclass(frozen=True, slots=True)
class Metric:
    """label  in texts
    share  it is one, 1 the best; else an error, 0 the best
    sums   of outputs (n, k, ...) and targets as `compared` gives them; `value` makes one number of those of all batches
    """

    name: str
    label: str
    share: bool
    sums: Callable[[np.ndarray, np.ndarray], Sums]
    value: Callable[[Sums], float]

    def better(self, one: float, other: float) -> bool:
        return one > other if self.share else one < other

    def shown(self, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.2%}" if self.share else f"{value:.4g}"


def _ratio(sums: Sums) -> float:
    """0 of nothing."""
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def _accuracy(outputs: np.ndarray, labels: np.ndarray) -> Sums:
    """Largest output, where that is of no class beside NaN. labels (n, ...) int, negative ones do not count."""
    answers = np.where(np.isnan(outputs).any(1), -1, outputs.argmax(1))
    counted = labels >= 0
    return np.array([np.count_nonzero((answers == labels) & counted), np.count_nonzero(counted)], np.float64)


def _top5(outputs: np.ndarray, labels: np.ndarray) -> Sums:
    """The label's output is among the five largest: fewer than five are larger, or as large and earlier."""
    counted = labels >= 0
    wanted = np.where(counted, labels, 0)[:, None]
    its = np.take_along_axis(outputs, wanted, 1)
    place = np.arange(outputs.shape[1]).reshape(1, -1, *[1] * (outputs.ndim - 2))
    before = ((outputs > its) | ((outputs == its) & (place < wanted))).sum(1)
    right = (before < TOP) & ~np.isnan(outputs).any(1) & counted
    return np.array([np.count_nonzero(right), np.count_nonzero(counted)], np.float64)


def _errors(power: int) -> Callable[[np.ndarray, np.ndarray], Sums]:
    def sums(outputs: np.ndarray, targets: np.ndarray) -> Sums:
        difference = np.abs(outputs.astype(np.float64) - targets.reshape(outputs.shape))
        return np.array([(difference**power).sum(), difference.size])

    return sums


def _f1(outputs: np.ndarray, targets: np.ndarray) -> Sums:
    """Of all labels together ("micro"): 2 hits over 2 hits, false alarms and misses."""
    said, wanted = outputs > 0, targets.reshape(outputs.shape) > 0.5
    return np.array([2.0 * np.count_nonzero(said & wanted), np.count_nonzero(said) + np.count_nonzero(wanted)])


def _label_accuracy(outputs: np.ndarray, targets: np.ndarray) -> Sums:
    right = ((outputs > 0) == (targets.reshape(outputs.shape) > 0.5)) & ~np.isnan(outputs)
    return np.array([np.count_nonzero(right), right.size], np.float64)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", True, _accuracy, _ratio),
        Metric("top5", "top-5 accuracy", True, _top5, _ratio),
        Metric("mae", "mean absolute error", False, _errors(1), _ratio),
        Metric("mse", "mean squared error", False, _errors(2), _ratio),
        Metric("f1", "F1", True, _f1, _ratio),
        Metric("label_accuracy", "accuracy of labels", True, _label_accuracy, _ratio),
    )
}


def metrics_of(loss: Loss, outputs: int) -> list[Metric]:
    """What a model with so many outputs is judged by, the first decides which is best."""
    return [METRICS[name] for name in loss.metrics if name != "top5" or outputs > TOP]


def main_metric(metrics: Mapping[str, Any]) -> Metric:
    """The one that decides, of a line of metrics.jsonl; accuracy, as before there were others."""
    return METRICS[metrics.get("metric", "accuracy")]


def compared(loss: Loss, labels: np.ndarray) -> np.ndarray:
    """Labels as metrics take them: classes, negative where they do not count, or numbers."""
    if loss.reads[0][1] is not np.int64:
        return labels.argmax(1) if loss.tells_correct else labels
    return labels if loss.ignored is None else np.where(labels == loss.ignored, -1, labels)


class Score:
    """Metrics of the batches that it has seen."""

    def __init__(self, metrics: list[Metric]):
        self._metrics = metrics
        self._sums: dict[str, Sums] = {}

    def add(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        for metric in self._metrics:
            sums = metric.sums(outputs, targets)
            self._sums[metric.name] = self._sums.get(metric.name, 0) + sums

    def values(self, prefix: str) -> dict[str, float]:
        """{prefix + name: value}."""
        return {f"{prefix}{metric.name}": metric.value(self._sums[metric.name]) for metric in self._metrics}
