"""Adam: steps along the mean gradient over the root of the mean square gradient; weight decay is part of the
gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from mest_compile.ir.expressions import Variable, sqrt
from mest_compile.operators.optimizers.adamw import adam_scalars
from mest_compile.operators.optimizers.optimizer import Optimizer, Rule, betas_of, optimizer

values, gradients, exp_avg, exp_avg_sq = map(Variable, ("values", "gradients", "exp_avg", "exp_avg_sq"))
rate, decay, beta1, fresh1, beta2, fresh2, unbiased, eps = map(
    Variable, ("rate", "decay", "beta1", "fresh1", "beta2", "fresh2", "unbiased", "eps")
)
gradient, mean, square = map(Variable, ("gradient", "mean", "square"))
FORMULA = {
    "gradient": gradients + decay * values,
    "mean": beta1 * exp_avg + fresh1 * gradient,
    "exp_avg": mean,
    "square": beta2 * exp_avg_sq + fresh2 * (gradient * gradient),
    "exp_avg_sq": square,
    "values": values - rate * mean / (unbiased * sqrt(square) + eps),
}


@optimizer("adam")
@dataclass(frozen=True, slots=True)
class Adam(Optimizer):
    """torch.optim.Adam's rule: lr, betas, eps (outside the root), weight_decay (L2, part of the gradient): 8 bytes of
    state a live weight. Means of weights that a mutation grows are as mest.AdamW's.

    Source: Kingma and Ba, arXiv:1412.6980.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    rules: ClassVar[Mapping[str, Rule]] = {
        "adam": Rule(
            ("exp_avg", "exp_avg_sq"),
            ("rate", "decay", "beta1", "fresh1", "beta2", "fresh2", "unbiased", "eps"),
            FORMULA,
        )
    }
    torch = (
        "Adam",
        {"lr": "lr", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"},
        {"amsgrad": False, "maximize": False, "decoupled_weight_decay": False},
    )

    def __post_init__(self) -> None:
        self.check(below=dict.fromkeys(("lr", "eps", "weight_decay"), inf))
        object.__setattr__(self, "betas", betas_of("Adam", self.betas))

    def hyper(self, count: int, lr: float) -> np.ndarray:
        return np.array(adam_scalars(self.betas, self.eps, count, lr, self.weight_decay), np.float32)
