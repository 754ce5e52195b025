"""What a trainer asks of its step's loss: what to give it, how good the answers were, which examples were right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mest_compile.base.errors import InputError, UsageError
from mest_compile.data import Dataset, Stream
from mest_compile.operators.losses.distill import Distill
from mest_compile.operators.losses.loss import Loss
from mest_compile.training.metrics import Metric, Score, compared, metrics_of
from mest_compile.training.recipe import Recipe

Teacher = Callable[[np.ndarray], np.ndarray]  # images (N, C, H, W) float32 -> logits, as step.predict


def check_targets(loss: Loss, data: Dataset | Stream, shape: tuple[int, ...]) -> None:
    """Raises InputError when the loss cannot take the labels of `data` for outputs of that shape."""
    beside = [np.zeros(shape, np.float32)] * (len(loss.reads) - 1)  # a teacher's logits, which nobody has asked for yet
    try:
        loss.targets(data.labels, *beside, shape=shape)
    except InputError as problem:
        raise InputError(f"{data.name}: {problem}") from problem


class Judge:
    """metrics: of the loss, the first decides which model is best; shape: of outputs, the batch first.

    latest  whether of models that are equally good the last is the best, as where few examples tell few apart
    """

    def __init__(self, loss: Loss, output_shape: tuple[int, ...], recipe: Recipe, teacher: Teacher | None):
        """Raises UsageError for a recipe or a teacher of which the loss has no use, or a lacking one."""
        self.loss, self.shape, self._teacher = loss, output_shape, teacher
        self.metrics = metrics_of(loss, output_shape[1])
        self.latest = False
        self._train_score = Score([])
        self.restart()
        called = f"mest.{type(loss).__name__}"
        if (teacher is None) == isinstance(loss, Distill):
            raise UsageError(
                f"{called} needs a teacher: give the Trainer teacher=..., a function from images to logits, such as "
                "another step's predict"
                if teacher is None
                else f"a teacher is for loss=mest.Distill(...), the step has {called}; leave one of the two out"
            )
        if not callable(teacher) and teacher is not None:
            raise UsageError(
                f"teacher is a {type(teacher).__name__}; wanted a function from images to logits, such as another "
                "step's predict"
            )
        maps = len(output_shape) > 2
        if recipe.sieve and (not loss.forgets or maps):
            why = "an example's map of labels is hardly ever all right" if maps else "no answer is right or wrong"
            raise UsageError(
                f"the sieve drops examples by forgetting events, from right to wrong, and under {called} {why}; leave "
                "the sieve out"
            )
        if recipe.augments and maps:
            raise UsageError(
                "augmentation shifts images, and would have to shift their maps of labels too; set augment = false in "
                "the recipe"
            )

    @property
    def main(self) -> Metric:
        return self.metrics[0]

    def improves(self, score: float | None, best: float | None) -> bool:
        """Whether a model of that score is the best. None: it was not evaluated, or there was none before."""
        if score is None or best is None:
            return score is not None
        return self.main.better(score, best) or (self.latest and score == best)

    def given(self, images: np.ndarray, labels: np.ndarray) -> Any:
        """What the step takes with a batch of images."""
        return labels if self._teacher is None else (labels, self._teacher(images))

    def check(self, data: Dataset | Stream) -> None:
        """Raises InputError when the loss cannot take its labels."""
        shape = (len(data.labels), *self.shape[1:])
        if data.numbers != self.loss.takes_numbers:
            raise InputError(
                f"{data.name} has {'numbers' if data.numbers else 'classes'}, mest.{type(self.loss).__name__} takes "
                f"{'numbers' if self.loss.takes_numbers else 'classes'}; give other data, or another loss"
            )
        if not self.loss.takes_numbers and data.classes > shape[1]:
            raise InputError(
                f"the step tells {shape[1]} classes apart, {data.name} has {data.classes}; "
                f"give the model as many outputs"
            )
        check_targets(self.loss, data, shape)

    def restart(self) -> None:
        """Begins a new epoch."""
        self._train_score, self._right = Score(self.metrics), np.zeros(2)

    def count(self, result: Any, labels: np.ndarray) -> float:
        """Adds a step's result to the epoch; gives the main metric of the batch."""
        if self.loss.tells_correct:
            counted = compared(self.loss, labels) >= 0
            right = np.array([np.count_nonzero(result.correct), np.count_nonzero(counted)], np.float64)
            self._right += right
            return self.main.value(right)
        self._train_score.add(result.outputs, labels)
        return self.main.value(self.main.sums(result.outputs, labels))

    def trained(self) -> dict[str, float]:
        """Metrics of the epoch's training steps."""
        if self.loss.tells_correct:
            return {f"train_{self.main.name}": self.main.value(self._right)}
        return self._train_score.values("train_")

    def right(self, result: Any, labels: np.ndarray) -> np.ndarray:
        """(N,) bool, which examples were answered rightly, for the sieve."""
        found = result.correct if self.loss.tells_correct else self.loss.right(result.outputs, labels)
        assert found is not None, "a loss that says what forgetting is says what is right"
        return found

    def tested(self, batches: Any, part: str = "test") -> dict[str, float]:
        """Metrics of (outputs, labels) of batches, called after the part of the data that they are of."""
        score = Score(self.metrics)
        for outputs, labels in batches:
            score.add(outputs, compared(self.loss, labels))
        return score.values(f"{part}_")
