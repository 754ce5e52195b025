"""Binary cross-entropy of logits: each output is a question of its own, with yes and no."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import InputError, SpecError
from mest_compile.ir.expressions import Expression, Variable, exp, log, maximum
from mest_compile.operators.losses.elementwise import ElementwiseLoss
from mest_compile.operators.losses.loss import LABELS, Shape, check_weights, loss, weights_of


@loss("bce")
@dataclass(frozen=True, slots=True)
class BCE(ElementwiseLoss):
    """torch.nn.BCEWithLogitsLoss's: the mean over all elements of -(p y log s + (1 - y) log(1 - s)), s the sigmoid of
    the output. Targets y (N, k) in [0, 1], or (N,) of one output.

    pos_weight  p, how much a yes counts beside a no: a number, or one for each output
    """

    pos_weight: float | tuple[float, ...] = 1.0

    metrics = ("f1", "label_accuracy")
    yes_or_no = True
    forgets = "all of an example's labels were right, and one of them is wrong now"

    def __post_init__(self) -> None:
        given: Any = self.pos_weight
        several = isinstance(given, Sequence) or getattr(given, "ndim", 0) > 0
        found = weights_of if several else lambda name, value: checks.number(name, value, error=SpecError)
        object.__setattr__(self, "pos_weight", found("BCE: pos_weight", given))

    def check(self, shape: Shape) -> None:
        check_weights("BCE: pos_weight", self.weights(), shape)

    def weights(self) -> tuple[float, ...] | None:
        return self.pos_weight if isinstance(self.pos_weight, tuple) else None

    def targets(self, *given: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
        found = ElementwiseLoss.targets(self, *given, shape=shape)
        flat = found[LABELS]
        if flat.size and (flat.min() < 0 or flat.max() > 1):
            raise InputError(
                f"targets go from {flat.min():g} to {flat.max():g}; mest.BCE takes 0 for no, 1 for yes, or what lies "
                "between"
            )
        return found

    def right(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return ((outputs > 0) == (targets.reshape(outputs.shape) > 0.5)).reshape(len(outputs), -1).all(1)

    @property
    def _yes(self) -> Expression:
        """What log(1 + exp(-z)) is multiplied by: 1 + (p - 1) y."""
        weight = self.pos_weight if isinstance(self.pos_weight, float) else Variable("weight")
        return 1 + (weight - 1) * Variable("target")

    @property
    def term(self) -> Expression:
        output, target = Variable("output"), Variable("target")
        return (1 - target) * output + self._yes * (log(1 + exp(0 - abs(output))) + maximum(0, 0 - output))

    @property
    def slope(self) -> Expression:  # the term's, whose parts have a kink each at 0
        return (1 - Variable("target")) - self._yes / (1 + exp(Variable("output")))
