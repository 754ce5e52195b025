"""Scalar expressions, written once: the kernels of every kind of device, the float64 reference and the derivative follow from them.

    x = Variable("x")
    relu6 = minimum(6, maximum(0, x))
    relu6.evaluate(x=array)                     # numpy, float64
    relu6.derivative("x")                       # select(6 > maximum(0, x), select(x > 0, 1, 0), 0)
    relu6.text({"x": "z[i]"}, constant)         # TVMScript

NaN goes through all of them as through numpy and torch: comparisons with it are false, and every other operation keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


class Expression:
    """What Python's arithmetic and comparisons make trees of."""

    __slots__ = ()

    def __add__(self, other: Scalar) -> Expression:
        return apply("add", self, other)

    def __radd__(self, other: Scalar) -> Expression:
        return apply("add", other, self)

    def __sub__(self, other: Scalar) -> Expression:
        return apply("subtract", self, other)

    def __rsub__(self, other: Scalar) -> Expression:
        return apply("subtract", other, self)

    def __mul__(self, other: Scalar) -> Expression:
        return apply("multiply", self, other)

    def __rmul__(self, other: Scalar) -> Expression:
        return apply("multiply", other, self)

    def __truediv__(self, other: Scalar) -> Expression:
        return apply("divide", self, other)

    def __rtruediv__(self, other: Scalar) -> Expression:
        return apply("divide", other, self)

    def __neg__(self) -> Expression:
        return apply("subtract", 0, self)

    def __gt__(self, other: Scalar) -> Expression:
        return apply("greater", self, other)

    def __lt__(self, other: Scalar) -> Expression:
        return apply("greater", other, self)

    def __ge__(self, other: Scalar) -> Expression:
        return apply("at_least", self, other)

    def __le__(self, other: Scalar) -> Expression:
        return apply("at_least", other, self)

    def evaluate(self, **values: Any) -> np.ndarray:
        """In float64 (comparisons: bool), of {variable: array}; the arrays broadcast."""
        raise NotImplementedError

    def derivative(self, name: str) -> Expression:
        """With respect to that variable. A comparison is a constant; `maximum(a, x)` has slope 1 where x > a, as torch's ReLU."""
        raise NotImplementedError

    def text(self, names: Mapping[str, str], constant: Callable[[float], str]) -> str:
        """TVMScript. names: {variable: expression of the kernel}; constant: how a float32 of the kernel's width is written."""
        raise NotImplementedError

    @property
    def variables(self) -> frozenset[str]:
        raise NotImplementedError


Scalar = Expression | float


@dataclass(frozen=True, slots=True)
class Constant(Expression):
    value: float

    def evaluate(self, **values):
        return np.float64(self.value)

    def derivative(self, name):
        return Constant(0.0)

    def text(self, names, constant):
        return constant(self.value)

    @property
    def variables(self):
        return frozenset()


@dataclass(frozen=True, slots=True)
class Variable(Expression):
    name: str

    def evaluate(self, **values):
        return np.asarray(values[self.name], np.float64)

    def derivative(self, name):
        return Constant(float(name == self.name))

    def text(self, names, constant):
        return names[self.name]

    @property
    def variables(self):
        return frozenset({self.name})


@dataclass(frozen=True, slots=True)
class Operation:
    """numpy: of float64 arrays; text: TVMScript with a {} for each argument; slopes: what each argument's derivative is multiplied by,
    from the arguments; None where the result is a comparison.
    """

    numpy: Callable[..., Any]
    text: str
    slopes: Callable[..., tuple[Scalar, ...]] | None = None


