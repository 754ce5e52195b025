"""Chains of operators on single numbers, read as the activation that they compute: x * clip(x + 3, 0, 6) / 6 is a
hardswish however it is written, and importers and exporters write it in many ways.

What a chain computes is followed as its values at `POINTS`, and compared with those of the known activations whenever
an operator is added to it; and written down as a formula, for chains that are none of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.relax_graph import Reader, _shape, _single, reads
from mest_compile.frontend.values import Fixed, Formula, Parameter, Spread, Value
from mest_compile.ir.expressions import (
    OPERATIONS,
    Apply,
    Constant,
    Expression,
    Variable,
    apply,
    exp,
    scalar,
    select,
    sqrt,
)
from mest_compile.ir.graph import Preparation
from mest_compile.ir.wording import COMPARISONS
from mest_compile.operators.activation import ACTIVATIONS, POINTS, X
from mest_compile.operators.combine import NAMES, combination

STEPS = ("add", "subtract", "multiply", "divide")  # of an input's normalisation
MOST_PARTS = 100  # of a formula that is written down: longer ones are no activations that anybody means
POWERS = {2: X * X, 3: X * X * X, 1: X, 0.5: sqrt(X), -0.5: 1 / sqrt(X), -1: 1 / X, -2: 1 / (X * X)}
ROUNDING = 1e-6  # relative and absolute: a file's constants are float32, and 0.16666667 is not a sixth


def combined(
    reader: Reader, operation: str, *operands: Any, formula: Expression | None = None
) -> Value | Formula | Fixed:
    """The result of an operation of `ir.expressions`, or of a formula of x that is called so, on activations, formulas
    and numbers. Raises UnsupportedOperator."""
    if (constant := _of_constants(operation, operands, formula)) is not None:
        return constant
    numbers = [operand.number if isinstance(operand, Fixed) else None for operand in operands]
    forms = [
        None if number is not None else _forms(reader, operand)
        for operand, number in zip(operands, numbers, strict=True)
    ]

    def compute(*given: Any) -> Any:
        with np.errstate(all="ignore"):
            return formula.evaluate(x=given[0]) if formula else OPERATIONS[operation].numpy(*given)

    shared = [base for base in next(filter(None, forms)) if all(form is None or base in form for form in forms)]
    found = {
        base: compute(*(number if form is None else form[base] for number, form in zip(numbers, forms, strict=True)))
        for base in shared
    }
    names = tuple(dict.fromkeys(name for operand in operands if isinstance(operand, Formula) for name in operand.names))
    names += (reader.name or operation,) if (reader.name or operation) not in names else ()
    written = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if not found:
        raise reader.error(f"{written} of two activations")
    trees = _trees(reader, operation, operands, numbers, formula, shared)
    for base in shared:
        if trees.get(base) == X and not reader.is_input(base):  # 0 + x and x * 1
            return base
    for base in sorted(found, key=lambda base: -base.draft):
        for row in ACTIVATIONS.load().values():
            if np.allclose(row.formula.evaluate(x=POINTS), found[base], ROUNDING, ROUNDING, equal_nan=True):
                value = reader.add(row.name, (base,), base.shape)
                reader.forms[value], reader.trees[value] = found, trees
                return value
    error = reader.error(written if reader.name else f"{written} of a constant")
    for base, values in found.items():
        if base in trees and (elu := _elu(values)) is not None:
            trees[base] = elu
    return Formula(
        found, names, error, *_prepared(reader, operation, operands, numbers), trees, operation in COMPARISONS
    )


def _of_constants(operation: str, operands: Sequence[Any], formula: Expression | None) -> Fixed | None:
    """What the operation makes of constants; None where there are others."""
    given = [one.array if one.number is None else one.number for one in operands if isinstance(one, Fixed)]
    if len(given) < len(operands) or any(one is None for one in given):
        return None
    with np.errstate(all="ignore"):
        found = formula.evaluate(x=given[0]) if formula else OPERATIONS[operation].numpy(*given)
    return Fixed(float(found)) if np.ndim(found) == 0 else Fixed(array=np.asarray(found, np.float32))


def _elu(values: np.ndarray) -> Expression | None:
    """ELU of another size, which importers write so that its slope at 0 is lost; None: something else."""
    (size,) = values[POINTS == -1.0] / np.expm1(-1.0)
    made = select(X > 0, X, size * (exp(X) - 1))
    return made if np.allclose(made.evaluate(x=POINTS), values, ROUNDING, ROUNDING, equal_nan=True) else None


def _trees(
    reader: Reader,
    operation: str,
    operands: Sequence[Any],
    numbers: Sequence[float | None],
    formula: Expression | None,
    shared: Sequence[Value],
) -> dict[Value, Expression]:
    """What the operation computes of those activations, where that can be written down."""
    known = [None if number is not None else _known(reader, one) for one, number in zip(operands, numbers, strict=True)]
    found = {}
    for base in shared:
        if all(trees is None or base in trees for trees in known):
            given = [number if trees is None else trees[base] for number, trees in zip(numbers, known, strict=True)]
            tree = formula.of(x=scalar(given[0])) if formula else apply(operation, *given)  # type: ignore[arg-type]
            parts = list(tree.parts())
            constants = np.array([part.value for part in parts if isinstance(part, Constant)])
            if len(parts) <= MOST_PARTS and (abs(constants) <= np.finfo(np.float32).max).all():
                found[base] = tree
    return found


def related(reader: Reader, a: Any, b: Any) -> bool:
    """Whether both are functions of one activation."""
    return not _forms(reader, a).keys().isdisjoint(_forms(reader, b))


def operation(reader: Reader, name: str, a: Any, b: Any, shape: tuple[int, ...]) -> Value | Formula | Fixed:
    """Of two operands: constants, or one at least is an activation, a formula or the model's input. Raises
    UnsupportedOperator."""
    a, b = (one.value if isinstance(one, Spread) else one for one in (a, b))
    if (prepared := channel_step(reader, name, (a, b))) is not None:
        return prepared
    together = [isinstance(one, Value | Formula) for one in (a, b)]
    held = [isinstance(one, Parameter) or (isinstance(one, Fixed) and one.array is not None) for one in (a, b)]
    if not any(held) or all(isinstance(one, Fixed) for one in (a, b)):
        if not all(together):
            return combined(reader, name, a, b)
        if related(reader, a, b):
            found = combined(reader, name, a, b)
            if not isinstance(found, Formula) or found.trees or found.base:
                return found
    elif not any(together):
        raise reader.error(f"{reader.name or name} of a parameter and what is no activation")
    given = [one if mine else reader.activation(one) for one, mine in zip((a, b), held, strict=True)]
    values = [one for one in given if isinstance(one, Value)]
    if name == "add" and [one.shape for one in values] == [shape, shape]:
        return reader.add("add", (values[0], values[1]), shape)  # which batch_norm may take in
    return combination(reader, apply(name, *map(Variable, NAMES[:2])), given, shape)


def _prepared(
    reader: Reader, operation: str, operands: Sequence[Any], numbers: Sequence[float | None]
) -> tuple[Value | None, tuple[Preparation, ...]]:
    """`base` and `prepared` of the Formula, where it is one more step of an input's normalisation."""
    if operation not in STEPS or (numbers[0] is None) == (numbers[1] is None):
        return None, ()
    swapped = numbers[0] is not None
    value, number = operands[swapped], numbers[not swapped]
    assert number is not None
    before: tuple[Preparation, ...] = ()
    if isinstance(value, Formula):
        before, value = value.prepared, value.base
    return (value, (*before, Preparation(operation, number, swapped))) if reader.is_input(value) else (None, ())


