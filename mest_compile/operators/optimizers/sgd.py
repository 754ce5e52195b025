"""Stochastic gradient descent with momentum, on dense parameters and on live units."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError


@dataclass(frozen=True, slots=True)
class Sgd:
    """Kernel "optimizer.sgd": values (n,), gradients (n,), momentum (n,), hyper (4,): lr, momentum, weight_decay, nesterov 0 or 1.

    values and momentum change in place, as torch.optim.SGD does it; n is symbolic. A first step starts from momentum 0.
    """


@dataclass(frozen=True, slots=True)
class SgdUnits:
    """Kernel "optimizer.sgd_units": as "optimizer.sgd" with n = units * source_block * row_block, then permutation (units,) int32
    and transposed (n,): the new values in the order that the input gradient reads.

    transposed[permutation[u], j, k] = values[u, k, j] for k < source_block, j < row_block.
    """

    source_block: int
    row_block: int


@dataclass(frozen=True, slots=True)
class CopyValues:
    """Kernel "optimizer.copy": values (n,), places (m,) int32, copies (m,). copies[i] = values[places[i]]; n and m are symbolic."""


def sgd_reference(values, gradients, momentum, hyper) -> tuple[np.ndarray, np.ndarray]:
    """New (values, momentum) in float64."""
    lr, share, decay, nesterov = (float(value) for value in hyper)
    gradient = gradients.astype(np.float64) + decay * values.astype(np.float64)
    moved = share * momentum.astype(np.float64) + gradient
    return values - lr * (gradient + share * moved if nesterov else moved), moved


def transposed_reference(problem: SgdUnits, values: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """(n,): what `transposed` holds after the update to `values`."""
    units = values.reshape(-1, problem.source_block, problem.row_block)
    out = np.empty((len(units), problem.row_block, problem.source_block), values.dtype)
    out[permutation] = units.transpose(0, 2, 1)
    return out.ravel()


@dataclass(frozen=True, slots=True)
class SGD:
    """torch.optim.SGD's rule: lr, momentum, weight_decay (L2, on every parameter), nesterov."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name, below in (("lr", inf), ("momentum", 1.0), ("weight_decay", inf)):
            object.__setattr__(self, name, checks.number(f"SGD: {name}", getattr(self, name), below=below, error=SpecError))
        checks.flag("SGD: nesterov", self.nesterov, error=SpecError)
        if self.nesterov and self.momentum == 0:
            raise SpecError("nesterov needs a momentum above 0")
