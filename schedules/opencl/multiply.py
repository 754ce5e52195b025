"""Products of two activations on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.multiply import Multiply, MultiplyBackward, is_gate
from mest_compile.schedules.opencl.text import DeviceText, at, image, plane_vectors, vector_type, zeros


@schedule("multiply.forward", device="opencl")
def multiply_forward(problem: Multiply, target: Target) -> str:
    text = DeviceText(image("a", problem.a), image("b", problem.b), image("y", problem.y))
    with text.each_pixel(problem.y, target.limits.threads):
        text(f"{at('y', problem.y)} = {at('a', problem.a)} * {_factor(problem.a, problem.b)}")
    return str(text)


@schedule("multiply.backward", device="opencl")
def multiply_backward(problem: MultiplyBackward, target: Target) -> str:
    """A thread for each pixel, and one for each gate, which sums row by row, so that rounding grows with height +
    width."""
    dy, a, b, da, db = problem.dy, problem.a, problem.b, problem.da, problem.db
    images = {name: one for name, one in (("dy", dy), ("a", a), ("b", b), ("da", da), ("db", db)) if one}
    text = DeviceText(*(image(name, one) for name, one in images.items()))
    upstream = at("dy", dy)

    def added(name: str, element: str, value: str) -> str:
        return f"{element} = " + (f"{element} + " if problem.accumulate[name == "db"] else "") + value

    gate = db is not None and is_gate(dy, db)
    if da or not gate:
        with text.each_pixel(dy, target.limits.threads):
            if da and b:
                text(added("da", at("da", da), f"{upstream} * {_factor(dy, b)}"))
            if db and a and not gate:
                text(added("db", at("db", db), f"{upstream} * {at('a', a)}"))
    if db and a and gate:
        with text.each(dy.slices * dy.channels, target.limits.threads):
            text("plane: T.let = n")
            for name in "total", "line":
                text.private(name, 1, vector_type(dy.vector))
            text(f"total[0] = {zeros(dy.vector)}")
            with text.nest(f"for h in T.serial({dy.height})"):
                text(f"line[0] = {zeros(dy.vector)}")
                with text.nest(f"for w in T.serial({dy.width})"):
                    text(f"line[0] = line[0] + {upstream} * {at('a', a)}")
                text("total[0] = total[0] + line[0]")
            text(added("db", _only(db, "db"), "total[0]"))
    return str(text)


def _only(layout: Image, name: str) -> str:
    """The vector of the only pixel of `plane`."""
    return f"{name}[plane * {plane_vectors(layout)} + {layout.halo[0] * layout.columns + layout.halo[1]}]"


def _factor(layout: Image, b: Image) -> str:
    return _only(b, "b") if is_gate(layout, b) else at("b", b)
