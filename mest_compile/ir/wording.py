"""Expressions as text that says what they compute, and back: what a model's graph and a kernel's problem hold of a
formula that has no name.

    as_text(select(X > 0, X, 0.1 * X))   # "select(x > 0.0, x, (0.1 * x))"
"""

from __future__ import annotations

import ast
from collections.abc import Collection

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
    """Of an expression, whose variables are written by their names."""
    return expression.text({name: name for name in expression.variables}, repr, WORDS)


def from_text(text: str, names: Collection[str] = ("x",)) -> Expression:
    """The expression of those variables. Raises SpecError for what `as_text` did not give."""
    try:
        return _read(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, RecursionError, KeyError, TypeError, ValueError) as problem:
        raise SpecError(f"{text!r} is no activation's name and no formula of {', '.join(names)}") from problem


def _read(node: ast.expr, names: Collection[str]) -> Expression:
    def read(part: ast.expr) -> Expression:
        return _read(part, names)

    match node:
        case ast.Name(name) if name in names:
            return Variable(name)
        case ast.Constant(value):
            return scalar(float(value))  # type: ignore[arg-type]
        case ast.UnaryOp(ast.USub(), ast.Constant(value)):
            return scalar(-float(value))  # type: ignore[arg-type]
        case ast.BinOp(left, sign, right):
            return apply(SIGNS[type(sign)], read(left), read(right))
        case ast.Compare(left, [order], [right]):
            return apply(ORDERS[type(order)], read(left), read(right))
        case ast.Call(ast.Name(name), arguments, []) if name in OPERATIONS:
            return apply(name, *map(read, arguments))
    raise ValueError(ast.dump(node))
