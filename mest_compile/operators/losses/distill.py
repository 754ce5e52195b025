"""Distillation: a teacher's outputs, softened, beside the labels. Source: Hinton et al., arXiv:1503.02531."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.losses.loss import LABELS, SOFT, Shape, class_labels, loss, numbers
from mest_compile.operators.losses.soft_targets import SoftTargets, SoftTargetsLoss


@loss("distill")
@dataclass(frozen=True, slots=True)
class Distill(SoftTargetsLoss):
    """(1 - mix) times the cross-entropy of labels (N,), and mix times T^2 times the divergence of softmax(output / T)
    from softmax(teacher / T): torch's cross_entropy and kl_div(reduction="batchmean"). Targets are a pair, labels and
    the teacher's logits (N, classes); a Trainer asks its `teacher`.

    temperature  T, above 0: how soft
    mix          share of the teacher, 0 to 1
    """

    temperature: float = 4.0
    mix: float = 0.5

    reads = (("labels", np.int64), ("the teacher's logits", np.float32))
    forgets = "the largest output was the label's, and is another one's now"

    def __post_init__(self) -> None:
        for name in ("temperature", "mix"):
            object.__setattr__(self, name, checks.number(f"Distill: {name}", getattr(self, name), error=SpecError))
        if self.temperature == 0:
            raise SpecError("Distill: temperature is 0; wanted a number above 0")
        if self.mix > 1:
            raise SpecError(f"Distill: mix is {self.mix:g}; wanted a share of the teacher from 0 to 1")

    def targets(self, *given: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
        labels = class_labels(given[0], shape)
        logits = numbers(given[1], shape, "the teacher's logits", "Distill").reshape(shape)
        mild = logits.astype(np.float64) / self.temperature
        shares = np.exp(mild - mild.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        return {LABELS: labels, SOFT: shares.astype(np.float32).ravel()}

    def problem(self, output: Image, gradient: Image) -> SoftTargets:
        return SoftTargets(output, gradient, 1 - self.mix, self.mix * self.temperature**2, self.temperature, True)
