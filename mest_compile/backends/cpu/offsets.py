"""Kernels of arguments that begin somewhere in an allocation: TVM's packed API takes a tensor's `byte_offset` to be 0,
where DLPack says that its elements begin that far behind `data`, and TVM's virtual machine makes such views."""

from __future__ import annotations

from typing import Any

NAME = "mest.offsets"  # among the passes of a kernel's code
_DATA, _BYTE_OFFSET = 1, 8  # kinds of tvm_struct_get: fields of a DLTensor


def made() -> Any:
    """The pass, to be run behind MakePackedAPI."""
    import tvm

    def function(one: Any, module: Any, context: Any) -> Any:
        return one.with_body(_statement(one.body))

    return tvm.tirx.transform.prim_func_pass(function, opt_level=0, name=NAME)


def _statement(statement: Any) -> Any:
    """With arguments declared where their elements begin, and not asked to begin where their memory does. They stand
    before the kernel's own statements, in sequences and attributes."""
    from tvm import ir, tirx

    if isinstance(statement, tirx.SeqStmt):
        kept = [one for one in statement.seq if not _is_check(one)]
        return tirx.SeqStmt([_statement(one) for one in kept])
    if isinstance(statement, tirx.AttrStmt):
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, _statement(statement.body))
    if isinstance(statement, tirx.DeclBuffer) and (handle := _field(statement.data, _DATA)) is not None:
        offset = ir.Call(
            "tirx.tvm_struct_get", [handle, *(tirx.IntImm("int32", one) for one in (0, _BYTE_OFFSET))], ret_ty="uint64"
        )
        begins = ir.Call(
            "tirx.handle_add_byte_offset", [statement.data.args[0], tirx.Cast("int64", offset)], ret_ty="handle"
        )
        return tirx.DeclBuffer(statement.buffer, data=ir.Call(statement.data.op, [begins], ret_ty=statement.data.ty))
    return statement


def _is_check(statement: Any) -> bool:
    from tvm import tirx

    return (
        isinstance(statement, tirx.AssertStmt)
        and isinstance(statement.condition, tirx.EQ)
        and _field(statement.condition.b, _BYTE_OFFSET) is not None
    )


def _field(expression: Any, kind: int) -> Any:
    """The DLTensor of which it reads that field, or None."""
    from tvm import ir

    while isinstance(expression, ir.Call) and expression.op.name == "tirx.reinterpret":
        expression = expression.args[0]
    if isinstance(expression, ir.Call) and expression.op.name == "tirx.tvm_struct_get":
        handle, _, field = expression.args
        if int(field) == kind:
            return handle
    return None
