"""What an optimizer is: hyper-parameters by name, state arrays, and a formula from which the kernels of every kind of
device follow.

An optimizer is a file in this folder with one class. No array's size stands in its kernels, so masks change without
compiling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.base.options import made, plain
from mest_compile.base.registry import Registry
from mest_compile.ir.expressions import Expression
from mest_compile.operators.optimizers.groups import Group, Setting, groups_of

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
class Rule:
    """How an optimizer updates, with some of its options on or off.

    state    names of the arrays that are kept for every weight, float32, 0 at first
    scalars  names of the numbers that `hyper` gives the formula
    formula  assignments in order, of `values`, `gradients`, states and scalars: to every state, to `values` last, and
             to names of its own
    """

    state: tuple[str, ...]
    scalars: tuple[str, ...]
    formula: Mapping[str, Expression]


@dataclass(frozen=True, slots=True)
class Optimizer(ABC):
    """Base of the optimizers. Fields are what users choose, each with a default; all have a `weight_decay`.

    lr       learning rate of a step that is not told another
    groups   mest.Group objects: parameters by pattern, with a rate and a decay of their own; the first that names a
             parameter counts
    decay_weights_only  weights of convolutions and linear layers decay, biases and BatchNorm's parameters do not,
             unless a group gives them a decay
    name     in files
    rules    by name: the optimizer's own, or that with a variant behind a colon
    torch    torch.optim's class that is the same: (its name, fields by torch's names, {option: the value that it must
             have}); what is in none of them has no say in what it computes
    """

    lr: float = 0.1
    groups: tuple[Group, ...] = field(default=(), kw_only=True)
    decay_weights_only: bool = field(default=False, kw_only=True)

    name: ClassVar[str]
    rules: ClassVar[Mapping[str, Rule]]
    torch: ClassVar[tuple[str, Mapping[str, str], Mapping[str, Any]]]

    def check(self, *, below: Mapping[str, float] | None = None) -> None:
        """Makes every field of numbers what it is to be. below: names of the numbers among them, and what each must be
        below. Raises SpecError."""
        kind = type(self).__name__
        for name, limit in (below or {}).items():
            number = checks.number(f"{kind}: {name}", getattr(self, name), below=limit, error=SpecError)
            object.__setattr__(self, name, number)
        object.__setattr__(self, "groups", groups_of(kind, self.groups))
        checks.flag(f"{kind}: decay_weights_only", self.decay_weights_only, error=SpecError)

    @property
    def rule_name(self) -> str:
        """Which of its `rules` its options make it."""
        return self.name

    @property
    def rule(self) -> Rule:
        return self.rules[self.rule_name]

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the arrays that are kept for every weight."""
        return self.rule.state

    @abstractmethod
    def hyper(self, count: int, lr: float) -> np.ndarray:
        """The rule's scalars, float32, of update number `count` of the step, the first being 1, at that learning
        rate."""

    def hyper_of(self, setting: Setting, count: int, rates: Sequence[float]) -> np.ndarray:
        """The same of parameters of a setting, whose rate is one of `rates`."""
        factor, decay, turn = setting
        own = decay == self.weight_decay  # type: ignore[attr-defined]
        return (self if own else replace(self, weight_decay=decay)).hyper(count, rates[turn] * factor)  # type: ignore[call-arg]

    @classmethod
    def signature(cls) -> str:
        """How users make one."""
        common = {one.name for one in fields(Optimizer)} - {"lr"}
        return f"mest.{cls.__name__}({', '.join(one.name for one in fields(cls) if one.name not in common)})"

    def to_json(self) -> dict[str, Any]:
        """Its name and what users chose."""
        return {"name": self.name, **plain(asdict(self))}


def read_optimizer(document: Mapping[str, Any]) -> Optimizer:
    """The one that `to_json` told of; without a name it is SGD, as before there were others. Raises UnknownName,
    UsageError, SpecError."""
    return named_optimizer({"name": "sgd", **document})


def named_optimizer(value: Any) -> Optimizer:
    """The optimizer that a name, "name:option=value,...", or a table {"name": ..., option: ...} tells of. Raises
    UnknownName, UsageError, SpecError."""
    return made(OPTIMIZERS, value)


def rule_of(name: str) -> Rule:
    """The rule of that name."""
    return OPTIMIZERS.find(name.partition(":")[0]).rules[name]


def betas_of(kind: str, value: Any) -> tuple[float, float]:
    """Adam's: two numbers of 0 or more and below 1. Raises SpecError."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise SpecError(f"{kind}: betas is {checks.shown(value)}; wanted two numbers of 0 or more and below 1")
    first, second = (
        checks.number(f"{kind}: betas[{place}]", beta, below=1, error=SpecError) for place, beta in enumerate(value)
    )
    return first, second


# Kernels.


@dataclass(frozen=True, slots=True)
class Update:
    """Kernel "optimizer.update": values (n,), gradients (n,), each state (n,), hyper (scalars,). n is symbolic.

    Values and states change in place, as the formula of the optimizer `rule` says.
    """

    rule: str


@dataclass(frozen=True, slots=True)
class UpdatePart:
    """Kernel "optimizer.update_part": as "optimizer.update", of arrays of `whole` numbers, of which those from `start`
    on change, `elems` of them.
    """

    rule: str
    start: int
    elems: int
    whole: int


@dataclass(frozen=True, slots=True)
class Norm:
    """Kernel "optimizer.norm": gradients (n,), where `listed` places (m,) int32, norm (1,). n and m are symbolic.

    norm becomes the root of its square and those of the gradients, or of those at `places`; `first`: of these alone.
    """

    first: bool
    listed: bool


@dataclass(frozen=True, slots=True)
class Bound:
    """Kernel "optimizer.bound": gradients (n,), norm (1,), bound (1,). n is symbolic. Where norm is not at most bound
    the gradients are multiplied by bound / norm."""


def norm_reference(problem: Norm, gradients: np.ndarray, places: np.ndarray | None, norm: float) -> float:
    """The new norm in float64."""
    counted = gradients if places is None else gradients[places]
    return float(np.sqrt(np.square(counted, dtype=np.float64).sum() + (0 if problem.first else norm**2)))


def bound_reference(gradients: np.ndarray, norm: float, bound: float) -> np.ndarray:
    """The new gradients in float64."""
    return gradients if norm <= bound else gradients.astype(np.float64) * (bound / norm)


def update_reference(
    rule: str, values: np.ndarray, gradients: np.ndarray, *state_and_hyper: np.ndarray
) -> list[np.ndarray]:
    """New [values, each state] in float64."""
    kind = rule_of(rule)
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
