"""Callbacks that write a run's metrics for other software: a CSV file, TensorBoard, Weights & Biases."""

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


class WandbWriter:
    """Logs every number of every epoch to a new run of Weights & Biases; `close` ends that run, as the end of the
    process does.

    project  its project there
    options  of wandb.init: name, config, dir, mode="offline" (files in dir, for `wandb sync`)
    Raises NotInstalled without the package wandb.
    """

    def __init__(self, project: str, **options: Any):
        try:
            import wandb
        except ImportError as problem:
            raise NotInstalled("WandbWriter needs the package wandb: pip install wandb") from problem
        self._run = wandb.init(project=project, **options)

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        self._run.log({name.replace(".", "/"): value for name, value in flat(metrics)}, step=metrics["epoch"])

    def close(self) -> None:
        self._run.finish()
