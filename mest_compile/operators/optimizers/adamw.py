"""AdamW: steps along the mean gradient over the root of the mean square gradient; weights decay apart from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.expressions import Variable, sqrt
from mest_compile.operators.optimizers.optimizer import Optimizer, optimizer

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
    """torch.optim.AdamW's rule: lr, betas, eps (outside the root), weight_decay (decoupled, on every parameter): 8
    bytes of state a live weight.

    Means are corrected for having begun at 0 by the number of updates of the whole step. A weight that a mutation grows
    begins with means 0 and that number, so it moves further at first than a weight at the first update: with the
    default betas 3.2 times lr, within a dozen updates up to 6.6 (ours; torch has no weights that begin later).
    Source: Loshchilov and Hutter, arXiv:1711.05101.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    state = ("exp_avg", "exp_avg_sq")
    scalars = ("rate", "kept", "beta1", "fresh1", "beta2", "fresh2", "unbiased", "eps")
    formula = FORMULA

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            object.__setattr__(self, name, checks.number(f"AdamW: {name}", getattr(self, name), error=SpecError))
        if not isinstance(self.betas, Sequence) or isinstance(self.betas, str) or len(self.betas) != 2:
            raise SpecError(f"AdamW: betas is {checks.shown(self.betas)}; wanted two numbers of 0 or more and below 1")
        betas = tuple(
            checks.number(f"AdamW: betas[{place}]", beta, below=1, error=SpecError)
            for place, beta in enumerate(self.betas)
        )
        object.__setattr__(self, "betas", betas)

    def hyper(self, count: int, lr: float) -> np.ndarray:
        beta1, beta2 = self.betas
        return np.array(
            [
                lr / (1 - beta1**count),
                1 - lr * self.weight_decay,
                beta1,
                1 - beta1,
                beta2,
                1 - beta2,
                (1 - beta2**count) ** -0.5,
                self.eps,
            ],
            np.float32,
        )
