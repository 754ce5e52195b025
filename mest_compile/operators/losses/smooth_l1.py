"""Smooth L1: a parabola near the target, a straight line further away."""

from __future__ import annotations

from dataclasses import dataclass

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.expressions import Expression, Variable, select
from mest_compile.operators.losses.elementwise import ElementwiseLoss
from mest_compile.operators.losses.loss import loss


@loss("smooth_l1")
@dataclass(frozen=True, slots=True)
class SmoothL1(ElementwiseLoss):
    """torch.nn.SmoothL1Loss's: the mean over all elements of d^2 / (2 beta) where d = |output - target| < beta, else
    d - beta / 2. Targets (N, k) real numbers, or (N,) of one output.

    beta  where the parabola ends; 0: the mean of d, whose gradient is 0 at 0
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", checks.number("SmoothL1: beta", self.beta, error=SpecError))

    @property
    def term(self) -> Expression:
        return smooth(self.beta)


def smooth(beta: float) -> Expression:
    difference = Variable("output") - Variable("target")
    if beta == 0:
        return abs(difference)
    return select(abs(difference) >= beta, abs(difference) - beta / 2, difference * difference * (0.5 / beta))
