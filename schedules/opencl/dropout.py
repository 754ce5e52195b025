"""Dropout on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.dropout import Dropout
from mest_compile.schedules.mixing import drawn
from mest_compile.schedules.opencl.text import DeviceText, at, full, image, number, scalars, zeros


@schedule("dropout.forward", device="opencl")
def dropout_forward(problem: Dropout, target: Target) -> str:
    x, y, vector = problem.x, problem.y, problem.x.vector
    text = DeviceText(scalars("draw", 1, "int32"), image("x", x), image("y", y))
    # Of an example: how many numbers it draws, and which of them its pixel takes.
    each, mine = {
        "element": (x.channels * x.height * x.width, f"(c * {x.height} + h) * {x.width} + w"),
        "channel": (x.channels, "c"),
        "example": (1, "0"),
        "batch": (0, "0"),
    }[problem.whole]
    with text.each_pixel(y, target.limits.threads):
        first = f'T.cast(plane // {x.channels} * {vector * each} + {mine}, "uint32")'
        place = f"T.Ramp({first}, T.uint32({each}), {vector})" if vector > 1 and each else full(first, vector)

        def whole(value: int) -> str:
            return full(f"T.uint32({value})", vector)

        key = full('T.cast(draw[0], "uint32")', vector)
        text(*drawn(place, key, whole, lambda value, factor: f"{value} * {whole(factor)}"))
        least, scale = full(f"T.uint32({problem.threshold})", vector), full(number(problem.scale), vector)
        value = f"{at('x', x)} * T.Select(bits >= {least}, {scale}, {zeros(vector)})"
        text(f"{at('y', y)} = " + (f"{at('y', y)} + " if problem.accumulate else "") + value)
    return str(text)
