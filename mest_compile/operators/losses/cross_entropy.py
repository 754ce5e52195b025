"""Softmax cross-entropy, mean over the batch, with its gradient and which examples are right.

With label smoothing the label's class is wanted with 1 - smoothing, and all classes share the rest (Szegedy et al.,
arXiv:1512.00567).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import InputError, SpecError
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.losses.loss import Loss, loss


@dataclass(frozen=True, slots=True)
class SoftmaxCrossEntropy:
    """Kernel "loss.cross_entropy": logits (logits.elems,), labels (N,) int32, loss (1,), correct (N,) int32, dlogits
    (dlogits.elems,).

    correct[n] is 1 where the first largest logit is the label's; NaN is larger than any number. dlogits is 0 in lanes
    without an example.
    """

    logits: Image
    dlogits: Image
    smoothing: float = 0.0


@loss("cross_entropy")
@dataclass(frozen=True, slots=True)
class CrossEntropy(Loss):
    """torch.nn.CrossEntropyLoss's, of labels (N,) int in [0, classes).

    smoothing  share of every label that is spread evenly over all classes, 0 <= share < 1
    """

    smoothing: float = 0.0

    kernel = "loss.cross_entropy"
    reads = np.int64
    dtype = "int32"
    tells_correct = True

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "smoothing", checks.number("CrossEntropy: smoothing", self.smoothing, below=1, error=SpecError)
        )

    def check(self, shape: tuple[int, int]) -> None:
        if shape[1] < 2:
            raise SpecError(
                "the model gives one logit: softmax cross-entropy over one class is 0 for ever. Give it an "
                "output for each "
                "class; 2 of them for yes and no are binary cross-entropy of their difference. For a number "
                "compile with "
                "loss=mest.MSE()"
            )

    def target_elems(self, shape: tuple[int, int]) -> int:
        return shape[0]

    def targets(self, given: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        batch, classes = shape
        if given.shape != (batch,):
            raise InputError(f"labels have shape {given.shape}; wanted ({batch},)")
        if given.min() < 0 or given.max() >= classes:
            raise InputError(f"labels go from {given.min()} to {given.max()}; the model has classes 0 to {classes - 1}")
        return given.astype(np.int32)

    def problem(self, output: Image, gradient: Image) -> SoftmaxCrossEntropy:
        return SoftmaxCrossEntropy(output, gradient, self.smoothing)

    def reference(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray | None, np.ndarray]:
        scores = output.astype(np.float64)[:, 0, 0]
        shifted = scores - scores.max(0)
        wanted = (np.arange(len(scores))[:, None] == targets) * (1 - self.smoothing) + self.smoothing / len(scores)
        chosen = np.where(wanted > 0, shifted * wanted, 0).sum(
            0
        )  # what is not wanted does not count, however small it is
        value = (np.log(np.exp(shifted).sum(0)) - chosen).mean()
        gradient = (np.exp(shifted) / np.exp(shifted).sum(0) - wanted) / len(targets)
        return float(value), scores.argmax(0) == targets, gradient[:, None, None]


USUAL = CrossEntropy()  # what a step is compiled with that is told no other
