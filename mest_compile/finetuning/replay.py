"""What a fine-tuning keeps of its examples, so that later ones do not forget them: a few of each class, as the frozen
part of the net gives them, which no later task changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import BudgetError, StateError
from mest_compile.data import Dataset, Split
from mest_compile.runtime import checkpoint

PARTS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Examples:
    """images (n, C, H, W): features float32, or pixels uint8 where the whole net trains; labels (n,) int64; tasks (n,)
    int64, the number of the task that each came with."""

    images: np.ndarray
    labels: np.ndarray
    tasks: np.ndarray

    @classmethod
    def of(cls, data: Dataset, task: int) -> Examples:
        return cls(np.asarray(data.images), data.labels, np.full(len(data), task))

    def at(self, places: np.ndarray) -> Examples:
        return Examples(self.images[places], self.labels[places], self.tasks[places])

    def first(self, count: int) -> Examples:
        """At most `count`, one of each class at least: the first ones of each, as many of each as can be."""
        classes = np.unique(self.labels)
        places = [np.flatnonzero(self.labels == one)[: max(1, count // len(classes))] for one in classes]
        return self.at(np.concatenate(places)) if places else self

    def joined(self, others: Examples) -> Examples:
        return Examples(
            *(np.concatenate([getattr(self, name), getattr(others, name)]) for name in ("images", "labels", "tasks"))
        )


@dataclass(frozen=True, slots=True)
class Replay:
    """train, val, test  what is kept of the examples of all tasks so far, of each class the best ones first
    told  of each task: "classes", names of those it came with, and "learnt", the accuracy on what is kept of its test
          part when it had been trained
    """

    train: Examples
    val: Examples
    test: Examples
    told: tuple[Mapping[str, Any], ...]

    def write(self, path: Path) -> None:
        """Raises StateError where the file cannot be written."""
        arrays = {f"{part}.{name}": getattr(getattr(self, part), name) for part in PARTS for name in Examples.__slots__}
        checkpoint.write(path, arrays, {"tasks": [dict(one) for one in self.told]})

    @classmethod
    def read(cls, path: Path) -> Replay:
        """Raises StateError."""
        arrays, facts = checkpoint.read(path)
        try:
            train, val, test = (Examples(*(arrays[f"{part}.{name}"] for name in Examples.__slots__)) for part in PARTS)
            return cls(train, val, test, tuple(facts["tasks"]))
        except KeyError as problem:
            raise StateError(f"{path} lacks {problem}; it is of another version of mest-compile") from problem


def herded(features: np.ndarray, count: int) -> np.ndarray:
    """Places of `count` examples, or all there are, so that the mean of the first ones is near the mean of all, however
    many they are. features: (n, k). Source: iCaRL, arXiv:1611.07725, algorithm 4."""
    features = features.astype(np.float64)
    wanted, left = features.mean(0), np.ones(len(features), bool)
    chosen, total = [], np.zeros(features.shape[1])
    for number in range(1, min(count, len(features)) + 1):
        distance = np.square(wanted - (total + features) / number).sum(1)
        best = int(np.where(left, distance, np.inf).argmin())
        chosen.append(best)
        left[best] = False
        total += features[best]
    return np.array(chosen, np.int64)


def kept(
    before: Replay | None, new: Split, classes: int, budget_bytes: int, task: int, seed: int
) -> tuple[Examples, Examples, Examples]:
    """(training, validation, test) examples to keep: as many of each class, so many as fit into the budget; the others
    into as much again each.

    Of classes that came with new examples these are chosen by herding, others than to train on are drawn; the others
    keep the first of theirs. Raises BudgetError where there is no room for one of each.
    """
    room = budget_bytes // (new.train.images[0].nbytes * classes)
    if budget_bytes and not room:
        raise BudgetError(
            f"{budget_bytes} bytes do not hold an example of each of {classes} classes, which have "
            f"{new.train.images[0].nbytes} bytes; give the buffer more, or 0 to keep nothing"
        )
    rng, found = np.random.default_rng([seed, task]), []
    for name, data in zip(PARTS, (new.train, new.val, new.test)):
        there = Examples.of(new.train, task).at(np.arange(0)) if data is None else Examples.of(data, task)
        fresh = set(there.labels.tolist())
        if before is not None:
            there = getattr(before, name).joined(there)
        places = []
        for label in range(classes):
            mine = np.flatnonzero(there.labels == label)
            if name == "train" and label in fresh:
                mine = mine[herded(there.images[mine].reshape(len(mine), -1), room)]
            elif label in fresh:
                mine = rng.permutation(mine)
            places.append(mine[:room])
        found.append(there.at(np.concatenate(places)))
    return found[0], found[1], found[2]


def mixed(new: Split, before: Replay) -> Split:
    """New examples and those that are replayed, which are repeated until there are as many: half of every batch, on
    average. The other parts stay once each, the new ones first."""
    count = max(len(before.train.labels), len(new.train)) if len(before.train.labels) else 0
    again = before.train.at(np.resize(np.arange(len(before.train.labels)), count))

    def joined(data: Dataset, others: Examples) -> Dataset:
        return replace(
            data,
            images=np.concatenate([data.images, others.images]),
            labels=np.concatenate([data.labels, others.labels]),
        )

    val = new.val
    if val is not None:
        val = joined(val, before.val)
    elif len(before.val.labels):
        val = replace(new.test, images=before.val.images, labels=before.val.labels, name="pictures validation")
    return Split(joined(new.train, again), joined(new.test, before.test), val)


def told_of(tasks: Sequence[Mapping[str, Any]], right: np.ndarray, of_task: np.ndarray) -> list[dict[str, Any]]:
    """What each task is told by: its classes, accuracy when it was learnt and now, and what was forgotten in between.

    right, of_task  of test examples: whether the answer is right, and the number of its task
    """
    found = []
    for number, task in enumerate(tasks):
        mine = right[of_task == number]
        now = float(mine.mean()) if mine.size else None
        learnt = task.get("learnt", now)
        forgotten = None if now is None or learnt is None else learnt - now
        found.append({"classes": list(task["classes"]), "learnt": learnt, "accuracy": now, "forgotten": forgotten})
    return found
