"""Expressions as kernels write them: TVMScript with no more brackets than its order of operations needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mest_compile.ir.expressions import Apply, Constant, Expression, Variable

INFIX = {
    "greater": (">", 0),
    "less": ("<", 0),
    "at_least": (">=", 0),
    "at_most": ("<=", 0),
    "add": ("+", 1),
    "subtract": ("-", 1),
    "multiply": ("*", 2),
    "divide": ("/", 2),
}  # operation: (sign, how tightly it holds together)
FUNCTIONS = {
    "maximum": "max",
    "minimum": "min",
    "abs": "abs",
    "exp": "exp",
    "log": "log",
    "sqrt": "sqrt",
    "tanh": "tanh",
    "erf": "erf",
    "select": "Select",
}


def written(expression: Expression, names: Mapping[str, str], constant: Callable[[float], str]) -> str:
    """names: {variable: what it is in the kernel, in brackets where it is a sum}; constant: how a float32 that is not
    whole is written."""
    if isinstance(expression, Variable):
        return names[expression.name]
    if isinstance(expression, Constant):
        whole = expression.value.is_integer()
        return f"T.float32({int(expression.value)})" if whole else constant(expression.value)
    assert isinstance(expression, Apply)
    arguments = [written(argument, names, constant) for argument in expression.arguments]
    if expression.operation in FUNCTIONS:
        return f"T.{FUNCTIONS[expression.operation]}({', '.join(arguments)})"
    sign, level = INFIX[expression.operation]
    left, right = map(_level, expression.arguments)
    return f"{_bracketed(arguments[0], left < level)} {sign} {_bracketed(arguments[1], right <= level)}"


def _level(expression: Expression) -> int:
    return INFIX.get(expression.operation, ("", 3))[1] if isinstance(expression, Apply) else 3


def _bracketed(text: str, needed: bool) -> str:
    return f"({text})" if needed else text
