"""Stochastic gradient descent, with momentum or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.expressions import Variable, select
from mest_compile.operators.optimizers.optimizer import Optimizer, Rule, optimizer

values, gradients, momentum = map(Variable, ("values", "gradients", "momentum"))
lr, share, decay, nesterov = map(Variable, ("lr", "share", "decay", "nesterov"))
gradient, moved = Variable("gradient"), Variable("moved")
FORMULA = {
    "gradient": gradients + decay * values,
    "moved": share * momentum + gradient,
    "momentum": moved,
    "values": values - lr * select(nesterov > 0, gradient + share * moved, moved),
}
PLAIN, PLAIN_FORMULA = "sgd:plain", {"values": values - lr * (gradients + decay * values)}


@optimizer("sgd")
@dataclass(frozen=True, slots=True)
class SGD(Optimizer):
    """torch.optim.SGD's rule: lr, momentum, weight_decay (L2), nesterov. A first step starts from momentum 0. 4 bytes
    of state a live weight, none without momentum."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False

    rules: ClassVar[Mapping[str, Rule]] = {
        "sgd": Rule(("momentum",), ("lr", "share", "decay", "nesterov"), FORMULA),
        PLAIN: Rule((), ("lr", "decay"), PLAIN_FORMULA),
    }
    torch = (
        "SGD",
        {"lr": "lr", "momentum": "momentum", "weight_decay": "weight_decay", "nesterov": "nesterov"},
        {"dampening": 0, "maximize": False},
    )

    def __post_init__(self) -> None:
        self.check(below={"lr": inf, "momentum": 1.0, "weight_decay": inf})
        checks.flag("SGD: nesterov", self.nesterov, error=SpecError)
        if self.nesterov and self.momentum == 0:
            raise SpecError("nesterov needs a momentum above 0")

    @property
    def rule_name(self) -> str:
        return "sgd" if self.momentum else PLAIN

    def hyper(self, count: int, lr: float) -> np.ndarray:
        if not self.momentum:
            return np.array([lr, self.weight_decay], np.float32)
        return np.array([lr, self.momentum, self.weight_decay, self.nesterov], np.float32)


USUAL = SGD()  # what a step is compiled with that is told no other
