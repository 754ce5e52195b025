"""One pass over a data set: to train on it, or to see how many examples a step tells right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from time import perf_counter
from typing import Any

import numpy as np

from mest_compile.base.errors import MestError
from mest_compile.data import Dataset, batches
from mest_compile.training.recipe import Recipe
from mest_compile.training.run import Progress
from mest_compile.training.sieve import Sieve

# Streams of random numbers: a generator is a pure function of (seed, epoch, stream), so a resumed run needs no
# generator's state.
SHUFFLE, MUTATION, SIEVE, GRADIENT = 0, 1, 2, 3


def train_epoch(
    step: Any,
    recipe: Recipe,
    epoch: int,
    train: Dataset,
    sieve: Sieve | None,
    progress: Progress,
    diverged: Callable[[str, int], MestError],
) -> dict[str, Any]:
    """Metrics of one pass over what the sieve keeps. diverged: makes the error of a loss that is not finite."""
    rng = np.random.default_rng([recipe.seed, epoch, SHUFFLE])
    among = np.flatnonzero(sieve.kept) if sieve else np.arange(len(train))
    count, whole = len(among) // step.batch, len(train) // step.batch
    loss, correct, step_seconds, lr = 0.0, 0, 0.0, 0.0
    bound = {} if recipe.clip_norm is None else {"clip_norm": recipe.clip_norm}
    began = perf_counter()
    with closing(batches(train, step.batch, rng, recipe.augment, among)) as prepared:  # type: ignore[type-var]
        shaped = ((images.reshape(step.input_shape), labels, examples) for images, labels, examples in prepared)
        for index, ((images, labels, examples), following) in enumerate(_with_next(shaped)):
            lr = recipe.lr_at(epoch, index, count)
            called = perf_counter()
            result = step(images, labels, lr=lr, ahead=following and following[:2], **bound)
            step_seconds += perf_counter() - called
            if not math.isfinite(result.loss):
                raise diverged(
                    f"the loss is {result.loss} at epoch {epoch + 1}, batch {index + 1}, learning rate {lr:.3g}",
                    epoch,
                )
            if sieve:
                sieve.count(examples, result.correct)
            loss += float(result.loss)
            right = int(np.count_nonzero(result.correct))
            correct += right
            progress.on_batch(epoch + 1, recipe.epochs, index + 1, count, result.loss, right / step.batch)
    seconds, trained = perf_counter() - began, count * step.batch
    return {
        "loss": loss / count,
        "train_accuracy": correct / trained,
        "lr": lr,
        "examples": trained,
        "iterations": count,
        "iterations_saved": whole - count,
        "images_per_second": trained / seconds,
        "train_seconds": seconds,
        "step_seconds": step_seconds / count,
    }


def evaluate(step: Any, test: Dataset) -> dict[str, Any]:
    """The share of a data set that the step tells right."""
    batch, correct, began = step.batch, 0, perf_counter()
    for start in range(0, len(test), batch):
        images = test.normalise(test.images[start : start + batch])
        logits = np.asarray(step.predict(images.reshape(len(images), *step.input_shape[1:])))
        answers = np.where(np.isnan(logits).any(1), -1, logits.argmax(1))  # no number is the largest beside NaN
        correct += int(np.count_nonzero(answers == test.labels[start : start + batch]))
    return {"test_accuracy": correct / len(test), "evaluation_seconds": perf_counter() - began}


def _with_next(items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(item, the one after it or None)."""
    rest = iter(items)
    present = next(rest)
    for following in rest:
        yield present, following
        present = following
    yield present, None
