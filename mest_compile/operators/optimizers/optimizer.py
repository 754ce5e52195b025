"""What an optimizer is: hyper-parameters by name, state arrays, and a formula from which the kernels of every kind of
device follow.

An optimizer is a file in this folder with one class. No array's size stands in its kernels, so masks change without
compiling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np

from mest_compile.base.registry import Registry
from mest_compile.ir.expressions import Expression

OPTIMIZERS = Registry("optimizer", "mest_compile.operators.optimizers")
O = TypeVar("O", bound="Optimizer")


def optimizer(name: str) -> Callable[[type[O]], type[O]]:
    """Class decorator: registers an optimizer under the name that files have for it."""

    def register(cls: type[O]) -> type[O]:
        cls.name = name
        OPTIMIZERS.add(name, cls)
        return cls

    return register


@dataclass(frozen=True, slots=True)
class Optimizer(ABC):
    """Base of the optimizers. Fields are what users choose, each with a default.

    lr       learning rate of a step that is not told another
    name     in files
    state    names of the arrays that are kept for every weight, float32, 0 at first
    scalars  names of the numbers that `hyper` gives the formula
    formula  assignments in order, of `values`, `gradients`, states and scalars: to every state, to `values` last, and
             to names of its own
    """

    lr: float = 0.1

    name: ClassVar[str]
    state: ClassVar[tuple[str, ...]]
    scalars: ClassVar[tuple[str, ...]]
    formula: ClassVar[Mapping[str, Expression]]

    @abstractmethod
    def hyper(self, count: int, lr: float) -> np.ndarray:
        """`scalars`, float32, of update number `count` of the step, the first being 1, at that learning rate."""

    @classmethod
    def signature(cls) -> str:
        """How users make one."""
        return f"mest.{cls.__name__}({', '.join(field.name for field in fields(cls))})"

    def to_json(self) -> dict[str, Any]:
        """Its name and what users chose."""
        return {"name": self.name, **asdict(self)}


def read_optimizer(document: Mapping[str, Any]) -> Optimizer:
    """The one that `to_json` told of; without a name it is SGD, as before there were others. Raises UnknownName,
    TypeError, SpecError."""
    chosen = dict(document)
    return OPTIMIZERS.find(chosen.pop("name", "sgd"))(**chosen)


# Kernels.


@dataclass(frozen=True, slots=True)
class Update:
    """Kernel "optimizer.update": values (n,), gradients (n,), each state (n,), hyper (scalars,). n is symbolic.

    Values and states change in place, as the formula of the optimizer `rule` says.
    """

    rule: str


@dataclass(frozen=True, slots=True)
class UpdateUnits:
    """Kernel "optimizer.update_units": as "optimizer.update" with n = units * source_block * row_block, then
    permutation (units,) int32 and transposed (n,): the new values in the order that the input gradient reads.

    transposed[permutation[u], j, k] = values[u, k, j] for k < source_block, j < row_block.
    """

    rule: str
    source_block: int
    row_block: int


@dataclass(frozen=True, slots=True)
class CopyValues:
    """Kernel "optimizer.copy": values (n,), places (m,) int32, copies (m,). copies[i] = values[places[i]]; n and m are
    symbolic."""


def update_reference(
    rule: str, values: np.ndarray, gradients: np.ndarray, *state_and_hyper: np.ndarray
) -> list[np.ndarray]:
    """New [values, each state] in float64."""
    kind = OPTIMIZERS.find(rule)
    *state, hyper = state_and_hyper
    known = {
        "values": values,
        "gradients": gradients,
        **dict(zip(kind.state, state, strict=True)),
        **dict(zip(kind.scalars, hyper, strict=True)),
    }
    for name, expression in kind.formula.items():
        known[name] = expression.evaluate(**known)
    return [known["values"], *(known[name] for name in kind.state)]


def transposed_reference(problem: UpdateUnits, values: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """(n,): what `transposed` holds after the update to `values`."""
    units = values.reshape(-1, problem.source_block, problem.row_block)
    out = np.empty((len(units), problem.row_block, problem.source_block), values.dtype)
    out[permutation] = units.transpose(0, 2, 1)
    return out.ravel()
