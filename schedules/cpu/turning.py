"""A layer's values in another order, on a CPU, for any number of them."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.layers.turning import CopyValues, TurnUnits
from mest_compile.schedules.cpu.optimizer import CHUNK_ELEMS


@schedule("values.turn", device="cpu")
def turn_units(problem: TurnUnits, target: Target) -> str:
    size = problem.source_block * problem.row_block
    units = max(CHUNK_ELEMS // size, 1)
    text = Text(*(f"{name}_handle: T.handle" for name in ("values", "permutation", "turned")))
    text.symbolic("units", {"values": (f"units * {size}", "float32"), "permutation": ("units", "int32")})
    text.symbolic("m", {"turned": ("m", "float32")})

    def turn(count: str, first: str) -> None:
        with text.nest(f"for u in T.serial({count})"):
            text(f"unit: T.let = {first} * {units} + u", f"there: T.let = permutation[unit] * {size}")
            with text.nest(f"for j in T.unroll({problem.row_block})", f"for k in T.unroll({problem.source_block})"):
                at = f"unit * {size} + k * {problem.row_block} + j"
                text(f"turned[there + j * {problem.source_block} + k] = values[{at}]")

    with text.nest(f"if units >= {units}", f"for chunk in T.parallel(units // {units})"):
        turn(str(units), "chunk")
    turn(f"units % {units}", f"(units // {units})")
    return str(text)


@schedule("values.copy", device="cpu")
def copy_values(problem: CopyValues, target: Target) -> str:
    text = Text(*(f"{name}_handle: T.handle" for name in ("values", "places", "copies")))
    text.symbolic("n", {"values": ("n", "float32")})
    text.symbolic("m", {"places": ("m", "int32")})
    text.symbolic("room", {"copies": ("room", "float32")})
    with text.nest("for i in T.serial(m)"):
        text("copies[i] = values[places[i]]")
    return str(text)