def channel_step(reader: Reader, operation: str, operands: Sequence[Any]) -> Value | None:
    """The input after an operation with a number a channel; None where it is something else."""
    if len(operands) != 2:
        return None
    held = [isinstance(one, Parameter) or (isinstance(one, Fixed) and one.array is not None) for one in operands]
    swapped = held[0]
    value, other = operands[swapped], operands[not swapped]
    if operation not in STEPS or held[0] == held[1]:
        return None
    if isinstance(value, Formula) and value.base:
        value = reader.activation(value)
    if not reader.is_input(value):
        return None
    shape = reader.shape_of(other) if isinstance(other, Parameter) else other.array.shape
    channels = (1, value.shape[1], *[1] * (len(value.shape) - 2))
    if len(shape) > len(channels) or any(
        size not in (1, most) for size, most in zip(shape[::-1], channels[::-1], strict=False)
    ):
        return None
    operand = other.name if isinstance(other, Parameter) else tuple(map(float, other.array.ravel()))
    return reader.prepare(value, Preparation(operation, operand, swapped))


def _known(reader: Reader, operand: Any) -> Mapping[Value, Expression]:
    """The same, written down."""
    if isinstance(operand, Formula):
        return operand.trees
    return {operand: X, **reader.trees.get(operand, {})}