# T.max(a, b) is `a > b ? a : b`: the second where they cannot be compared. So is the reference, and so NaN has to be the second.
OPERATIONS: dict[str, Operation] = {
    "add": Operation(np.add, "({} + {})", lambda a, b: (1, 1)),
    "subtract": Operation(np.subtract, "({} - {})", lambda a, b: (1, -1)),
    "multiply": Operation(np.multiply, "({} * {})", lambda a, b: (b, a)),
    "divide": Operation(np.divide, "({} / {})", lambda a, b: (1 / b, -a / (b * b))),
    "maximum": Operation(lambda a, b: np.where(a > b, a, b), "T.max({}, {})", lambda a, b: (select(a > b, 1, 0), select(b > a, 1, 0))),
    "minimum": Operation(lambda a, b: np.where(a < b, a, b), "T.min({}, {})", lambda a, b: (select(a < b, 1, 0), select(b < a, 1, 0))),
    "exp": Operation(np.exp, "T.exp({})", lambda a: (exp(a),)),
    "log": Operation(np.log, "T.log({})", lambda a: (1 / a,)),
    "sqrt": Operation(np.sqrt, "T.sqrt({})", lambda a: (0.5 / sqrt(a),)),
    "greater": Operation(np.greater, "({} > {})"),
    "at_least": Operation(np.greater_equal, "({} >= {})"),
    "select": Operation(np.where, "T.Select({}, {}, {})"),
}


@dataclass(frozen=True, slots=True)
class Apply(Expression):
    operation: str
    arguments: tuple[Expression, ...]

    def evaluate(self, **values):
        with np.errstate(all="ignore"):  # as a kernel, which computes both sides of a select and raises nothing
            return OPERATIONS[self.operation].numpy(*(argument.evaluate(**values) for argument in self.arguments))

    def derivative(self, name):
        if name not in self.variables:
            return Constant(0.0)
        if self.operation == "select":
            condition, chosen, other = self.arguments
            return select(condition, chosen.derivative(name), other.derivative(name))
        slopes = OPERATIONS[self.operation].slopes
        assert slopes, f"{self.operation} is a comparison, which has no derivative"
        parts = [slope * argument.derivative(name) for slope, argument in zip(map(scalar, slopes(*self.arguments)), self.arguments)]
        return sum(parts[1:], parts[0])

    def text(self, names, constant):
        return OPERATIONS[self.operation].text.format(*(argument.text(names, constant) for argument in self.arguments))

    @property
    def variables(self):
        return frozenset().union(*(argument.variables for argument in self.arguments))


def scalar(value: Scalar) -> Expression:
    return value if isinstance(value, Expression) else Constant(float(value))


def apply(operation: str, *arguments: Scalar) -> Expression:
    """The tree, without what is 0 or 1 in sums and products: derivatives would be mostly that."""
    made = tuple(map(scalar, arguments))
    match operation, made:
        case ("add", (Constant(0.0), other)) | ("add" | "subtract", (other, Constant(0.0))):
            return other
        case ("multiply", (Constant(1.0), other)) | ("multiply" | "divide", (other, Constant(1.0))):
            return other
        case ("multiply", (Constant(0.0), _)) | ("multiply", (_, Constant(0.0))):
            return Constant(0.0)
        case ("select", (_, chosen, other)) if chosen == other:
            return chosen
        case (_, _) if all(isinstance(argument, Constant) for argument in made) and OPERATIONS[operation].slopes:
            return Constant(float(Apply(operation, made).evaluate()))
    return Apply(operation, made)


def maximum(a: Scalar, b: Scalar) -> Expression:
    """The larger one; b where they cannot be compared. Of equal ones neither has a slope."""
    return apply("maximum", a, b)


def minimum(a: Scalar, b: Scalar) -> Expression:
    """The smaller one; b where they cannot be compared. Of equal ones neither has a slope."""
    return apply("minimum", a, b)


def exp(a: Scalar) -> Expression:
    return apply("exp", a)


def log(a: Scalar) -> Expression:
    return apply("log", a)


def sqrt(a: Scalar) -> Expression:
    return apply("sqrt", a)


def select(condition: Expression, chosen: Scalar, other: Scalar) -> Expression:
    """`chosen` where the comparison is true, else `other`."""
    return apply("select", condition, chosen, other)
