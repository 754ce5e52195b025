"""What a sweep will cost: from what its cells have taken by now, or from a short measurement.

python -m mest_compile.sweeping.pace CELL.toml   # measures one cell, told as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mest_compile.base.errors import MestError
from mest_compile.data.batching import batches_of
from mest_compile.sweeping.cell import Cell, make_cell
from mest_compile.sweeping.room import local_workers, network, shape, step_key
from mest_compile.sweeping.running import Progress
from mest_compile.sweeping.toml import to_toml
from mest_compile.sweeping.workers import environment
from mest_compile.training.tables import read_toml

MEASURED_SECONDS = 1.0  # of steps, after the first
RECORDS, MEASUREMENT = "records", "measurement"


@dataclass(frozen=True, slots=True)
class Pace:
    """What a cell takes.

    begin_seconds  from the start of its command to its first step: imports, planning, compiling, data
    epoch_seconds  of an epoch with its evaluation
    source         RECORDS: of epochs that cells with the same step have trained; MEASUREMENT: of some steps, alone
    """

    begin_seconds: float
    epoch_seconds: float
    planned_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """rows     one dict a cell: settings, state, epochs there, epochs left, seconds left, and the pace's fields
    at_once  cells that would train side by side here
    """

    rows: tuple[dict[str, Any], ...]
    at_once: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values. seconds: of all cells, begin_seconds of which before their first steps, on
        as many workers; what they take from one another is not in it."""
        left = [row for row in self.rows if row["epochs_left"]]
        return {
            "cells": list(self.rows),
            "cells_left": len(left),
            "epochs_left": sum(row["epochs_left"] for row in left),
            "at_once": self.at_once,
            "begin_seconds": sum(row["begin_seconds"] for row in left) / max(1, self.at_once),
            "seconds": sum(row["seconds_left"] for row in left) / max(1, self.at_once),
            "planned_bytes": max((row["planned_bytes"] for row in left), default=0),
        }


def estimate(cells: Sequence[Progress], tell: Callable[[str, int, int], None]) -> Estimate:
    """What is there, and what is left would cost without early stopping. tell: called with (what is measured, number,
    of how many). Writes nothing but to the cache of kernels. Raises MestError where a cell cannot be measured."""
    left = [one for one in cells if not one.finished and one.problem is None]
    groups: dict[str, list[Progress]] = {}
    for one in cells:
        groups.setdefault(step_key(one.cell), []).append(one)
    wanted = list(dict.fromkeys(step_key(one.cell) for one in left))
    known = {key: _recorded(groups[key]) for key in wanted}
    unknown = [key for key in wanted if known[key] is None]
    for number, key in enumerate(unknown):
        cell = next(one.cell for one in left if step_key(one.cell) == key)
        tell(", ".join(f"{name} {value}" for name, value in cell.varied.items()), number, len(unknown))
        known[key] = _measured(cell)
    workers = local_workers([one.cell for one in left], max(one.cell.threads for one in left)).slots if left else 0
    return Estimate(tuple(_row(one, known[step_key(one.cell)] if one in left else None) for one in cells), workers)


def _row(one: Progress, pace: Pace | None) -> dict[str, Any]:
    epochs = 0 if pace is None else one.cell.recipe.epochs - one.done
    return {
        "key": one.cell.key,
        "settings": dict(one.cell.varied),
        "state": one.word,
        "epochs": one.done,
        "epochs_left": epochs,
        "begin_seconds": None if pace is None else pace.begin_seconds,
        "epoch_seconds": None if pace is None else pace.epoch_seconds,
        "seconds_left": 0.0 if pace is None else pace.begin_seconds + epochs * pace.epoch_seconds,
        "planned_bytes": None if pace is None else pace.planned_bytes,
        "source": None if pace is None else pace.source,
    }


def _recorded(cells: Sequence[Progress]) -> Pace | None:
    """Of cells with the same step, by what they have trained; None where none has ended a command."""
    known = [one for one in cells if one.done and one.cell.commands()]
    if not known:
        return None
    epoch = median(epoch_seconds(metrics) for one in known for metrics in one.state.history)
    begin = [
        command["seconds"] - command["epochs"] * median(map(epoch_seconds, one.state.history))
        for one in known
        for command in one.cell.commands()
    ]
    planned = max(metrics["memory_bytes"]["total"] for one in known for metrics in one.state.history)
    return Pace(max(0.0, median(begin)), epoch, planned, RECORDS)


def epoch_seconds(metrics: dict[str, Any]) -> float:
    """Of an epoch, from its line of metrics.jsonl."""
    mutation = metrics["mutation"]["seconds"] if metrics["mutation"] else 0.0
    return float(metrics["train_seconds"] + metrics["evaluation_seconds"] + mutation)


def _measured(cell: Cell) -> Pace:
    """Once more where kernels had to be compiled, which the cell will find in the cache. Raises MestError."""
    seconds, found = _asked(cell)
    if found["compiled"]:
        seconds, found = _asked(cell)
    return Pace(seconds - found["timed_seconds"], found["epoch_seconds"], found["planned_bytes"], MEASUREMENT)


def _asked(cell: Cell) -> tuple[float, dict[str, Any]]:
    """(seconds that it took, what `measure` tells) in a process of its own. Raises MestError."""
    with tempfile.TemporaryDirectory() as folder:
        file, began = Path(folder, "cell.toml"), time.perf_counter()
        file.write_text(to_toml(cell.settings), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(file)],
            capture_output=True,
            text=True,
            env=environment(cell.threads),
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MestError(f"{', '.join(f'{name} {value}' for name, value in cell.varied.items())}: {said}")
    return seconds, json.loads(done.stdout.splitlines()[-1])


def measure(cell: Cell) -> dict[str, Any]:
    """JSON-able: epoch_seconds by some steps and answers on its data, planned_bytes, timed_seconds, which that took
    after everything was compiled, and compiled, how many kernels were."""
    import numpy as np

    from mest_compile.compiling import compile_step
    from mest_compile.data import load
    from mest_compile.kernels.cache import Builder
    from mest_compile.operators.losses.loss import read_loss
    from mest_compile.training.given import given
    from mest_compile.training.judging import Judge

    run = cell.settings["run"]
    split = load(run["data"], run.get("data_folder"), cell.options.loss.takes_numbers, cell.resize)
    builder = Builder()
    step = compile_step(network(cell), shape(cell), cell.options, builder=builder)
    described = step.describe()
    output = tuple(described.get("output_shape", (step.batch, step.classes)))
    judge = Judge(read_loss(described), output, cell.recipe, None)
    images, targets = given(step, judge, cell.recipe, split.train, None, None).batch(
        step, judge, np.random.default_rng(0)
    )
    began = time.perf_counter()
    step_seconds = _seconds(lambda: step(images, targets))
    answer_seconds = _seconds(lambda: step.predict(images))
    tested = [data for data in (split.known_test, split.val) if data is not None]
    steps = batches_of(len(split.train), step.batch, bool(cell.recipe.drop_last))
    answers = sum(batches_of(len(data), step.batch, False) for data in tested) / cell.recipe.eval_every
    return {
        "epoch_seconds": steps * step_seconds + answers * answer_seconds,
        "planned_bytes": step.memory()["total"],
        "timed_seconds": time.perf_counter() - began,
        "compiled": builder.compiled,
    }


def _seconds(action: Callable[[], Any]) -> float:
    """Median of some, after a first."""
    action()
    found: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < MEASURED_SECONDS or not found:
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return median(found)


if __name__ == "__main__":
    print(json.dumps(measure(make_cell(read_toml(sys.argv[1]), {}, Path(sys.argv[1]).parent))))