def _forms(reader: Reader, operand: Any) -> Mapping[Value, np.ndarray]:
    """What is known of it as a function of activations, itself the first."""
    if isinstance(operand, Formula):
        return operand.forms
    value = reader.activation(operand)
    return {value: POINTS, **reader.forms.get(value, {})}


@reads(
    "relax.subtract",
    "relax.multiply",
    "relax.divide",
    "relax.maximum",
    "relax.minimum",
    "relax.abs",
    "relax.exp",
    "relax.log",
    "relax.sqrt",
    "relax.tanh",
    "relax.erf",
    "relax.greater",
    "relax.less",
    "relax.greater_equal",
    "relax.less_equal",
    gives=("subtract", "multiply", "divide", "maximum", "minimum"),
    pointwise=True,
)
def read_operation(reader: Reader, call: Any, arguments: list) -> Any:
    name = call.op.name.removeprefix("relax.")
    name = {"greater_equal": "at_least", "less_equal": "at_most"}.get(name, name)
    arguments = _constant_first(arguments, call.op.name)
    if any(_compares(one) for one in arguments):
        raise reader.error(f"{name} of a comparison, which is no number,")
    if len(arguments) == 2 and name not in COMPARISONS:
        return operation(reader, name, arguments[0], arguments[1], _shape(call))
    return combined(reader, name, *arguments)


def _compares(operand: Any) -> bool:
    trees = operand.trees.values() if isinstance(operand, Formula) else ()
    return any(isinstance(tree, Apply) and tree.operation in COMPARISONS for tree in trees)


@reads("relax.sigmoid", "relax.nn.silu", "relax.nn.gelu", "relax.nn.gelu_tanh", pointwise=True)
def read_row(reader: Reader, call: Any, arguments: list) -> Any:
    name = call.op.name.rpartition(".")[2]
    return combined(reader, name, *arguments, formula=ACTIVATIONS.find(name).formula)


@reads("relax.power", pointwise=True)
def read_power(reader: Reader, call: Any, arguments: list) -> Any:
    value, exponent = arguments
    formula = POWERS.get(exponent.number) if isinstance(exponent, Fixed) and exponent.number else None
    if formula is None:
        raise reader.error("power with an exponent that is none of " + ", ".join(map(str, POWERS)))
    return combined(reader, "power", value, formula=formula)


@reads("relax.rsqrt", pointwise=True)
def read_rsqrt(reader: Reader, call: Any, arguments: list) -> Any:
    return combined(reader, "rsqrt", *arguments, formula=POWERS[-0.5])


@reads("relax.nn.leakyrelu", pointwise=True)
def read_leaky_relu(reader: Reader, call: Any, arguments: list) -> Any:
    slope = _single(call.attrs.alpha)
    return combined(reader, "leaky_relu", *arguments, formula=select(X > 0, X, slope * X))


