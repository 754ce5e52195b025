"""Scalar expressions, written once: the kernels of every kind of device, the float64 reference and the derivative
follow from them.

    x = Variable("x")
    relu6 = minimum(6, maximum(0, x))
    relu6.evaluate(x=array)                     # numpy, float64
    relu6.derivative("x")                       # select(maximum(0, x) >= 6, 0, select(x <= 0, 0, 1))
    relu6.text({"x": "z[i]"}, constant)         # TVMScript

NaN goes through all of them as through numpy and torch: comparisons with it are false, and every other operation keeps
it; of `maximum` and `minimum` that is so of the second argument, which therefore is the variable where the other one is
a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# T.max(a, b) is a > b ? a : b.
SPELLINGS = {
    "add": "({0} + {1})",
    "subtract": "({0} - {1})",
    "multiply": "({0} * {1})",
    "divide": "({0} / {1})",
    "maximum": "T.max({0}, {1})",
    "minimum": "T.min({0}, {1})",
    "abs": "T.abs({0})",
    "exp": "T.exp({0})",
    "log": "T.log({0})",
    "sqrt": "T.sqrt({0})",
    "tanh": "T.tanh({0})",
    "erf": "T.erf({0})",
    "greater": "{0} > {1}",
    "less": "{0} < {1}",
    "at_least": "{0} >= {1}",
    "at_most": "{0} <= {1}",
    "select": "T.Select({0}, {1}, {2})",
}
INFIX = ("add", "subtract", "multiply", "divide")


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

    def __abs__(self) -> Expression:
        return apply("abs", self)

    def __gt__(self, other: Scalar) -> Expression:
        return apply("greater", self, other)

    def __lt__(self, other: Scalar) -> Expression:
        return apply("less", self, other)

    def __ge__(self, other: Scalar) -> Expression:
        return apply("at_least", self, other)

    def __le__(self, other: Scalar) -> Expression:
        return apply("at_most", self, other)

    def evaluate(self, **values: Any) -> np.ndarray:
        """In float64 (comparisons: bool), of {variable: array}; the arrays broadcast."""
        raise NotImplementedError

    def derivative(self, name: str) -> Expression:
        """With respect to that variable. What a `select` compares is taken for constant; `maximum(a, x)` has slope 0
        where x <= a, as torch's ReLU, and so 1 behind a NaN.
        """
        raise NotImplementedError

    def text(
        self, names: Mapping[str, str], constant: Callable[[float], str], spellings: Mapping[str, str] = SPELLINGS
    ) -> str:
        """TVMScript.

        names      {variable: expression of the kernel}
        constant   how a float32 of the kernel's width is written
        spellings  {operation: its text, with the arguments as {0}, {1}, {2}}
        """
        raise NotImplementedError

    @property
    def variables(self) -> frozenset[str]:
        raise NotImplementedError

    def of(self, **values: Expression) -> Expression:
        """With expressions in the place of variables."""
        raise NotImplementedError

    def parts(self) -> Iterator[Expression]:
        """Itself and all within it, one by one."""
        yield self


Scalar = Expression | float


@dataclass(frozen=True, slots=True)
class Constant(Expression):
    value: float

    def evaluate(self, **values: Any) -> np.ndarray:
        return np.asarray(self.value, np.float64)

    def derivative(self, name: str) -> Expression:
        return Constant(0.0)

    def text(
        self, names: Mapping[str, str], constant: Callable[[float], str], spellings: Mapping[str, str] = SPELLINGS
    ) -> str:
        return constant(self.value)

    @property
    def variables(self) -> frozenset[str]:
        return frozenset()

    def of(self, **values: Expression) -> Expression:
        return self


@dataclass(frozen=True, slots=True)
class Variable(Expression):
    name: str

    def evaluate(self, **values: Any) -> np.ndarray:
        return np.asarray(values[self.name], np.float64)

    def derivative(self, name: str) -> Expression:
        return Constant(float(name == self.name))

    def text(
        self, names: Mapping[str, str], constant: Callable[[float], str], spellings: Mapping[str, str] = SPELLINGS
    ) -> str:
        return names[self.name]

    @property
    def variables(self) -> frozenset[str]:
        return frozenset({self.name})

    def of(self, **values: Expression) -> Expression:
        return values.get(self.name, self)


@dataclass(frozen=True, slots=True)
class Operation:
    """numpy: of float64 arrays; slopes: what each argument's derivative is multiplied by, from the arguments; None of a
    comparison."""

    numpy: Callable[..., Any]
    slopes: Callable[..., tuple[Scalar, ...]] | None = None


OPERATIONS: dict[str, Operation] = {
    "add": Operation(np.add, lambda a, b: (1, 1)),
    "subtract": Operation(np.subtract, lambda a, b: (1, -1)),
    "multiply": Operation(np.multiply, lambda a, b: (b, a)),
    "divide": Operation(np.divide, lambda a, b: (1 / b, -a / (b * b))),
    "maximum": Operation(lambda a, b: np.where(a > b, a, b), lambda a, b: (select(b < a, 1, 0), select(b <= a, 0, 1))),
    "minimum": Operation(lambda a, b: np.where(a < b, a, b), lambda a, b: (select(b > a, 1, 0), select(b >= a, 0, 1))),
    "abs": Operation(np.abs, lambda a: (select(a > 0, 1, select(a < 0, -1, 0)),)),
    "exp": Operation(np.exp, lambda a: (exp(a),)),
    "log": Operation(np.log, lambda a: (1 / a,)),
    "sqrt": Operation(np.sqrt, lambda a: (0.5 / sqrt(a),)),
    "tanh": Operation(np.tanh, lambda a: (1 - tanh(a) * tanh(a),)),
    "erf": Operation(np.vectorize(math.erf, [np.float64]), lambda a: (2 / math.sqrt(math.pi) * exp(0 - a * a),)),
    "greater": Operation(np.greater),
    "less": Operation(np.less),
    "at_least": Operation(np.greater_equal),
    "at_most": Operation(np.less_equal),
    "select": Operation(np.where),
}


@dataclass(frozen=True, slots=True)
class Apply(Expression):
    operation: str
    arguments: tuple[Expression, ...]

    def evaluate(self, **values: Any) -> np.ndarray:
        with np.errstate(all="ignore"):  # as a kernel, which computes both sides of a select and raises nothing
            return OPERATIONS[self.operation].numpy(*(argument.evaluate(**values) for argument in self.arguments))

    def derivative(self, name: str) -> Expression:
        if name not in self.variables:
            return Constant(0.0)
        if self.operation == "select":
            condition, chosen, other = self.arguments
            return select(condition, chosen.derivative(name), other.derivative(name))
        slopes = OPERATIONS[self.operation].slopes
        assert slopes, f"{self.operation} is a comparison, which has no derivative"
        parts = [
            slope * argument.derivative(name)
            for slope, argument in zip(map(scalar, slopes(*self.arguments)), self.arguments)
        ]
        return sum(parts[1:], parts[0])

    def text(
        self, names: Mapping[str, str], constant: Callable[[float], str], spellings: Mapping[str, str] = SPELLINGS
    ) -> str:
        parts = [argument.text(names, constant, spellings) for argument in self.arguments]
        if self.operation in INFIX:  # what stands for a variable may be a sum
            parts = [
                f"({part})" if isinstance(argument, Variable) else part
                for part, argument in zip(parts, self.arguments, strict=True)
            ]
        return spellings[self.operation].format(*parts)

    @property
    def variables(self) -> frozenset[str]:
        return frozenset[str]().union(*(argument.variables for argument in self.arguments))

    def of(self, **values: Expression) -> Expression:
        return apply(self.operation, *(argument.of(**values) for argument in self.arguments))

    def parts(self) -> Iterator[Expression]:
        yield self
        for argument in self.arguments:
            yield from argument.parts()


ZERO = Constant(0.0)


def scalar(value: Scalar) -> Expression:
    return value if isinstance(value, Expression) else Constant(float(value))


def apply(operation: str, *arguments: Scalar) -> Expression:
    """The tree, without what is 0 or 1 in sums and products, of which derivatives would be full. A factor goes into a
    `select` between such constants, so that 0 is 0 whatever the factor: torch's gradient before a ReLU is 0 for a NaN
    behind it, too.
    """
    made = tuple(map(scalar, arguments))
    match operation, made:
        case ("add", (Constant(0.0), other)) | ("add" | "subtract", (other, Constant(0.0))):
            return other
        case ("multiply", (Constant(1.0), other)) | ("multiply" | "divide", (other, Constant(1.0))):
            return other
        case ("multiply", (Constant(0.0), _) | (_, Constant(0.0))):
            return Constant(0.0)
        case (
            "multiply",
            (Apply("select", (condition, chosen, other)), factor)
            | (factor, Apply("select", (condition, chosen, other))),
        ) if ZERO in (chosen, other):
            return select(condition, factor * chosen, factor * other)
        case ("select", (_, chosen, other)) if chosen == other:
            return chosen
        case _ if all(isinstance(argument, Constant) for argument in made) and OPERATIONS[operation].slopes:
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


def tanh(a: Scalar) -> Expression:
    return apply("tanh", a)


def erf(a: Scalar) -> Expression:
    """The error function, twice the area under a Gauss curve of variance 1/2 from 0 on."""
    return apply("erf", a)


def select(condition: Expression, chosen: Scalar, other: Scalar) -> Expression:
    """`chosen` where the comparison is true, else `other`."""
    return apply("select", condition, chosen, other)
