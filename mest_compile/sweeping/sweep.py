"""mest.sweep: many trainings, none of them twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mest_compile.base.errors import StateError, UsageError
from mest_compile.hardware import host
from mest_compile.sweeping import running
from mest_compile.sweeping.asha import AshaRule
from mest_compile.sweeping.cell import Cell, make_cell
from mest_compile.sweeping.pace import Estimate, estimate
from mest_compile.sweeping.plan import folder_of, read_plan
from mest_compile.sweeping.results import SweepResults
from mest_compile.sweeping.room import local_workers, most_bytes
from mest_compile.sweeping.running import Progress, look
from mest_compile.sweeping.workers import Workers

Tell = Callable[[Sequence[Progress]], None]


def sweep(
    plan: str | os.PathLike | Mapping[str, Any],
    out: str | os.PathLike | None = None,
    progress: Tell | None = None,
    ray: str | None = None,
) -> SweepResults:
    """Trains every cell of a grid, each in a run folder of its own that its content names, as many at once as cores and
    memory allow. What is finished is not trained again, what was stopped goes on bit for bit, and a plan may be
    changed and swept again.

    plan      a TOML file or a table as such a file has it: `plan.read_plan`
    out       the sweep's folder; None: runs/NAME of the file NAME.toml
    progress  called several times a second with all cells
    ray       address of a Ray cluster whose nodes see the same folders, to train there; None: here
    Raises UsageError for a plan or a cell that cannot be meant, DataError, StateError where another sweep is at work in
    the folder, NotInstalled without Ray. A cell that fails or diverges is a row that says why.
    """
    cells, asha, root = read(plan, out)
    with alone(root):
        found = look(cells)
        if any(not one.finished and one.problem is None for one in found):
            running.train(found, _workers(found, ray), asha, progress or (lambda cells: None))
        results = SweepResults.of(found, root)
        results.to_json(root / "sweep.json")
    return results


def foresee(
    plan: str | os.PathLike | Mapping[str, Any],
    out: str | os.PathLike | None = None,
    tell: Callable[[str, int, int], None] | None = None,
) -> Estimate:
    """What a sweep would find there and what the rest would cost, training nothing. Raises as `sweep` does, and what is
    wrong with a cell's model."""
    cells, _, _ = read(plan, out)
    return estimate(look(cells), tell or (lambda what, number, count: None))


def read(
    plan: str | os.PathLike | Mapping[str, Any], out: str | os.PathLike | None = None
) -> tuple[list[Cell], AshaRule | None, Path]:
    """(cells, how they are stopped early, the sweep's folder). Raises as `sweep` does; writes nothing."""
    said, root = read_plan(plan), Path(folder_of(plan) if out is None else out).absolute()
    cells = [make_cell(settings, varied, root) for settings, varied in zip(said.cells, said.varied)]
    by_key: dict[str, Cell] = {}
    for cell in cells:
        if (other := by_key.setdefault(cell.key, cell)) is not cell:
            raise UsageError(f"two cells would train the same: {other.varied} and {cell.varied}; leave one out")
    if said.asha is not None:
        _check_asha(cells, said.asha)
    return cells, said.asha, root


def _check_asha(cells: Sequence[Cell], asha: AshaRule) -> None:
    if without := [cell for cell in cells if not cell.has_val]:
        raise UsageError(
            f"asha stops cells by their validation score, and {without[0].settings['run']['data']} has no validation "
            "part; give val_split = 0.1 in the table [run]"
        )
    if len({cell.recipe.epochs for cell in cells}) > 1:
        raise UsageError("asha compares cells epoch by epoch: give all of them the same epochs")
    rungs = asha.rungs(cells[0].recipe.epochs)
    if blind := [rung for rung in rungs for cell in cells if not cell.recipe.evaluates(rung - 1)]:
        raise UsageError(
            f"asha compares cells after {', '.join(map(str, rungs))} epochs, and eval_every leaves epoch {blind[0]} "
            "out; leave eval_every out, or give asha a first that it divides"
        )


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Nobody else sweeps in the folder, which is made where it is not. Raises StateError, UsageError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = host.exclusive(root / "lock")
    except OSError as problem:
        raise UsageError(f"cannot write the sweep to {root}: {problem.strerror}; pass another --out") from problem
    if lock is None:
        raise StateError(f"{root}: another sweep is at work in this folder; let it end or stop it")
    with lock:
        yield


def _workers(cells: Sequence[Progress], ray: str | None) -> Workers:
    threads = max(one.cell.threads for one in cells)
    left = [one.cell for one in cells if not one.finished]
    if ray is not None:
        from mest_compile.sweeping.onray import RayWorkers

        return RayWorkers(ray, threads, most_bytes(left))
    return local_workers(left, threads)