@reads("relax.nn.prelu", gives=("prelu",))
def read_prelu(reader: Reader, call: Any, arguments: list) -> Any:
    """Its slope is a parameter: one number, or one a channel."""
    value, slope = reader.activation(arguments[0]), arguments[1]
    if not isinstance(slope, Parameter) or len(reader.shape_of(slope)) != 1:
        raise reader.error("prelu whose slope is no parameter of one number a channel,")
    x, weight = map(Variable, NAMES[:2])
    sizes = (prod(reader.shape_of(slope)), *[1] * (len(value.shape) - 2))
    return combination(
        reader, select(x > 0, x, weight * x), [value, replace(slope, form="shaped", shape=sizes)], value.shape
    )


@reads("relax.negative", pointwise=True)
def read_negative(reader: Reader, call: Any, arguments: list) -> Any:
    return combined(reader, "subtract", Fixed(0.0), *arguments)


@reads("relax.nn.relu", pointwise=True)
def read_relu(reader: Reader, call: Any, arguments: list) -> Any:
    return combined(reader, "maximum", Fixed(0.0), *arguments)


@reads("relax.clip", pointwise=True)
def read_clip(reader: Reader, call: Any, arguments: list) -> Any:
    value, low, high = arguments
    found = value if low.number == -math.inf else combined(reader, "maximum", low, value)
    return found if high.number == math.inf else combined(reader, "minimum", high, found)


@reads("relax.call_tir", pointwise=True)
def read_call_tir(reader: Reader, call: Any, arguments: list) -> Any:
    """ONNX's Clip, which TVM computes by functions of its own: `maximum`, `minimum1`."""
    name = call.args[0].name_hint
    if not re.fullmatch(r"(maximum|minimum)\d*", name):
        raise reader.error(name)
    return combined(reader, name.rstrip("0123456789"), *_constant_first(list(arguments[1]), name))


@reads("relax.stack")
def read_stack(reader: Reader, call: Any, arguments: list) -> Any:
    """Of what ONNX's Max and Min are taken of: a tuple."""
    if int(call.attrs.axis) != 0:
        raise reader.error("stack")
    return arguments[0]


@reads("relax.max", "relax.min")
def read_extremes(reader: Reader, call: Any, arguments: list) -> Any:
    name = call.op.name.removeprefix("relax.")
    if not isinstance(arguments[0], tuple):
        raise reader.error(name)
    found, *others = arguments[0]
    for other in others:
        found = operation(reader, f"{name}imum", found, other, _shape(call))
    return found


@reads("relax.full")
def read_full(reader: Reader, call: Any, arguments: list) -> Any:
    number = arguments[1].number if isinstance(arguments[1], Fixed) else None
    if number is None:
        raise reader.error("full of a value that is no constant")
    return Fixed(array=np.full(_shape(call), number, np.float32))


@reads("relax.isnan")
def read_isnan(reader: Reader, call: Any, arguments: list) -> Any:
    """Of a bound of ONNX's Clip, which is none where it is NaN."""
    if not isinstance(arguments[0], Fixed) or arguments[0].number is None:
        raise reader.error("isnan")
    return Fixed(float(math.isnan(arguments[0].number)))


@reads("relax.where", pointwise=True)
def read_where(reader: Reader, call: Any, arguments: list) -> Any:
    condition, chosen, other = arguments
    if isinstance(condition, Fixed) and condition.array is not None:
        raise reader.error("where of constant places")
    if isinstance(condition, Formula):
        return combined(reader, "select", condition, chosen, other)
    if not isinstance(condition, Fixed) or condition.number is None:
        raise reader.error("where")
    return chosen if condition.number else other


def _constant_first(arguments: list, name: str) -> list:
    """Of `maximum` and `minimum`, in which the second argument's NaN stays."""
    return sorted(arguments, key=lambda argument: not isinstance(argument, Fixed)) if "imum" in name else arguments
