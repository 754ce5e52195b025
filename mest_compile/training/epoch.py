"""One pass over a data set: to train on it, or to see how good a step's answers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from time import perf_counter
from typing import Any

import numpy as np

from mest_compile.base.errors import MestError
from mest_compile.data import Dataset, batches, batches_of
from mest_compile.training.given import Given
from mest_compile.training.judging import Judge
from mest_compile.training.recipe import Recipe
from mest_compile.training.run import Progress
from mest_compile.training.sieve import Sieve

# Streams of random numbers: a generator is a pure function of (seed, epoch, stream), so a resumed run needs no
# generator's state.
SHUFFLE, MUTATION, SIEVE, GRADIENT, FREEZE, CHOICE = 0, 1, 2, 3, 4, 5


def train_epoch(
    step: Any,
    judge: Judge,
    recipe: Recipe,
    epoch: int,
    given: Given,
    sieve: Sieve | None,
    rates: Callable[[int, int], float | Sequence[float]],
    progress: Progress,
    diverged: Callable[[str, int], MestError],
) -> dict[str, Any]:
    """Metrics of one pass over what the sieve keeps. rates: learning rates of an iteration (from 0) of so many, the
    last of what never freezes; diverged: makes the error of a loss that is not finite."""
    rng = np.random.default_rng([recipe.seed, epoch, SHUFFLE])
    train, done = given.train, 0
    among = np.flatnonzero(sieve.kept) if sieve else np.arange(len(train))
    last = bool(recipe.drop_last)
    count, whole = (batches_of(len(examples), step.batch, last) for examples in (among, train))
    if isinstance(train, Dataset) and not last and (rest := len(among) % step.batch):
        step.prepare(rest)  # what cannot be trained is told before the epoch is
    loss, step_seconds, lr, trained = 0.0, 0.0, 0.0, 0
    judge.restart()
    bound = {} if recipe.clip_norm is None else {"clip_norm": recipe.clip_norm}
    began = perf_counter()
    with closing(batches(train, step.batch, rng, given.augment, among, last)) as prepared:  # type: ignore[type-var]
        shaped = _shaped(step, judge, prepared)
        for index, ((images, labelled, labels, examples), following) in enumerate(_with_next(shaped)):
            rate = rates(index, count)
            lr = rate[-1] if isinstance(rate, Sequence) else rate
            called = perf_counter()
            result = step(images, labelled, lr=rate, ahead=following and following[:2], **bound)
            step_seconds += perf_counter() - called
            if not math.isfinite(result.loss):
                raise diverged(
                    f"the loss is {result.loss} at epoch {epoch + 1}, batch {index + 1}, learning rate {lr:.3g}",
                    epoch,
                )
            if sieve:
                sieve.count(examples, judge.right(result, labels))
            loss += float(result.loss) * (len(labels) / step.batch)
            trained, done = trained + len(labels), done + 1
            score = judge.count(result, labels)
            progress.on_batch(epoch + 1, recipe.epochs, index + 1, count, result.loss, score)
    seconds = perf_counter() - began
    return {
        "loss": loss / (trained / step.batch),
        **judge.trained(),
        "lr": lr,
        "examples": trained,
        "iterations": done,
        "iterations_saved": whole - count,
        "images_per_second": trained / seconds,
        "train_seconds": seconds,
        "step_seconds": step_seconds / done,
    }


def _shaped(step: Any, judge: Judge, prepared: Iterable[Any]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(images, what the step takes with them, labels, examples) of every batch."""
    for images, labels, examples in prepared:
        shaped = images.reshape(len(images), *step.input_shape[1:])
        yield shaped, judge.given(shaped, labels), labels, examples


def _with_next(items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(item, the one after it or None)."""
    rest = iter(items)
    present = next(rest)
    for following in rest:
        yield present, following
        present = following
    yield present, None
