"""Dense torch beside a sweep's cells: the same net, data, batches and rates, every weight alive.

python -m mest_compile.sweeping.dense PARENT CELL.toml RESULT.json   # PARENT: the process's number that waits for it
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from os import getpid
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import MestError, UsageError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.data import Dataset, batches, batches_of, load, parts
from mest_compile.hardware.host import cores
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.sweeping.cell import Cell, make_cell
from mest_compile.sweeping.room import network, shape
from mest_compile.sweeping.toml import to_toml
from mest_compile.sweeping.work import end_with
from mest_compile.sweeping.workers import environment
from mest_compile.training.epoch import SHUFFLE
from mest_compile.training.tables import read_toml


def trained(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What torch makes of each cell, in processes of their own, as many at once as there are cores: {"test": accuracy
    after the last epoch, "epochs", "train_seconds"}. It is kept in the folder of the cell, and what is there is not
    trained again.
    Raises MestError where one fails."""
    with ThreadPoolExecutor(max(1, cores() // cells[0].threads)) as pool:
        return list(pool.map(_trained, cells))


def _trained(cell: Cell) -> dict[str, Any]:
    result = cell.folder / "torch.json"
    if not result.is_file():
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cell.recipe_file, to_toml(cell.settings))
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(getpid()), str(cell.recipe_file), str(result)],
            capture_output=True,
            text=True,
            env=environment(cell.threads),
        )
        if done.returncode:
            raise MestError(f"dense torch failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def check(cell: Cell) -> None:
    """Raises UsageError for what dense torch is not taught here."""
    if not isinstance(cell.options.loss, CrossEntropy):
        raise UsageError(f"the loss is {cell.options.loss}; dense torch beside it is trained with cross_entropy")
    if isinstance(network(cell), str):
        raise UsageError(f"{cell.settings['run']['model']} is no torch.nn.Module; give a model by its name")
    if others := [name for name in ("sieve", "freeze", "patience", "clip_norm") if getattr(cell.recipe, name)]:
        raise UsageError(f"dense torch is trained without {others[0]} here; leave it out of the recipe")


def train(cell: Cell) -> dict[str, Any]:
    """JSON-able, as `trained` has it, of a cell that `check` has passed, in this process."""
    import torch

    recipe, run, rule, loss = cell.recipe, cell.settings["run"], cell.options.optimizer, cell.options.loss
    model: Any = network(cell)
    assert isinstance(loss, CrossEntropy)
    torch.set_num_threads(cell.threads)
    kept = {"resize": cell.resize, "val_split": run.get("val_split", 0.0), "seed": recipe.seed}
    split = load(run["data"], run.get("data_folder"), **kept)
    model = model.to(memory_format=torch.channels_last).train()
    name, fields, _ = rule.torch
    optimizer = getattr(torch.optim, name)(
        model.parameters(), **{theirs: getattr(rule, ours) for theirs, ours in fields.items()}
    )
    answer = torch.nn.CrossEntropyLoss(label_smoothing=loss.smoothing)
    shift, flip = recipe.augmentation(split.train.shift, split.train.flip)
    data = replace(split.train, shift=shift, flip=flip)
    batch, rates = shape(cell)[0], recipe if recipe.lr is not None else recipe.resolved(0.0, rule.lr)
    count, began = batches_of(len(data), batch, bool(recipe.drop_last)), time.perf_counter()
    for epoch in range(recipe.epochs):
        rng = np.random.default_rng([recipe.seed, epoch, SHUFFLE])
        with closing(batches(data, batch, rng, shift or flip, None, bool(recipe.drop_last))) as given:  # type: ignore[type-var]
            for index, (images, labels, _) in enumerate(given):
                for group in optimizer.param_groups:
                    group["lr"] = rates.lr_at(epoch, index, count)
                optimizer.zero_grad()
                answer(model(_tensor(images)), torch.from_numpy(labels)).backward()
                optimizer.step()
    seconds = time.perf_counter() - began
    return {"test": _accuracy(model.eval(), split.test, batch), "epochs": recipe.epochs, "train_seconds": seconds}


def _tensor(images: np.ndarray) -> Any:
    import torch

    found = torch.from_numpy(images)
    return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found


def _accuracy(model: Any, data: Dataset, batch: int) -> float:
    import torch

    right = 0
    with torch.no_grad():
        for images, labels in parts(data, batch):
            right += int((model(_tensor(images)).argmax(1).numpy() == labels).sum())
    return right / len(data)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    _file, _result = Path(sys.argv[2]), Path(sys.argv[3])
    write_json(_result, train(make_cell(read_toml(_file), {}, _file.parent)))
