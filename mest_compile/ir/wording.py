"""Expressions as text that says what they compute, and back: what a model's graph and a kernel's problem hold of a
formula that has no name.

    as_text(select(X > 0, X, 0.1 * X))   # "select(x > 0.0, x, (0.1 * x))"
"""

from __future__ import annotations

import ast

from mest_compile.base.errors import SpecError
from mest_compile.ir.expressions import INFIX, OPERATIONS, SPELLINGS, Expression, Variable, apply, scalar

SIGNS = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
ORDERS = {ast.Gt: "greater", ast.Lt: "less", ast.GtE: "at_least", ast.LtE: "at_most"}
COMPARISONS = tuple(ORDERS.values())
WORDS = {
    name: spelling
    if name in (*INFIX, *COMPARISONS)
    else f"{name}({', '.join(f'{{{place}}}' for place in range(count))})"
    for name, spelling in SPELLINGS.items()
    for count in [spelling.count("{")]
}


def as_text(expression: Expression) -> str:
    """Of an expression of x."""
    return expression.text({"x": "x"}, repr, WORDS)


def from_text(text: str) -> Expression:
    """Raises SpecError for what `as_text` did not give."""
    try:
        return _read(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, KeyError, TypeError, ValueError) as problem:
        raise SpecError(f"{text!r} is no activation's name and no formula of x") from problem


def _read(node: ast.expr) -> Expression:
    match node:
        case ast.Name("x"):
            return Variable("x")
        case ast.Constant(value):
            return scalar(float(value))  # type: ignore[arg-type]
        case ast.UnaryOp(ast.USub(), ast.Constant(value)):
            return scalar(-float(value))  # type: ignore[arg-type]
        case ast.BinOp(left, sign, right):
            return apply(SIGNS[type(sign)], _read(left), _read(right))
        case ast.Compare(left, [order], [right]):
            return apply(ORDERS[type(order)], _read(left), _read(right))
        case ast.Call(ast.Name(name), arguments, []) if name in OPERATIONS:
            return apply(name, *map(_read, arguments))
    raise ValueError(ast.dump(node))
