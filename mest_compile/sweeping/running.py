"""The loop of a sweep: who trains next and how far, what has come of it, who was lost. It keeps no state of its own: a
cell's run folder says how far the cell is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from mest_compile.base.errors import StateError
from mest_compile.base.files import write_atomically
from mest_compile.hardware import host
from mest_compile.sweeping.asha import AshaRule
from mest_compile.sweeping.cell import Cell, State
from mest_compile.sweeping.toml import to_toml
from mest_compile.sweeping.workers import LOST, Workers
from mest_compile.training.metrics import main_metric

log = logging.getLogger(__name__)
MOST_LOSSES = 4  # times that a cell's command may be lost without a whole epoch in between
LOOKS_SECONDS = 0.2
SAID_BYTES = 4096  # of a log's end, in which a command's error is looked for


@dataclass(slots=True)
class Progress:
    """A cell as the sweep sees it.

    problem  why it can go no further; a diverged run's is what it was that is not finite
    trained  epochs that this sweep, since it was started, has added
    """

    cell: Cell
    state: State
    running: bool = False
    problem: str | None = None
    trained: int = 0
    losses: int = field(default=0, repr=False)
    began: float = field(default=0.0, repr=False)

    @property
    def done(self) -> int:
        return len(self.state.history)

    @property
    def finished(self) -> bool:
        """Whether it is trained to its end."""
        return self.done >= self.cell.recipe.epochs or self.state.patience_is_out

    @property
    def word(self) -> str:
        """Its state in a word."""
        if self.state.diverged is not None:
            return "diverged"
        if self.problem is not None:
            return "failed"
        return "finished" if self.finished else "running" if self.running else "paused" if self.done else "waiting"

    def score(self, epochs: int) -> float | None:
        """Validation metric, higher is better, when it had trained for so many: of the last evaluation by then."""
        found = None
        for metrics in self.state.history[:epochs]:
            metric = main_metric(metrics)
            if (value := metrics.get(f"val_{metric.name}")) is not None:
                found = value if metric.share else -value
        return found

    def scores(self, rungs: Sequence[int]) -> dict[int, float]:
        """{rung: score} of those that it has come to; -inf of one that it will not come to."""
        gone = self.problem is not None or self.state.diverged is not None
        found: dict[int, float] = {}
        for rung in rungs:
            if not self.finished and rung > self.done:
                return {**found, rung: -inf} if gone else found
            score = self.score(rung)
            found[rung] = -inf if gone or score is None else score
        return found


def look(cells: Sequence[Cell]) -> list[Progress]:
    """What there is already. A run whose checkpoints are damaged can go no further."""
    found = [_seen(Progress(cell, State())) for cell in cells]
    for one in found:
        one.trained = 0
    return found


def _seen(one: Progress) -> Progress:
    try:
        before, one.state = one.done, one.cell.state()
        one.trained += one.done - before
    except StateError as problem:
        one.problem = str(problem)
        return one
    one.problem = one.state.diverged
    return one


def train(
    cells: Sequence[Progress],
    workers: Workers,
    asha: AshaRule | None = None,
    tell: Callable[[Sequence[Progress]], None] = lambda cells: None,
) -> None:
    """Trains until there is nothing left to train; cells are brought up to date as it goes. tell: called now and then.

    However it ends, nothing that it began runs on.
    """
    running: dict[int, int] = {}  # {cell: epochs that it had when its command began}
    try:
        while True:
            while len(running) < workers.slots and (chosen := _next(cells, running, asha)) is not None:
                place, until = chosen
                _begin(cells[place], place, until, workers)
                running[place] = cells[place].done
            if not running:
                return
            tell(cells)
            time.sleep(LOOKS_SECONDS)
            for place, code in workers.ended().items():
                _end(cells[place], code, running.pop(place))
    finally:
        workers.close()
        for place in running:
            cells[place].running = False
        tell(cells)


def _next(cells: Sequence[Progress], running: Mapping[int, int], asha: AshaRule | None) -> tuple[int, int] | None:
    """(a cell to begin with, the epochs that it is to have), as the sweep's rule says."""
    if asha is None:
        return next(
            (
                (place, one.cell.recipe.epochs)
                for place, one in enumerate(cells)
                if place not in running and one.problem is None and not one.finished
            ),
            None,
        )
    rungs = asha.rungs(cells[0].cell.recipe.epochs)
    return asha.next(asha.order(len(cells)), rungs, [one.scores(rungs) for one in cells], running)


def _begin(one: Progress, place: int, until: int, workers: Workers) -> None:
    folder = one.cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(one.cell.recipe_file, to_toml(one.cell.settings))
    _wait_for_lock(one.cell)
    one.running, one.began = True, time.perf_counter()
    workers.start(place, one.cell.command(until, one.state.begun), one.cell.log)


def _wait_for_lock(cell: Cell) -> None:
    """Until a command that a killed sweep began is gone, too; it ends by itself."""
    if not cell.run.path.is_dir():
        return
    if (lock := host.exclusive(cell.run.path / "lock")) is None:
        log.warning("%s: another process trains here; waiting for its end", cell.run.path)
        while (lock := host.exclusive(cell.run.path / "lock")) is None:
            time.sleep(LOOKS_SECONDS)
    lock.release()


def _end(one: Progress, code: int, before: int) -> None:
    """What has become of a cell whose command has ended; before: epochs that it had when it began."""
    one.running = False
    _seen(one)
    if code == 0:
        one.cell.note_command(one.done - before, time.perf_counter() - one.began)
    if code == 0 or one.problem is not None:
        return
    if code != LOST:
        one.problem = _said(one.cell)
        return
    one.losses = 1 if one.done > before else one.losses + 1
    if one.losses == MOST_LOSSES:
        one.problem = f"{one.losses} commands were lost without a whole epoch in between: killed, or out of memory"


def _said(cell: Cell) -> str:
    """The error that a command ended with."""
    with cell.log.open("rb") as file:
        file.seek(max(0, cell.log.stat().st_size - SAID_BYTES))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), (lines or ["it said nothing"])[-1])


def metric_of(cells: Sequence[Progress]) -> Any:
    """What the cells are judged by; accuracy as long as none has an epoch."""
    return main_metric(next((one.state.history[-1] for one in cells if one.done), {}))
