"""Huber's loss."""

from __future__ import annotations

from dataclasses import dataclass

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.expressions import Expression
from mest_compile.operators.losses.elementwise import ElementwiseLoss
from mest_compile.operators.losses.loss import loss
from mest_compile.operators.losses.smooth_l1 import smooth


@loss("huber")
@dataclass(frozen=True, slots=True)
class Huber(ElementwiseLoss):
    """torch.nn.HuberLoss's, which is delta times SmoothL1's of beta = delta. Targets (N, k) real numbers, or (N,) of
    one output.

    delta  where the parabola ends, above 0
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", checks.number("Huber: delta", self.delta, error=SpecError))
        if self.delta == 0:
            raise SpecError("Huber: delta is 0; wanted a number above 0, or mest.SmoothL1(beta=0), the mean of |d|")

    @property
    def term(self) -> Expression:
        return smooth(self.delta) * self.delta
