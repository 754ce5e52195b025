"""A kernel's syntax tree to TVM's function: what each statement and expression of it builds."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

_OPERATORS = {
    ast.Add: ("_OpAdd", operator.add),
    ast.Sub: ("_OpSub", operator.sub),
    ast.Mult: ("_OpMul", operator.mul),
    ast.Div: ("_OpDiv", operator.truediv),
    ast.FloorDiv: ("_OpFloorDiv", operator.floordiv),
    ast.Mod: ("_OpFloorMod", operator.mod),
    ast.LShift: ("left_shift", operator.lshift),
    ast.RShift: ("right_shift", operator.rshift),
}
_COMPARISONS = {ast.Eq: "EQ", ast.NotEq: "NE", ast.Lt: "LT", ast.LtE: "LE", ast.Gt: "GT", ast.GtE: "GE"}
_JOINTS = {ast.And: "And", ast.Or: "Or"}


class Walker:
    """names: what each name of the text means at this place."""

    def __init__(self) -> None:
        import tvm
        from tvm import tirx
        from tvm.ir.prim import _ffi_api
        from tvm.script import tirx as script
        from tvm.script.ir_builder import IRBuilder

        self._ir, self._tirx, self._script, self._builder = tvm.ir, tirx, script, IRBuilder
        self._infix = {kind: (getattr(_ffi_api, name), plain) for kind, (name, plain) in _OPERATORS.items()}
        self.names: dict[str, Any] = {"T": script}
        self._values: dict[type, Callable[[Any], Any]] = {
            ast.Constant: lambda node: node.value,
            ast.Name: self._name,
            ast.BinOp: self._binary,
            ast.UnaryOp: self._negative,
            ast.Compare: self._compare,
            ast.BoolOp: self.joined,
            ast.Call: self._call,
            ast.Attribute: lambda node: getattr(self.value(node.value), node.attr),
            ast.Subscript: self._subscript,
            ast.Tuple: lambda node: tuple(map(self.value, node.elts)),
            ast.List: lambda node: list(map(self.value, node.elts)),
            ast.Dict: lambda node: dict(zip(map(self.value, node.keys), map(self.value, node.values))),
        }
        self._statements: dict[type, Callable[[Any], None]] = {
            ast.For: self._loop,
            ast.If: self._branch,
            ast.Assign: self._assign,
            ast.AnnAssign: self._let,
            ast.Expr: self._call_only,
        }

    def function(self, definition: ast.FunctionDef) -> Any:
        from tvm.tirx.script.builder import prim_func

        (decorator,) = definition.decorator_list
        if self.value(decorator.func if isinstance(decorator, ast.Call) else decorator) is not self._script.prim_func:
            raise SyntaxError(f"line {decorator.lineno}: a kernel's text is one T.prim_func")
        options = self._options(decorator) if isinstance(decorator, ast.Call) else {}
        with self._builder() as builder:
            with prim_func(**options):
                self._script.func_name(definition.name)
                for argument in definition.args.args:
                    kind = self.value(argument.annotation)
                    self.names[argument.arg] = self._script.arg(
                        argument.arg, kind if isinstance(kind, self._ir.Expr) else kind()
                    )
                self._body(definition.body)
            return builder.get()

    def _body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if type(statement) not in self._statements:
                raise SyntaxError(f"line {statement.lineno}: a kernel has no {type(statement).__name__}")
            self._statements[type(statement)](statement)

    def _bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._builder.name(target.id, value)
            self.names[target.id] = value
            return
        assert isinstance(target, ast.Tuple)
        for each, part in zip(target.elts, value, strict=True):
            self._bind(each, part)

    def _loop(self, loop: ast.For) -> None:
        self._turn(self.value(loop.iter), loop.target, loop.body)

    def _turn(self, frame: Any, target: ast.expr, body: list[ast.stmt]) -> None:
        with frame as counters:
            self._bind(target, counters)
            self._body(body)

    def _branch(self, branch: ast.If) -> None:
        with self._script.If(self.value(branch.test)):
            with self._script.Then():
                self._body(branch.body)
            if branch.orelse:
                with self._script.Else():
                    self._body(branch.orelse)

    def _assign(self, assignment: ast.Assign) -> None:
        (target,) = assignment.targets
        value = self.value(assignment.value)
        if isinstance(target, ast.Subscript):
            self._script.buffer_store(self.value(target.value), value, self.value(target.slice))
        elif isinstance(value, self._ir.Var):
            self._bind(target, value)
        else:
            raise SyntaxError(f"line {assignment.lineno}: a name of a value is written `name: T.let = value`")

    def _let(self, binding: ast.AnnAssign) -> None:
        if self.value(binding.annotation) is not self._script.let or binding.value is None:
            raise SyntaxError(f"line {binding.lineno}: a name of a value is written `name: T.let = value`")
        value = self.value(binding.value)
        if not isinstance(value, self._ir.Expr):
            value = self._tirx.const(value)
        variable = self._tirx.Var("", value.ty)
        self._bind(binding.target, variable)
        self._script.Bind(value, var=variable)

    def _call_only(self, statement: ast.Expr) -> None:
        found = self.value(statement.value)
        if isinstance(found, self._ir.Expr):
            self._script.evaluate(found)

    def value(self, node: ast.expr | None) -> Any:
        """What an expression means: TVM's, or a Python number, tuple or function."""
        if type(node) not in self._values:
            raise SyntaxError(f"line {getattr(node, 'lineno', 0)}: a kernel has no {type(node).__name__}")
        return self._values[type(node)](node)

    def _name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise NameError(f"line {node.lineno}: nothing has the name {node.id}")
        return self.names[node.id]

    def _subscript(self, node: ast.Subscript) -> Any:
        return self.value(node.value)[self.value(node.slice)]

    def _binary(self, node: ast.BinOp) -> Any:
        if type(node.op) not in self._infix:
            raise SyntaxError(f"line {node.lineno}: a kernel has no {type(node.op).__name__}")
        return self._combined(type(node.op), self.value(node.left), self.value(node.right))

    def _combined(self, kind: type[ast.operator], left: Any, right: Any) -> Any:
        build, plain = self._infix[kind]
        if isinstance(left, int | float) and isinstance(right, int | float):
            return plain(left, right)
        return build(left, right, None)

    def _compare(self, node: ast.Compare) -> Any:
        (operation,), (right,) = node.ops, node.comparators
        return getattr(self._tirx, _COMPARISONS[type(operation)])(
            *self._alike(self.value(node.left), self.value(right))
        )

    def joined(self, node: ast.BoolOp) -> Any:
        found, *others = map(self.value, node.values)
        for other in others:
            found = getattr(self._tirx, _JOINTS[type(node.op)])(found, other)
        return found

    def _negative(self, node: ast.UnaryOp) -> Any:
        assert isinstance(node.op, ast.USub)
        return -self.value(node.operand)

    def _alike(self, *values: Any) -> list[Any]:
        """With Python numbers as constants of the type that the others have."""
        kind = next(value.ty.dtype for value in values if isinstance(value, self._ir.Expr))
        return [value if isinstance(value, self._ir.Expr) else self._tirx.const(value, kind) for value in values]

    def _call(self, node: ast.Call) -> Any:
        return self.value(node.func)(*map(self.value, node.args), **self._options(node))

    def _options(self, node: ast.Call) -> dict[str, Any]:
        return {str(option.arg): self.value(option.value) for option in node.keywords}
