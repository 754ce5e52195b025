"""Chains of operators on single numbers, read as the activation that they compute: x * clip(x + 3, 0, 6) / 6 is a
hardswish however it is written, and importers and exporters write it in many ways.

What a chain computes is followed as its values at `POINTS`, and compared with those of the known activations whenever
an operator is added to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mest_compile.frontend.relax_graph import Fixed, Formula, Parameter, Reader, Value, _single, reads
from mest_compile.ir.expressions import OPERATIONS
from mest_compile.ir.graph import Preparation
from mest_compile.operators.activation import ACTIVATIONS, POINTS

STEPS = ("add", "subtract", "multiply", "divide")  # of an input's normalisation
ROUNDING = 1e-6  # relative and absolute: a file's constants are float32, and 0.16666667 is not a sixth


def combined(
    reader: Reader, operation: str, *operands: Any, compute: Callable[..., Any] | None = None
) -> Value | Formula | Fixed:
    """The result of an operation of `ir.expressions`, or of another that `compute` says in numpy, on activations,
    formulas and numbers. Raises UnsupportedOperator."""
    compute = compute or OPERATIONS[operation].numpy
    numbers = [operand.number if isinstance(operand, Fixed) else None for operand in operands]
    forms = [
        None if number is not None else _forms(reader, operand)
        for operand, number in zip(operands, numbers, strict=True)
    ]
    with np.errstate(all="ignore"):
        if None not in numbers:
            return Fixed(float(compute(*numbers)))
        shared = [base for base in next(filter(None, forms)) if all(form is None or base in form for form in forms)]
        found = {
            base: compute(
                *(number if form is None else form[base] for number, form in zip(numbers, forms, strict=True))
            )
            for base in shared
        }
    names = tuple(dict.fromkeys(name for operand in operands if isinstance(operand, Formula) for name in operand.names))
    names += (reader.name or operation,) if (reader.name or operation) not in names else ()
    written = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if not found:
        raise reader.error(f"{written} of two activations")
    for base in sorted(found, key=lambda base: -base.draft):
        for row in ACTIVATIONS.load().values():
            if np.allclose(row.formula.evaluate(x=POINTS), found[base], ROUNDING, ROUNDING, equal_nan=True):
                value = reader.add(row.name, (base,), base.shape)
                reader.forms[value] = found
                return value
    error = reader.error(written if reader.name else f"{written} of a constant")
    return Formula(found, names, error, *_prepared(reader, operation, operands, numbers))


def product(reader: Reader, a: Value, b: Value) -> Value:
    """An activation where both are functions of one and it is known, else their product. Raises UnsupportedOperator."""
    if a.shape != b.shape:
        a, b = (b, a) if a.shape[2:] == (1, 1) else (a, b)
        if a.shape[:2] != b.shape[:2] or b.shape[2:] != (1, 1) or len(a.shape) != 4:
            raise reader.error(f"multiply of {a.shape} and {b.shape}, which are no map and a number a channel,")
        return reader.add("multiply", (a, b), a.shape)
    related = [form for form in _forms(reader, a) if form in _forms(reader, b)]
    found = combined(reader, "multiply", a, b) if related else None
    if isinstance(found, Value):
        return found
    value = reader.add("multiply", (a, b), a.shape)
    if isinstance(found, Formula):
        reader.forms[value] = found.forms
    return value


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
    gives=("multiply",),
)
def read_operation(reader: Reader, call: Any, arguments: list) -> Any:
    operation = call.op.name.removeprefix("relax.")
    if (prepared := channel_step(reader, operation, arguments)) is not None:
        return prepared
    if operation == "multiply" and all(isinstance(argument, Value) for argument in arguments):
        return product(reader, *arguments)
    return combined(reader, operation, *_constant_first(arguments, call.op.name))


@reads("relax.sigmoid", "relax.nn.silu", "relax.nn.gelu", "relax.nn.gelu_tanh")
def read_row(reader: Reader, call: Any, arguments: list) -> Any:
    name = call.op.name.rpartition(".")[2]
    row = ACTIVATIONS.find(name)
    return combined(reader, name, *arguments, compute=lambda x: row.forward_reference(x))


@reads("relax.nn.leakyrelu")
def read_leaky_relu(reader: Reader, call: Any, arguments: list) -> Any:
    slope = _single(call.attrs.alpha)
    return combined(
        reader, f"leaky_relu of slope {slope:g}", *arguments, compute=lambda x: np.where(x > 0, x, slope * x)
    )


@reads("relax.negative")
def read_negative(reader: Reader, call: Any, arguments: list) -> Any:
    return combined(reader, "subtract", Fixed(0.0), *arguments)


@reads("relax.nn.relu")
def read_relu(reader: Reader, call: Any, arguments: list) -> Any:
    return combined(reader, "maximum", Fixed(0.0), *arguments)


@reads("relax.clip")
def read_clip(reader: Reader, call: Any, arguments: list) -> Any:
    value, low, high = arguments
    found = value if low.number == -math.inf else combined(reader, "maximum", low, value)
    return found if high.number == math.inf else combined(reader, "minimum", high, found)


@reads("relax.call_tir")
def read_call_tir(reader: Reader, call: Any, arguments: list) -> Any:
    """ONNX's Clip, which TVM computes by functions of its own: `maximum`, `minimum1`."""
    name = call.args[0].name_hint
    if not re.fullmatch(r"(maximum|minimum)\d*", name):
        raise reader.error(name)
    return combined(reader, name.rstrip("0123456789"), *_constant_first(list(arguments[1]), name))


@reads("relax.isnan")
def read_isnan(reader: Reader, call: Any, arguments: list) -> Any:
    """Of a bound of ONNX's Clip, which is none where it is NaN."""
    if not isinstance(arguments[0], Fixed) or arguments[0].number is None:
        raise reader.error("isnan")
    return Fixed(float(math.isnan(arguments[0].number)))


@reads("relax.where")
def read_where(reader: Reader, call: Any, arguments: list) -> Any:
    condition, chosen, other = arguments
    if isinstance(condition, Formula):
        return combined(reader, "select", condition, chosen, other)
    if not isinstance(condition, Fixed) or condition.number is None:
        raise reader.error("where")
    return chosen if condition.number else other


def _constant_first(arguments: list, name: str) -> list:
    """Of `maximum` and `minimum`, in which the second argument's NaN stays."""
    return sorted(arguments, key=lambda argument: not isinstance(argument, Fixed)) if "imum" in name else arguments
