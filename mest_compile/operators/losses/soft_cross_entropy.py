"""Softmax cross-entropy of soft labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import InputError, SpecError
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.losses.loss import (
    LABELS,
    SOFT,
    Shape,
    check_classes,
    check_weights,
    loss,
    numbers,
    weights_of,
)
from mest_compile.operators.losses.soft_targets import SoftTargets, SoftTargetsLoss


@loss("soft_cross_entropy")
@dataclass(frozen=True, slots=True)
class SoftCrossEntropy(SoftTargetsLoss):
    """torch.nn.CrossEntropyLoss's of probabilities (N, classes), as mixup makes them: the mean over all examples, the
    weights not in the denominator. An answer is right where the largest output is the most probable class.

    smoothing  share of every label that is spread evenly over all classes, 0 <= share < 1
    weight     how much each class counts; None: all the same
    """

    smoothing: float = 0.0
    weight: tuple[float, ...] | None = None

    reads = (("labels", np.float32),)
    forgets = "the largest output was the most probable class, and is another one now"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "smoothing", checks.number("SoftCrossEntropy: smoothing", self.smoothing, below=1, error=SpecError)
        )
        object.__setattr__(self, "weight", weights_of("SoftCrossEntropy: weight", self.weight))

    def check(self, shape: Shape) -> None:
        check_classes(shape)
        check_weights("SoftCrossEntropy: weight", self.weight, shape)

    def targets(self, *given: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
        shares = numbers(given[0], shape, "labels", "SoftCrossEntropy").reshape(shape)
        if shares.size and shares.min() < 0:
            raise InputError(f"labels go down to {shares.min():g}; mest.SoftCrossEntropy takes probabilities")
        weight = np.ones(shape[1]) if self.weight is None else np.array(self.weight)
        wanted = (shares * (1 - self.smoothing) + self.smoothing / shape[1]) * weight.reshape(-1, *[1] * len(shape[2:]))
        return {LABELS: shares.argmax(1).astype(np.int32).ravel(), SOFT: wanted.astype(np.float32).ravel()}

    def problem(self, output: Image, gradient: Image) -> SoftTargets:
        return SoftTargets(output, gradient, 0.0, 1.0, 1.0, False)
