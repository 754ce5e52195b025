"""What a sweep has come to: a row a cell, and what it can be written as."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mest_compile.base.pages import write_page
from mest_compile.sweeping.running import Progress, metric_of
from mest_compile.training.metrics import METRICS, Metric

FIGURES = ("state", "epochs", "of_epochs", "val", "test", "images_per_second", "train_seconds", "planned_bytes")


def row_of(one: Progress, metric: Metric) -> dict[str, Any]:
    """JSON-able.

    val, test          metric after the last epoch that was evaluated; None: there is none
    images_per_second  median of its epochs, train_seconds of all of them
    planned_bytes      of a step at its densest; None before the first epoch
    curve              one dict an epoch, of what the page draws
    """
    history = one.state.history
    return {
        "key": one.cell.key,
        "settings": dict(one.cell.varied),
        "state": one.word,
        "epochs": len(history),
        "of_epochs": one.cell.recipe.epochs,
        "trained_now": one.trained,
        "val": _last(history, f"val_{metric.name}"),
        "test": _last(history, f"test_{metric.name}"),
        "images_per_second": median(one["images_per_second"] for one in history) if history else None,
        "train_seconds": sum(metrics["train_seconds"] for metrics in history),
        "planned_bytes": max((metrics["memory_bytes"]["total"] for metrics in history), default=None),
        "folder": str(one.cell.run.path),
        "problem": one.problem,
        "curve": [
            {
                "epoch": metrics["epoch"],
                "loss": metrics["loss"],
                "val": metrics.get(f"val_{metric.name}"),
                "test": metrics.get(f"test_{metric.name}"),
            }
            for metrics in history
        ],
    }


def _last(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((value for metrics in reversed(history) if (value := metrics.get(name)) is not None), None)


@dataclass(frozen=True, slots=True, repr=False)
class SweepResults:
    """rows  one dict a cell, as `row_of` says, in the sweep's order
    metric  name of what `val` and `test` are
    folder  of the sweep
    """

    rows: tuple[dict[str, Any], ...]
    metric: str
    folder: str

    @classmethod
    def of(cls, cells: Sequence[Progress], folder: Path) -> SweepResults:
        metric = metric_of(cells)
        return cls(tuple(row_of(one, metric) for one in cells), metric.name, str(folder))

    def __repr__(self) -> str:
        lines = ["\t".join(map(str, line)) for line in (self.columns(), *self.cells())]
        return "\n".join(lines)

    @property
    def trained_now(self) -> int:
        """Epochs that were trained since the sweep was started the last time."""
        return sum(row["trained_now"] for row in self.rows)

    @property
    def settings(self) -> list[str]:
        """What is not the same in all cells."""
        return list(dict.fromkeys(name for row in self.rows for name in row["settings"]))

    def score(self, row: Mapping[str, Any]) -> float | None:
        """What a cell is chosen by: val, and where there is none test."""
        return row["test"] if row["val"] is None else row["val"]

    @property
    def best(self) -> dict[str, Any] | None:
        """The finished cell of the best score; None: none is finished."""
        finished = [row for row in self.rows if row["state"] == "finished" and self.score(row) is not None]
        sign = 1 if METRICS[self.metric].share else -1
        return max(finished, key=lambda row: sign * (self.score(row) or 0.0), default=None)

    @property
    def pareto(self) -> list[dict[str, Any]]:
        """Finished cells of which no other trains as fast and is as good, and better in one; fastest first."""
        sign, front, best = 1 if METRICS[self.metric].share else -1, [], None
        finished = [row for row in self.rows if row["state"] == "finished" and self.score(row) is not None]
        for row in sorted(finished, key=lambda one: (-one["images_per_second"], -sign * (self.score(one) or 0.0))):
            score = sign * (self.score(row) or 0.0)
            if best is None or score > best:
                front.append(row)
                best = score
        return front

    def columns(self) -> list[str]:
        label = METRICS[self.metric].label
        return [*self.settings, "state", "epochs", f"val {label}", f"test {label}", "images/s", "planned MiB"]

    def cells(self) -> list[list[str]]:
        """The rows as text, under `columns`."""
        metric = METRICS[self.metric]
        return [
            [
                *(str(row["settings"].get(name, "")) for name in self.settings),
                row["state"],
                f"{row['epochs']}/{row['of_epochs']}",
                metric.shown(row["val"]),
                metric.shown(row["test"]),
                "-" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}",
                "-" if row["planned_bytes"] is None else f"{row['planned_bytes'] / 2**20:.1f}",
            ]
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {
            "folder": self.folder,
            "metric": self.metric,
            "trained_now": self.trained_now,
            "best": None if self.best is None else self.best["key"],
            "pareto": [row["key"] for row in self.pareto],
            "cells": list(self.rows),
        }

    def to_json(self, path: str | Path) -> None:
        """`to_dict` as a file. Raises UsageError when it cannot be written."""
        write_page(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: str | Path) -> None:
        """A line a cell: its settings, then its figures. Raises UsageError when the file cannot be written."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow([*self.settings, *FIGURES, "key", "folder", "problem"])
        for row in self.rows:
            said = [row["settings"].get(name) for name in self.settings]
            lines.writerow([*said, *(row[name] for name in (*FIGURES, "key", "folder", "problem"))])
        write_page(path, text.getvalue())

    def to_html(self, path: str | Path) -> None:
        """One page that needs nothing else. Raises UsageError when it cannot be written."""
        from mest_compile.sweeping.page import page_of

        write_page(path, page_of(self))
