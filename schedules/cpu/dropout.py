"""Dropout on a CPU."""

from __future__ import annotations

from dataclasses import replace

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.dropout import Dropout
from mest_compile.schedules.cpu.rows import array, buffer, each_row, narrowed, number, walk_row, widened
from mest_compile.schedules.mixing import drawn


@schedule("dropout.forward", device="cpu")
def dropout_forward(problem: Dropout, target: Target) -> str:
    x, y = problem.x, problem.y
    text = Text(buffer("draw", 1, "int32"), array("x", x), array("y", y))
    with each_row(text, {"x": x, "y": y}):
        text('key: T.let = T.cast(draw[0], "uint32")')
        pixels = x.height * x.width
        example = f"(plane // {x.channels} * {x.vector} + i)"
        channel = f"({example} * {x.channels} + c)"

        def body(at: str, slot: str, live: str | None) -> list[str]:
            pixel = f"h * {x.width} + ({at}) // {x.vector}"
            places = {
                "element": f"{channel} * {pixels} + {pixel}",
                "channel": channel,
                "example": example,
                "batch": "0",
            }
            place = places[problem.whole]
            kept = f"T.Select(bits >= T.uint32({problem.threshold}), {number(problem.scale)}, T.float32(0))"
            value = f"{widened(x, f'x[x_row + {at}]')} * {kept}"
            before = f"{widened(y, f'y[y_row + {at}]')} + " if problem.accumulate else ""
            draw = drawn(f'T.cast({place}, "uint32")', "key", lambda value: f"T.uint32({value})", _product)
            return [*draw, f"y[y_row + {at}] = {narrowed(y, before + value)}"]

        walk_row(text, replace(y, abreast=1), body)
    return str(text)


def _product(value: str, factor: int) -> str:
    """In 64 bits: TVM lets LLVM believe that a product of uint32 never has more than 32."""
    return f'T.cast(T.cast({value}, "uint64") * T.uint64({factor}), "uint32")'
