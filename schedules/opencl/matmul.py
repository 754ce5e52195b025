"""Products of matrices on OpenCL: a thread for each vector of the result."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.matmul import Product
from mest_compile.schedules.opencl.text import DeviceText, at, image, plane_vectors, vector_type, zeros


def _at(name: str, layout: Image, row: str, column: str) -> str:
    top, left = layout.halo[:2]
    place = f"({row} + {top}) * {layout.columns} + {column} + {left}"
    return f"{name}[plane * {plane_vectors(layout)} + {place}]"


@schedule("matmul.forward", device="opencl")
def matmul(problem: Product, target: Target) -> str:
    y, vector = problem.y, problem.y.vector
    text = DeviceText(image("a", problem.a), image("b", problem.b), image("y", y))
    with text.each_pixel(y, target.limits.threads):
        text.private("total", 1, vector_type(vector))
        text(f"total[0] = {zeros(vector)}")
        with text.nest(f"for k in T.serial({problem.depth})"):
            a = _at("a", problem.a, *(("k", "h") if problem.turned[0] else ("h", "k")))
            b = _at("b", problem.b, *(("w", "k") if problem.turned[1] else ("k", "w")))
            text(f"total[0] = total[0] + {a} * {b}")
        here = at("y", y)
        text(f"{here} = {here} + total[0]" if problem.accumulate else f"{here} = total[0]")
    return str(text)
