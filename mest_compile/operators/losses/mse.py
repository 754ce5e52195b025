"""Mean squared error."""

from __future__ import annotations

from dataclasses import dataclass

from mest_compile.ir.expressions import Expression, Variable
from mest_compile.operators.losses.elementwise import ElementwiseLoss
from mest_compile.operators.losses.loss import loss


@loss("mse")
@dataclass(frozen=True, slots=True)
class MSE(ElementwiseLoss):
    """torch.nn.MSELoss's: the mean over all elements of (output - target)^2. Targets (N, k) real numbers, or (N,) of
    one output."""

    metrics = ("mse", "mae")

    @property
    def term(self) -> Expression:
        difference = Variable("output") - Variable("target")
        return difference * difference
