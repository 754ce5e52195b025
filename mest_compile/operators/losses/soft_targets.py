"""Softmax cross-entropy of distributions over classes: what its losses share.

They wish for a whole distribution instead of one class: soft labels as mixup and label guessing make them, or what a
teacher says, softened by a temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.losses.loss import LABELS, SOFT, Loss, Shape, answers, check_classes, spread_out


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """Kernel "loss.soft_targets": output (output.elems,), labels (N * H * W,) int32, wanted (N * classes * H * W,),
    loss (1,), correct (N * H * W,) int32, gradient (gradient.elems,).

    The loss is the mean over all answers of hard * (cross-entropy of the label) + soft * (that of `wanted`, at the
    temperature); with `divergence` less the entropy of `wanted`. What is wanted need not add up to 1. correct as
    "loss.cross_entropy" has it.
    """

    output: Image
    gradient: Image
    hard: float
    soft: float
    temperature: float
    divergence: bool


class SoftTargetsLoss(Loss):
    """Of labels and, for each class, how much it is wanted."""

    __slots__ = ()
    kernel = "loss.soft_targets"
    tells_correct = True
    metrics = ("accuracy", "top5")

    def check(self, shape: Shape) -> None:
        check_classes(shape)

    def arrays(self, shape: Shape) -> dict[str, tuple[int, str]]:
        return {LABELS: (answers(shape), "int32"), SOFT: (prod(shape), "float32")}

    def reference(
        self, output: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> tuple[float, np.ndarray | None, np.ndarray]:
        problem = self.problem(Image(*output.shape), Image(*output.shape))
        scores = output.astype(np.float64)
        wanted = spread_out(arrays[SOFT].astype(np.float64), output)
        labels = np.moveaxis(arrays[LABELS].reshape(scores.shape[3], *scores.shape[1:3]), 0, -1)
        shifted = scores - scores.max(0)
        losses, gradient = np.zeros(labels.shape), np.zeros(scores.shape)
        if problem.hard:
            chosen = np.equal.outer(np.arange(len(scores)), labels)
            losses += problem.hard * (np.log(np.exp(shifted).sum(0)) - np.where(chosen, shifted, 0).sum(0))
            gradient += problem.hard * (np.exp(shifted) / np.exp(shifted).sum(0) - chosen)
        if problem.soft:
            mild = shifted / problem.temperature
            parts = np.where(wanted != 0, mild * wanted, 0).sum(0)
            if problem.divergence:
                parts -= np.where(wanted > 0, wanted * np.log(np.where(wanted > 0, wanted, 1)), 0).sum(0)
            losses += problem.soft * (np.log(np.exp(mild).sum(0)) * wanted.sum(0) - parts)
            share = np.exp(mild) / np.exp(mild).sum(0) * wanted.sum(0)
            gradient += problem.soft / problem.temperature * (share - wanted)
        correct = np.moveaxis(scores.argmax(0) == labels, -1, 0)
        return float(losses.mean()), correct, gradient / labels.size
