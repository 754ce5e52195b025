"""Callbacks that write a run's metrics for other software: a CSV file, TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import NotInstalled, UsageError


def flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of everything in an epoch's metrics that is one; of tables under names with a dot, as
    `Run.to_pandas` has them."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif checks.is_number(value):
            yield f"{prefix}{name}", float(value)


class CsvWriter:
    """Appends a line an epoch to a CSV file, whose columns are what the first epoch has. Raises UsageError where it
    cannot be written."""

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._names: list[str] | None = None

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        found = dict(flat(metrics))
        try:
            with self._path.open("a" if self._names else "w", newline="", encoding="utf-8") as file:
                if self._names is None:
                    self._names = list(found)
                    csv.writer(file).writerow(self._names)
                csv.writer(file).writerow([found.get(name, "") for name in self._names])
        except OSError as problem:
            raise UsageError(f"{self._path} cannot be written: {problem.strerror}; give another path") from problem


class TensorBoardWriter:
    """Writes every number of every epoch into a folder that TensorBoard shows. Raises NotInstalled without the package
    tensorboard."""

    def __init__(self, folder: str | os.PathLike):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as problem:
            raise NotInstalled("TensorBoardWriter needs the package tensorboard: pip install tensorboard") from problem
        self._writer = SummaryWriter(str(folder))

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        for name, value in flat(metrics):
            self._writer.add_scalar(name.replace(".", "/"), value, metrics["epoch"])
        self._writer.flush()
