"""Softmax cross-entropy of labels, with its gradient and which answers are right.

With label smoothing the label's class is wanted with 1 - smoothing, and all classes share the rest (Szegedy et al.,
arXiv:1512.00567).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.losses.loss import (
    LABELS,
    SCALES,
    WEIGHTS,
    Loss,
    Shape,
    answers,
    check_classes,
    check_weights,
    class_labels,
    loss,
    weights_of,
)


@dataclass(frozen=True, slots=True)
class SoftmaxCrossEntropy:
    """Kernel "loss.cross_entropy": logits (logits.elems,), labels (N * H * W,) int32, where `scaled` weights (classes,)
    and scales (2,), loss (1,), correct (N * H * W,) int32, dlogits (dlogits.elems,).

    correct[n] is 1 where the first largest logit is the label's; NaN is larger than any number. dlogits is 0 in lanes
    without an example.
    scaled  every class counts by its weight, labels of -1 do not count at all, and the sum over all answers is
            multiplied by scales[1], its gradient by scales[0]; else the loss is the mean
    """

    logits: Image
    dlogits: Image
    smoothing: float = 0.0
    scaled: bool = False


@loss("cross_entropy")
@dataclass(frozen=True, slots=True)
class CrossEntropy(Loss):
    """torch.nn.CrossEntropyLoss's, of labels (N,) int in [0, classes); of maps (N, H, W).

    smoothing     share of every label that is spread evenly over all classes, 0 <= share < 1
    weight        how much each class counts; None: all the same
    ignore_index  label of what does not count, -100 in torch; None: every label is a class. Where nothing counts the
                  loss is NaN and the gradient 0
    """

    smoothing: float = 0.0
    weight: tuple[float, ...] | None = None
    ignore_index: int | None = None

    kernel = "loss.cross_entropy"
    reads = (("labels", np.int64),)
    tells_correct = True
    metrics = ("accuracy", "top5")
    forgets = "the largest output was the label's, and is another one's now"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "smoothing", checks.number("CrossEntropy: smoothing", self.smoothing, below=1, error=SpecError)
        )
        object.__setattr__(self, "weight", weights_of("CrossEntropy: weight", self.weight))
        if self.ignore_index is not None:
            least = -(2**31)
            object.__setattr__(
                self,
                "ignore_index",
                checks.whole("CrossEntropy: ignore_index", self.ignore_index, least, ", or None", SpecError),
            )

    @property
    def ignored(self) -> int | None:
        return self.ignore_index

    @property
    def _scaled(self) -> bool:
        return self.weight is not None or self.ignore_index is not None

    def check(self, shape: Shape) -> None:
        check_classes(shape)
        check_weights("CrossEntropy: weight", self.weight, shape)

    def arrays(self, shape: Shape) -> dict[str, tuple[int, str]]:
        scaled = {WEIGHTS: (shape[1], "float32"), SCALES: (2, "float32")} if self._scaled else {}
        return {LABELS: (answers(shape), "int32"), **scaled}

    def targets(self, *given: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
        labels = class_labels(given[0], shape, self.ignore_index)
        if not self._scaled:
            return {LABELS: labels}
        counted = labels[labels >= 0]
        weight = float(len(counted)) if self.weight is None else float(np.array(self.weight)[counted].sum())
        with np.errstate(divide="ignore"):  # classes of weight 0 alone: NaN, as in torch
            scales = [0, np.nan] if not len(counted) else [np.divide(1.0, weight)] * 2
        return {LABELS: labels, SCALES: np.array(scales, np.float32)}

    def constants(self, shape: Shape) -> dict[str, np.ndarray]:
        weight = (1.0,) * shape[1] if self.weight is None else self.weight
        return {WEIGHTS: np.array(weight, np.float32)} if self._scaled else {}

    def problem(self, output: Image, gradient: Image) -> SoftmaxCrossEntropy:
        return SoftmaxCrossEntropy(output, gradient, self.smoothing, self._scaled)

    def reference(
        self, output: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> tuple[float, np.ndarray | None, np.ndarray]:
        scores = output.astype(np.float64)
        labels = np.moveaxis(arrays[LABELS].reshape(scores.shape[3], *scores.shape[1:3]), 0, -1)
        shifted = scores - scores.max(0)
        wanted = np.equal.outer(np.arange(len(scores)), labels) * (1 - self.smoothing) + self.smoothing / len(scores)
        wanted = wanted * arrays.get(WEIGHTS, np.ones(len(scores)))[:, None, None, None]
        forth, back = map(float, arrays.get(SCALES, np.full(2, 1 / labels.size)))
        # What is not wanted does not count, however small it is.
        chosen = np.where(wanted > 0, shifted * wanted, 0).sum(0)
        losses = np.log(np.exp(shifted).sum(0)) * wanted.sum(0) - chosen
        gradient = np.exp(shifted) / np.exp(shifted).sum(0) * wanted.sum(0) - wanted
        value = np.where(labels >= 0, losses, 0).sum() * back
        correct = np.moveaxis(scores.argmax(0) == labels, -1, 0)
        return float(value), correct, np.where(labels >= 0, gradient, 0) * forth


USUAL = CrossEntropy()  # what a step is compiled with that is told no other
