"""Activations: functions of one number, each a row that says what it computes. Everything else follows: operator,
kernels, reference, gradient, how models that spell it out are read, and that batch_norm takes it in.

A formula that no row has is an activation too: its text is its name, and its operator is "formula".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from mest_compile.base.registry import Registry
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.refusals import SUPPORTED
from mest_compile.ir.expressions import Expression, Variable, erf, exp, log, maximum, minimum, select, tanh
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.wording import from_text
from mest_compile.operators.operator import OPERATORS, Operator, Trace

X, DY = Variable("x"), Variable("dy")
ACTIVATIONS = Registry("activation", "mest_compile.operators")
# Where formulas are compared: two that agree here are one. No point is on a grid that a formula might be periodic in,
# bounds of usual formulas are among them, and infinities tell a bound however large.
POINTS = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(200) * 4,
        np.geomspace(1e-4, 1e4, 24),
        -np.geomspace(1e-4, 1e4, 24),
        [0.0, -1.0, 1.0, -3.0, 3.0, 6.0, np.nan, np.inf, -np.inf],
    ]
)


@dataclass(frozen=True)  # without slots, for cached_property
class Activation:
    """name     as people know it; of the operator, and of the kernels "<name>.forward" and "<name>.backward"
    formula     y, an expression of x
    told_slope  dy/dx, an expression of x: where that which follows from the formula is not torch's for an infinite dy,
                or is longer
    in_onnx     the ONNX operator that it is, with that operator's usual attributes; None: the formula's operations
    """

    name: str
    formula: Expression
    told_slope: Expression | None = None
    in_onnx: str | None = None

    @cached_property
    def slope(self) -> Expression:
        return self.told_slope or self.formula.derivative("x")

    @cached_property
    def gradient(self) -> Expression:
        """Of x, an expression of x and dy."""
        return DY * self.slope

    @cached_property
    def from_result(self) -> bool:
        """Whether the slope at x is that at y, as of a function that changes nothing twice: then y is kept for the
        backward pass, not x."""
        return np.array_equal(
            self.slope.evaluate(x=self.formula.evaluate(x=POINTS)), self.slope.evaluate(x=POINTS), equal_nan=True
        )

    def forward_reference(self, x: np.ndarray) -> np.ndarray:
        """y in float64."""
        return self.formula.evaluate(x=x)

    def backward_reference(self, dy: np.ndarray, source: np.ndarray) -> np.ndarray:
        """The gradient of x in float64; source: y where `from_result`, else x."""
        return self.gradient.evaluate(dy=dy, x=source)


def activation(name: str, formula: Expression, slope: Expression | None = None, onnx: str | None = None) -> None:
    """Registers a row; `slope` is the activation's `told_slope`, `onnx` its `in_onnx`."""
    row = Activation(name, formula, slope, onnx)
    ACTIVATIONS.add(name, row)
    OPERATORS.add(name, Elementwise())
    SUPPORTED.add(name, row)


@cache
def activation_of(name: str) -> Activation:
    """The row of that name, or of a formula in its place. Raises SpecError."""
    return ACTIVATIONS[name] if name in ACTIVATIONS.load() else Activation(name, from_text(name))


def activation_in(node: Node) -> str | None:
    """The name or formula of the activation that a node is; None where it is something else."""
    return node.attrs["formula"] if node.op == FORMULA else node.op if node.op in ACTIVATIONS.load() else None


@dataclass(frozen=True, slots=True)
class ActivationForward:
    """Kernel "<name>.forward": x (x.elems,), y (y.elems,)."""

    x: Image
    y: Image


@dataclass(frozen=True, slots=True)
class ActivationBackward:
    """Kernel "<name>.backward": dy (dy.elems,), source (source.elems,), dx (dx.elems,).

    source      y where the activation's slope follows from it (`from_result`), else x
    accumulate  dx += instead
    """

    dy: Image
    source: Image
    dx: Image
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class FormulaForward(ActivationForward):
    """Kernel "formula.forward", likewise."""

    formula: str = "x"


