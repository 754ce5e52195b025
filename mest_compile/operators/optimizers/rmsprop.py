"""RMSprop: steps along the gradient over the root of its mean square."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.expressions import Expression, Variable, maximum, sqrt
from mest_compile.operators.optimizers.optimizer import Optimizer, Rule, optimizer

values, gradients, square_avg, grad_avg, momentum_buffer = map(
    Variable, ("values", "gradients", "square_avg", "grad_avg", "momentum_buffer")
)
lr, decay, alpha, fresh, eps, share = map(Variable, ("lr", "decay", "alpha", "fresh", "eps", "share"))
gradient, square, average, moved = map(Variable, ("gradient", "square", "average", "moved"))


def _rule(momentum: bool, centered: bool) -> Rule:
    formula: dict[str, Expression] = {
        "gradient": gradients + decay * values,
        "square": alpha * square_avg + fresh * (gradient * gradient),
        "square_avg": square,
    }
    spread: Expression = square
    if centered:
        formula |= {"average": alpha * grad_avg + fresh * gradient, "grad_avg": average}
        spread = maximum(0, square - average * average)  # below 0 by rounding alone
    step: Expression = gradient / (sqrt(spread) + eps)
    if momentum:
        formula |= {"moved": share * momentum_buffer + step, "momentum_buffer": moved}
        step = moved
    formula["values"] = values - lr * step
    state = ("square_avg", *(["grad_avg"] if centered else []), *(["momentum_buffer"] if momentum else []))
    return Rule(state, ("lr", "decay", "alpha", "fresh", "eps", *(["share"] if momentum else [])), formula)


@optimizer("rmsprop")
@dataclass(frozen=True, slots=True)
class RMSprop(Optimizer):
    """torch.optim.RMSprop's rule: lr, alpha, eps (outside the root), weight_decay (L2), momentum, centered. 4 bytes of
    state a live weight, 4 more with momentum, 4 more centered.

    Source: Hinton's lecture 6 of "Neural Networks for Machine Learning"; centered: Graves, arXiv:1308.0850.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    rules: ClassVar[Mapping[str, Rule]] = {
        "rmsprop": _rule(False, False),
        "rmsprop:momentum": _rule(True, False),
        "rmsprop:centered": _rule(False, True),
        "rmsprop:centered momentum": _rule(True, True),
    }
    torch = (
        "RMSprop",
        {name: name for name in ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")},
        {"maximize": False},
    )

    def __post_init__(self) -> None:
        self.check(below={"lr": inf, "alpha": 1.0, "eps": inf, "weight_decay": inf, "momentum": 1.0})
        checks.flag("RMSprop: centered", self.centered, error=SpecError)

    @property
    def rule_name(self) -> str:
        variant = " ".join(name for name in ("centered", "momentum") if getattr(self, name))
        return f"rmsprop:{variant}" if variant else "rmsprop"

    def hyper(self, count: int, lr: float) -> np.ndarray:
        share = [self.momentum] if self.momentum else []
        return np.array([lr, self.weight_decay, self.alpha, 1 - self.alpha, self.eps, *share], np.float32)
