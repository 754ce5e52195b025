"""How many cells may train at once: what their steps need, as planned, and what this machine has."""

from __future__ import annotations

from collections.abc import Sequence

from mest_compile.hardware.host import cores
from mest_compile.sweeping.cell import USUAL_BATCH, Cell
from mest_compile.sweeping.workers import LocalWorkers

# Resident in a process that has trained a net of next to nothing, torch and TVM in it: 583 and 597 MiB measured with an
# mlp and resnet8 on digits (x86-64, torch 2.13).
PROCESS_BYTES = 640 * 2**20
COPIES = 3  # of the images: as read, split, and in the making of batches
SHARE = 0.9  # of the memory that is free; the rest is for what else runs


def local_workers(cells: Sequence[Cell], threads: int) -> LocalWorkers:
    """For cells that are not finished, the largest of which decides."""
    import psutil

    need, free = most_bytes(cells), psutil.virtual_memory().available
    slots = min(len(cells), cores() // threads, int(SHARE * free) // need)
    return LocalWorkers(max(1, slots), threads)


def most_bytes(cells: Sequence[Cell]) -> int:
    """That the process of one of them needs, whichever it is."""
    return max(map(need_bytes, one_of_each(cells)))


def one_of_each(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of which no two have a step of the same size."""
    return list({step_key(cell): cell for cell in cells}.values())


def step_key(cell: Cell) -> str:
    """The same of cells whose steps are as large and as fast: all but the seed and what the recipe alone decides."""
    options = {**cell.options.to_json(), "seed": 0}
    run = {key: value for key, value in cell.settings["run"].items() if key != "val_split"}
    return repr((sorted(options.items(), key=lambda item: item[0]), sorted(run.items(), key=lambda item: item[0])))


def need_bytes(cell: Cell) -> int:
    """Of a process that trains it: planned for the step, and what is around that."""
    return PROCESS_BYTES + planned_bytes(cell) + COPIES * cell.data.image_bytes


def planned_bytes(cell: Cell) -> int:
    """Of its step at its densest, without compiling it. Raises what is wrong with the model."""
    from mest_compile.compiling import planned_step

    plan, _, _ = planned_step(network(cell), shape(cell), cell.options, None, None, None)
    return plan.memory()["total"]


def shape(cell: Cell) -> tuple[int, ...]:
    """Of a step's input."""
    return (cell.settings["run"].get("batch", USUAL_BATCH), *cell.data.shape)


def network(cell: Cell) -> object:
    """The model that it begins with."""
    from mest_compile.models.sources import find_model

    run = cell.settings["run"]
    said = {name: run[name] for name in ("width", "pretrained", "weights") if name in run}
    return find_model(run["model"], shape(cell), cell.data.outputs, seed=cell.options.seed, **said)
