"""Training of a part of a net on what the part before it gives: a run folder of its own, which goes on where it was
stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.assembling import make_step
from mest_compile.base.errors import StateError
from mest_compile.data import Dataset, Split
from mest_compile.finetuning.cutting import rest_of
from mest_compile.finetuning.timing import SLACK, Clock, epochs_within, seconds_of
from mest_compile.kernels.cache import Builder
from mest_compile.opening import load
from mest_compile.planning.plan import Plan
from mest_compile.runtime import checkpoint
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.training.run import Progress
from mest_compile.training.runfolder import RunFolder

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

log = logging.getLogger(__name__)

History = Sequence[Mapping[str, Any]]


class _Enough(Exception):
    """Training ends before the recipe's last epoch; its files are those of a whole epoch."""


class _Watch:
    """Passes on what happens, and ends a training that gets no better or has no time for another epoch."""

    def __init__(self, progress: Progress, history: History, patience: int | None, clock: Clock):
        self.on_batch = progress.on_batch
        self._progress, self._history, self._patience, self._clock = progress, list(history), patience, clock

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        self._progress.on_epoch(metrics)
        self._history.append(metrics)
        took = metrics["train_seconds"] + metrics["evaluation_seconds"]
        if gone(self._history, self._patience) or self._clock.left < took:
            raise _Enough


def gone(history: History, patience: int | None) -> bool:
    """Whether so many epochs have passed since the best accuracy on the validation part; without one they never do."""
    scores = [epoch["val_accuracy"] for epoch in history if "val_accuracy" in epoch]
    return patience is not None and bool(scores) and len(scores) - 1 - int(np.argmax(scores)) >= patience


def trained(
    plan: Plan,
    start: int,
    state: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    split: Split,
    recipe: Recipe,
    folder: Path,
    *,
    patience: int | None,
    clock: Clock,
    builder: Builder,
    progress: Callable[[TrainStep], Progress],
    prepare: Callable[[TrainStep], None],
) -> TrainStep:
    """The step of a plan's nodes from `start` on, trained, as it was when it was best on the validation part, or in the
    end where there is none; from the folder where it was trained before.

    masks   of sparse layers, (out, in, kh, kw) bool; those that are not named begin by magnitude
    recipe  its epochs are the most there will be, where the clock has a limit
    prepare  does to the step what no file of it holds, whenever it is to train
    Raises BudgetError, and what training does.
    """
    files = RunFolder(folder)
    if files.stamp() is not None or files.previous.is_file():
        return _gone_on(files, split, patience, clock, builder, progress, prepare)
    with clock("compiling"):
        rest = Plan(rest_of(plan.facts, start), plan.records)
        own = {name: state[name] for name in rest.facts.graph.state_shapes}
        step = make_step(rest, own, builder, None, None, masks)
    prepare(step)
    epochs = recipe.epochs
    if clock.limit_seconds is not None:
        epochs = epochs_within(clock.left, _epoch_seconds(step, split), epochs)
    trainer = Trainer(step, replace(recipe, epochs=epochs, **_shorter(recipe, epochs)), folder)
    return _fit(trainer, files, split, [], patience, clock, progress)


def _shorter(recipe: Recipe, epochs: int) -> dict[str, Any]:
    """What else a recipe is for so few epochs: one is too few to mutate or sieve between."""
    if epochs == 1:
        return {"method": "static", "sieve": None}
    return {"warmup_epochs": min(recipe.warmup_epochs, epochs - 1)}


def _gone_on(
    files: RunFolder,
    split: Split,
    patience: int | None,
    clock: Clock,
    builder: Builder,
    progress: Callable[[TrainStep], Progress],
    prepare: Callable[[TrainStep], None],
) -> TrainStep:
    whole, extra = _last_whole(files)
    history = extra["history"]
    done = len(history) >= extra["recipe"]["epochs"] or gone(history, patience)
    with clock("compiling"):
        step = load(files.best if done and files.best.is_file() else whole, builder=builder)
        if done:
            return step
        prepare(step)
        trainer = Trainer.resume(files.path, step)
    return _fit(trainer, files, split, history, patience, clock, progress)


def _last_whole(files: RunFolder) -> tuple[Path, dict[str, Any]]:
    """The last checkpoint that is whole, and what the trainer noted in it. Raises StateError."""
    try:
        return files.checkpoint, checkpoint.read(files.checkpoint)[1]["extra"]
    except StateError:
        if not files.previous.is_file():
            raise
        return files.previous, checkpoint.read(files.previous)[1]["extra"]


def _fit(
    trainer: Trainer,
    files: RunFolder,
    split: Split,
    history: History,
    patience: int | None,
    clock: Clock,
    progress: Callable[[TrainStep], Progress],
) -> TrainStep:
    trainer.judge.latest = True
    trainer.progress = _Watch(progress(trainer.step), history, patience, clock)
    try:
        trainer.fit(split.train, val_set=split.val)
    except _Enough:
        log.info("%s ends early: no better for %s epochs, or no time for another", files.path, patience)
    if files.best.is_file() and not files.best.samefile(files.checkpoint):  # else it is as it was when it was best
        trainer.step.restore(files.best)
    return trainer.step


def _epoch_seconds(step: TrainStep, split: Split) -> float:
    """What an epoch will take, from a step and a prediction that are timed; nothing of the step changes."""
    train = split.train
    images = train.normalise(_first(train, step.batch)).reshape(step.input_shape)
    labels = np.resize(train.labels, step.batch)
    whole = seconds_of(lambda: step.gradients(images, labels)) * (len(train) // step.batch)
    tested = seconds_of(lambda: step.predict(images)) * -(-len(split.val or ()) // step.batch)
    return SLACK * (whole + tested)


def _first(data: Dataset, count: int) -> np.ndarray:
    return data.images[np.resize(np.arange(len(data)), count)]