@dataclass(frozen=True, slots=True)
class FormulaBackward(ActivationBackward):
    """Kernel "formula.backward", likewise."""

    formula: str = "x"


class Elementwise(Operator):
    """An activation where no batch_norm before it could take it in."""

    def forward(self, node: Node, low: Trace) -> None:
        x, y = low.value(node.inputs[0]), low.output(node)
        forward, _ = _problems(node)
        low.call(f"{node.op}.forward", forward(x.image, y.image, **node.attrs), x, y)

    def backward(self, node: Node, low: Trace) -> None:
        if low.needs_gradient(node.inputs[0]):
            from_result = _row(node).from_result
            dy, source = low.gradient(node), low.value(node.name if from_result else node.inputs[0])
            dx, accumulate = low.contribute(node.inputs[0])
            _, backward = _problems(node)
            problem = backward(dy.image, source.image, dx.image, accumulate, **node.attrs)
            low.call(f"{node.op}.backward", problem, dy, source, dx)

    def onnx(self, node: Node, writer: Writer) -> str:
        (x,) = writer.inputs(node)
        row = _row(node)
        if row.in_onnx:
            return writer.call(row.in_onnx, [x], node.shape)
        return writer.expression(row.formula, {"x": x}, node.shape)


def _row(node: Node) -> Activation:
    return activation_of(node.attrs.get("formula", node.op))


def _problems(node: Node) -> tuple[Any, Any]:
    return (FormulaForward, FormulaBackward) if node.op == FORMULA else (ActivationForward, ActivationBackward)


FORMULA = "formula"
OPERATORS.add(FORMULA, Elementwise())
SUPPORTED.add("any other formula of one activation", FORMULA)


SIGMOID = 1 / (1 + exp(-X))
GROWTH = exp(minimum(20, X))  # beyond 20 what mish divides are one in float32
TANH_SOFTPLUS = GROWTH * (GROWTH + 2) / (GROWTH * (GROWTH + 2) + 2)
# What gelu multiplies by, and twice what its tanh form does: (1 + tanh(b)) / 2 is the sigmoid of 2 b. 0.7978845608 is
# the root of 2 / pi.
HALF = 0.5 * (1 + erf(0.7071067811865476 * X))
BEND = 2 * 0.7978845608028654 * (X + 0.044715 * X * X * X)

activation("relu", maximum(0, X))
activation("relu6", minimum(6, maximum(0, X)))
activation("hardtanh", minimum(1, maximum(-1, X)))
activation(
    "hardswish",
    X * minimum(6, maximum(0, X + 3)) / 6,
    slope=select(X <= -3, 0, select(X >= 3, 1, X / 3 + 0.5)),
    onnx="HardSwish",
)
activation("hardsigmoid", minimum(6, maximum(0, X + 3)) / 6, slope=select(X > -3, select(X < 3, 1 / 6, 0), 0))
activation("sigmoid", SIGMOID, slope=(1 - SIGMOID) * SIGMOID, onnx="Sigmoid")
activation("silu", X / (1 + exp(-X)), slope=SIGMOID * (1 + X * (1 - SIGMOID)))
activation("tanh", tanh(X), onnx="Tanh")
activation("gelu", X * HALF, slope=HALF + X * (0.3989422804014327 * exp(-0.5 * X * X)))
activation(
    "gelu_tanh",
    X / (1 + exp(-BEND)),
    slope=1 / (1 + exp(-BEND)) + X * BEND.derivative("x") * (1 / (1 + exp(-BEND))) * (1 / (1 + exp(BEND))),
)
activation("leaky_relu", select(X > 0, X, 0.01 * X), onnx="LeakyRelu")
activation("elu", select(X > 0, X, exp(minimum(0, X)) - 1), slope=select(X > 0, 1, exp(minimum(0, X))), onnx="Elu")
activation("softplus", maximum(0, X) + log(1 + exp(-abs(X))), slope=SIGMOID, onnx="Softplus")
activation("mish", X * TANH_SOFTPLUS, slope=TANH_SOFTPLUS + X * (1 - TANH_SOFTPLUS * TANH_SOFTPLUS) * SIGMOID)
