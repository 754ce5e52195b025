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
    each = 1 if problem.whole else x.height * x.width
    with text.each_pixel(y, target.limits.threads):
        first = f"(plane // {x.channels} * {vector * x.channels} + c) * {each}" + (
            "" if problem.whole else (f" + h * {x.width} + w")
        )
        first, stride = f'T.cast({first}, "uint32")', x.channels * each
        place = f"T.Ramp({first}, T.uint32({stride}), {vector})" if vector > 1 else first

        def whole(value: int) -> str:
            return full(f"T.uint32({value})", vector)

        key = full('T.cast(draw[0], "uint32")', vector)
        text(*drawn(place, key, whole, lambda value, factor: f"{value} * {whole(factor)}"))
        least, scale = full(f"T.uint32({problem.threshold})", vector), full(number(problem.scale), vector)
        value = f"{at('x', x)} * T.Select(bits >= {least}, {scale}, {zeros(vector)})"
        text(f"{at('y', y)} = " + (f"{at('y', y)} + " if problem.accumulate else "") + value)
    return str(text)
