"""AdamW: steps along the mean gradient over the root of the mean square gradient; weights decay apart from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from mest_compile.ir.expressions import Variable, sqrt
from mest_compile.operators.optimizers.optimizer import Optimizer, Rule, betas_of, optimizer

values, gradients, exp_avg, exp_avg_sq = map(Variable, ("values", "gradients", "exp_avg", "exp_avg_sq"))
rate, kept, beta1, fresh1, beta2, fresh2, unbiased, eps = map(
    Variable, ("rate", "kept", "beta1", "fresh1", "beta2", "fresh2", "unbiased", "eps")
)
mean, square = Variable("mean"), Variable("square")
FORMULA = {
    "mean": beta1 * exp_avg + fresh1 * gradients,
    "exp_avg": mean,
    "square": beta2 * exp_avg_sq + fresh2 * (gradients * gradients),
    "exp_avg_sq": square,
    "values": kept * values - rate * mean / (unbiased * sqrt(square) + eps),
}


@optimizer("adamw")
@dataclass(frozen=True, slots=True)
class AdamW(Optimizer):
    """torch.optim.AdamW's rule: lr, betas, eps (outside the root), weight_decay (decoupled): 8 bytes
    of state a live weight.

    Means are corrected for having begun at 0 by the number of updates of the whole step. A weight that a mutation grows
    begins with means 0 and that number, so it moves further at first than a weight at the first update: with the
    default betas 3.2 times lr, within a dozen updates up to 6.6 (ours; torch has no weights that begin later).
    Source: Loshchilov and Hutter, arXiv:1711.05101.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    rules: ClassVar[Mapping[str, Rule]] = {
        "adamw": Rule(
            ("exp_avg", "exp_avg_sq"),
            ("rate", "kept", "beta1", "fresh1", "beta2", "fresh2", "unbiased", "eps"),
            FORMULA,
        )
    }
    torch = (
        "AdamW",
        {"lr": "lr", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"},
        {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True},
    )

    def __post_init__(self) -> None:
        self.check(below=dict.fromkeys(("lr", "eps", "weight_decay"), inf))
        object.__setattr__(self, "betas", betas_of("AdamW", self.betas))

    def hyper(self, count: int, lr: float) -> np.ndarray:
        return np.array(adam_scalars(self.betas, self.eps, count, lr, 1 - lr * self.weight_decay), np.float32)


def adam_scalars(betas: tuple[float, float], eps: float, count: int, lr: float, decay: float) -> list[float]:
    """(rate, decay, beta1, 1 - beta1, beta2, 1 - beta2, what makes the root of the mean square unbiased, eps)."""
    beta1, beta2 = betas
    return [lr / (1 - beta1**count), decay, beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**count) ** -0.5, eps]
