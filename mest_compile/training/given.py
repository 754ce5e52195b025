"""What a run trains on, is chosen by and is tested on, as the caller gave it and as the step and the recipe take it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mest_compile.base.errors import InputError, UsageError
from mest_compile.data import Dataset, Stream, as_dataset
from mest_compile.data.examples import Array, Examples
from mest_compile.models.inputs import Reading
from mest_compile.training.fitting import check_data
from mest_compile.training.judging import Judge
from mest_compile.training.recipe import Recipe

Data = Dataset | Stream


@dataclass(frozen=True, slots=True)
class Given:
    """train with `shift` and `flip` as its images are augmented; test, val: None where there is none."""

    train: Data
    test: Data | None = None
    val: Data | None = None

    @property
    def augment(self) -> bool:
        return isinstance(self.train, Dataset) and (self.train.shift or self.train.flip)

    @property
    def judging(self) -> dict[str, Data]:
        """{prefix of its metrics: data}, those that choose the best model first."""
        return {name: data for name, data in (("val", self.val), ("test", self.test)) if data is not None}

    @property
    def chooses(self) -> str:
        """The part that the best model is chosen by."""
        return next(iter(self.judging), "test")

    def describe(self) -> dict[str, Any]:
        return {"train": self.train.describe()} | {name: data.describe() for name, data in self.judging.items()}

    def reading(self, before: Reading | None) -> Reading:
        """Of the training data; what that does not say as it was said before."""
        mine = self.train.reading
        if before is None:
            return mine
        classes = mine.classes if self.train.names or not before.classes else before.classes
        return Reading(classes, mine.inputs or before.inputs)

    def about(self) -> str:
        """What there is of it, and what the images go through."""
        counts = [f"{len(self.train)} examples to train"]
        counts += [] if self.val is None else [f"{len(self.val)} to choose the best model by"]
        counts += [] if self.test is None else [f"{len(self.test)} to test"]
        return f"{self.train.name}: {', '.join(counts)}; images {self._changes()}"

    def _changes(self) -> str:
        if isinstance(self.train, Stream):
            return "as the loader gives them, not augmented here"
        if not self.augment:
            return "not augmented"
        shifted = f"shifted by up to {self.train.pad} pixels" if self.train.shift else "not shifted"
        return f"{shifted}, {'' if self.train.flip else 'not '}mirrored"

    def batch(self, step: Any, judge: Judge, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
        """Images of a batch to train on, drawn by `rng` and not augmented, and what the step takes with them."""
        if isinstance(self.train, Stream):
            images, labels, _ = next(self.train.epoch(step.batch))
        else:
            chosen = rng.choice(len(self.train), step.batch, replace=len(self.train) < step.batch)
            images, labels = self.train.normalise(self.train.images[chosen]), self.train.labels[chosen]
        images = images.reshape(step.input_shape)
        return images, judge.given(images, labels)


def given(step: Any, judge: Judge, recipe: Recipe, train_set: Any, test_set: Any, val_set: Any) -> Given:
    """Raises DataError, InputError where data do not fit the step, UsageError where they do not fit the recipe."""
    kind = judge.loss.labels
    train = _read(train_set, "training set", step, kind)
    like = train if isinstance(train, Dataset) else None
    test = None if test_set is None else _read(test_set, "test set", step, kind, like)
    val = None if val_set is None else _read(val_set, "validation set", step, kind, like)
    for data in (train, test, val):
        if data is not None:
            check_data(step, judge, data)
    if len(train) < step.batch and recipe.drop_last:
        raise InputError(
            f"{train.name}: {len(train)} examples do not fill one batch of {step.batch}; compile with a smaller one"
        )
    if isinstance(train, Stream):
        if recipe.sieve:
            raise UsageError(
                f"the sieve drops examples, and {train.name} comes in batches without saying which are in them; give "
                "the data set itself, or leave the sieve out"
            )
        if recipe.augments:
            raise UsageError(
                f"{train.name} comes from a loader, whose own transforms augment it; leave augment and mirror out"
            )
        return Given(train, test, val)
    images = (
        len(step.input_shape) != 3 and len(judge.shape) == 2
    )  # series have no rows, and maps would have to move too
    shift, mirror = recipe.augmentation(train.shift and images, train.flip and images)
    return Given(replace(train, shift=shift, flip=mirror), test, val)


def _read(data: Any, name: str, step: Any, kind: dict[str, Any], like: Dataset | None = None) -> Data:
    """A Stream of what can only be gone through and of a list of batches, else a Dataset, whose pixels are scaled as
    the step's were before."""
    held = isinstance(data, Dataset | Examples | tuple) and not _of_batches(data)
    if not held and isinstance(data, Iterable):
        return Stream(data, name, classes=step.classes, **kind)
    found = as_dataset(data, classes=step.classes, like=like, name=name, **kind)
    return found.scaled_as(step.reading)


def _of_batches(data: Any) -> bool:
    """Whether it is a list of pairs of images and as many labels, not one of examples."""
    if not isinstance(data, list) or not data or not isinstance(data[0], tuple | list) or len(data[0]) != 2:
        return False
    return all(isinstance(part, Array) and len(part.shape) > 0 for part in data[0]) and len(data[0][0]) == len(
        data[0][1]
    )
