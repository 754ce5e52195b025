"""bfloat16 on processors: LLVM's instructions, as functions that kernels call on whole vectors.

TVM's code generator has no bfloat16: kernels have its bits as uint16, and what turns float32 into them, or multiplies
them, is LLVM text that is put into a kernel's code and inlined there. Names are `mest_<what>_<lanes of the result>`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from mest_compile.hardware.target import Target

LANES = (1, 2, 4, 8, 16, 32, 64)  # of what schedules round at once
ROUNDS, DOT = "mest.to_bfloat16", "mest_dot"

# To nearest, ties to even; NaN stays one.
_ROUND = """define {words} @mest_to_bfloat16_{lanes}({floats} %x) {{
  %bits = bitcast {floats} %x to {ints}
  %upper = lshr {ints} %bits, {sixteen}
  %odd = and {ints} %upper, {one}
  %more = add {ints} %odd, {half}
  %sum = add {ints} %bits, %more
  %rounded = lshr {ints} %sum, {sixteen}
  %nan = fcmp uno {floats} %x, {zero}
  %all = select {bools} %nan, {ints} {quiet}, {ints} %rounded
  %result = trunc {ints} %all to {words}
  ret {words} %result
}}"""
_ROUND_AT_ONCE = """define {words} @mest_to_bfloat16_{lanes}({floats} %x) {{
  %rounded = fptrunc {floats} %x to {halves}
  %result = bitcast {halves} %rounded to {words}
  ret {words} %result
}}"""
# To each float32 the products of a pair are added.
_DOT = """declare {floats} @llvm.x86.avx512bf16.dpbf16ps.{bits}({floats}, {pairs}, {pairs})
define {floats} @mest_dot_{lanes}({floats} %sum, {words} %x, {ints} %y) {{
  %a = bitcast {words} %x to {pairs}
  %b = bitcast {ints} %y to {pairs}
  %result = call {floats} @llvm.x86.avx512bf16.dpbf16ps.{bits}({floats} %sum, {pairs} %a, {pairs} %b)
  ret {floats} %result
}}"""
KEY = (_ROUND, _ROUND_AT_ONCE, _DOT)  # what a kernel's key holds of this


def _vector(kind: str, lanes: int) -> str:
    return f"<{lanes} x {kind}>" if lanes > 1 else kind


def _splat(value: str, kind: str, lanes: int) -> str:
    return f"splat ({kind} {value})" if lanes > 1 else value


@cache
def _helpers(pairs: bool) -> str:
    """pairs: whether there are the instructions."""
    kinds = {"words": "i16", "ints": "i32", "floats": "float", "halves": "bfloat", "bools": "i1"}
    numbers = {"sixteen": "16", "one": "1", "half": "32767", "quiet": "32704"}
    found = []
    for lanes in LANES:
        vectors = {name: _vector(kind, lanes) for name, kind in kinds.items()}
        constants = {name: _splat(value, "i32", lanes) for name, value in numbers.items()}
        zero = _splat("0.0", "float", lanes)
        found.append((_ROUND_AT_ONCE if pairs else _ROUND).format(lanes=lanes, zero=zero, **vectors, **constants))
    for lanes in (4, 8, 16) if pairs else ():
        vectors = {name: _vector(kinds[name], lanes) for name in ("floats", "ints")}
        words, bfloats = _vector("i16", 2 * lanes), _vector("bfloat", 2 * lanes)
        found.append(_DOT.format(lanes=lanes, bits=32 * lanes, words=words, pairs=bfloats, **vectors))
    return "\n".join(found)


def helped(function: Any, text: str, target: Target) -> Any:
    """The function of a kernel's text, with what it calls where it has bfloat16."""
    if ROUNDS not in text and DOT not in text:
        return function
    from tvm import ir, tirx

    zero, helpers = tirx.const(0, "int32"), ir.StringImm(_helpers(target.pairs))
    return function.with_body(tirx.AttrStmt(zero, "pragma_import_llvm", helpers, function.body))


def teach_tvm() -> None:
    """Names the rounding as an operation that vectors have, and how code for CPUs computes it."""
    import tvm
    from tvm.ir.op import _ffi_api

    def lowered(call: Any) -> Any:
        kind = str(call.ty.dtype)
        return tvm.tirx.call_pure_extern(kind, f"mest_to_bfloat16_{kind.partition('x')[2] or 1}", *call.args)

    _ffi_api.RegisterOp(ROUNDS, "the bits of a float32 rounded to bfloat16")
    tvm.ir.register_op_attr(ROUNDS, "TVectorizable", True)
    tvm.ir.register_op_attr(ROUNDS, "TCallEffectKind", tvm.tirx.CallEffectKind.Pure.value)
    tvm.tirx.register_intrin_lowering(ROUNDS, target="llvm", f=lowered, level=120)
