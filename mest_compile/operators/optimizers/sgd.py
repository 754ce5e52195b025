"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.expressions import Variable, select
from mest_compile.operators.optimizers.optimizer import Optimizer, optimizer

values, gradients, momentum = map(Variable, ("values", "gradients", "momentum"))
lr, share, decay, nesterov = map(Variable, ("lr", "share", "decay", "nesterov"))
gradient, moved = Variable("gradient"), Variable("moved")
FORMULA = {
    "gradient": gradients + decay * values,
    "moved": share * momentum + gradient,
    "momentum": moved,
    "values": values - lr * select(nesterov > 0, gradient + share * moved, moved),
}


@optimizer("sgd")
@dataclass(frozen=True, slots=True)
class SGD(Optimizer):
    """torch.optim.SGD's rule: lr, momentum, weight_decay (L2, on every parameter), nesterov. A first step starts from
    momentum 0."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False

    state = ("momentum",)
    scalars = ("lr", "share", "decay", "nesterov")
    formula = FORMULA

    def __post_init__(self) -> None:
        for name, below in (("lr", inf), ("momentum", 1.0), ("weight_decay", inf)):
            object.__setattr__(
                self, name, checks.number(f"SGD: {name}", getattr(self, name), below=below, error=SpecError)
            )
        checks.flag("SGD: nesterov", self.nesterov, error=SpecError)
        if self.nesterov and self.momentum == 0:
            raise SpecError("nesterov needs a momentum above 0")

    def hyper(self, count: int, lr: float) -> np.ndarray:
        return np.array([lr, self.momentum, self.weight_decay, self.nesterov], np.float32)


USUAL = SGD()  # what a step is compiled with that is told no other
