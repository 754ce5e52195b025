"""Resized images on OpenCL. For its gradient a pixel asks which of the result's take something of it: nothing is
scattered, so nothing needs an atomic."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.resize import Resize
from mest_compile.schedules.opencl.text import DeviceText, at, full, image, number, plane_vectors, vector_type, zeros
from mest_compile.schedules.resizing import reaching, taps

ENDS = ("first", "second")


def _element(name: str, layout: Image, row: str, column: str) -> str:
    top, left = layout.halo[:2]
    return f"{name}[plane * {plane_vectors(layout)} + ({row} + {top}) * {layout.columns} + {column} + {left}]"


@schedule("resize.forward", device="opencl")
def resize_forward(problem: Resize, target: Target) -> str:
    x, y, vector = problem.x, problem.y, problem.y.vector
    text = DeviceText(image("x", x), image("y", y))

    def between(values: list[str], share: str) -> str:
        first, second = values
        return f"({first} * {full(f'(T.float32(1) - {share})', vector)} + {second} * {full(share, vector)})"

    with text.each_pixel(y, target.limits.threads):
        text(*taps(problem, 0, "h", "row", number), *taps(problem, 1, "w", "column", number))
        value = _element("x", x, "row_first", "column_first")
        if problem.linear:
            places = [[_element("x", x, f"row_{row}", f"column_{column}") for column in ENDS] for row in ENDS]
            value = between([between(line, "column_share") for line in places], "row_share")
        text(f"{at('y', y)} = {value}")
    return str(text)


@schedule("resize.backward", device="opencl")
def resize_backward(problem: Resize, target: Target) -> str:
    dx, dy, vector = problem.x, problem.y, problem.x.vector
    text = DeviceText(image("dy", dy), image("dx", dx))
    with text.each_pixel(dx, target.limits.threads):
        for name in "total", "line":
            text.private(name, 1, vector_type(vector))
        text(f"total[0] = {zeros(vector)}")
        axes = (("row", "h", "oy", 0), ("column", "w", "ox", 1))
        for name, pixel, _, axis in axes:
            first, last = reaching(problem, axis, pixel, number)
            text(f"{name}_from: T.let = {first}", f"{name}_count: T.let = {last} - {name}_from + 1")
        with text.nest("for ky in T.serial(row_count)"):
            text("oy: T.let = row_from + ky", *taps(problem, 0, "oy", "row", number))
            with text.nest(f"if {_takes('row', 'h', problem.linear)}"):
                text(f"line[0] = {zeros(vector)}")
                with text.nest("for kx in T.serial(column_count)"):
                    text("ox: T.let = column_from + kx", *taps(problem, 1, "ox", "column", number))
                    with text.nest(f"if {_takes('column', 'w', problem.linear)}"):
                        part = _part("column", "w", problem.linear, vector)
                        text(f"line[0] = line[0] + {_element('dy', dy, 'oy', 'ox')}{part}")
                text(f"total[0] = total[0] + line[0]{_part('row', 'h', problem.linear, vector)}")
        text(f"{at('dx', dx)} = " + (f"{at('dx', dx)} + " if problem.accumulate else "") + "total[0]")
    return str(text)


def _takes(name: str, pixel: str, linear: bool) -> str:
    """Whether the result's pixel takes something of the source's."""
    return f"{name}_first == {pixel}" + (f" or {name}_second == {pixel}" if linear else "")


def _part(name: str, pixel: str, linear: bool, vector: int) -> str:
    """Factor: how much."""
    if not linear:
        return ""
    first = f"T.Select({name}_first == {pixel}, T.float32(1) - {name}_share, T.float32(0))"
    second = f"T.Select({name}_second == {pixel}, {name}_share, T.float32(0))"
    return f" * {full(f'({first} + {second})', vector)}"
