"""Resized images on a CPU. Gradients are scattered, so threads share channels only."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.resize import Resize
from mest_compile.schedules.cpu.rows import array, each_row, loop, narrowed, number, widened
from mest_compile.schedules.resizing import taps


def _element(name: str, image: Image, row: str, column: str) -> str:
    place = f"{row} * {image.row_elems} + {column} * {image.vector} + i"
    return f"{name}[plane * {image.channel_elems} + {image.origin} + {place}]"


@schedule("resize.forward", device="cpu")
def resize_forward(problem: Resize, target: Target) -> str:
    x, y = problem.x, problem.y
    text = Text(array("x", x), array("y", y))

    def tap(row: str, column: str) -> str:
        return widened(x, _element("x", x, f"row_{row}", f"column_{column}"))

    def line(row: str) -> str:
        if not problem.linear:
            return tap(row, "first")
        return f"({tap(row, 'first')} * (T.float32(1) - column_share) + {tap(row, 'second')} * column_share)"

    with each_row(text, {"y": y}):
        text(*taps(problem, 0, "h", "row", number))
        with text.nest(f"for w in T.serial({y.width})"):
            text(*taps(problem, 1, "w", "column", number))
            value = line("first")
            if problem.linear:
                value = f"{value} * (T.float32(1) - row_share) + {line('second')} * row_share"
            with text.nest(f"for i in T.vectorized({y.vector})"):
                text(f"{_element('y', y, 'h', 'w')} = {narrowed(y, value)}")
    return str(text)


@schedule("resize.backward", device="cpu")
def resize_backward(problem: Resize, target: Target) -> str:
    dx, dy, vector = problem.x, problem.y, f"for i in T.vectorized({problem.x.vector})"
    text = Text(array("dy", dy), array("dx", dx))
    with text.nest(f"for plane in {loop(dx.slices * dx.channels, dy.elems)}"):
        if not problem.accumulate:
            with text.nest(f"for h, w in T.grid({dx.height}, {dx.width})", vector):
                text(f"{_element('dx', dx, 'h', 'w')} = {narrowed(dx, 'T.float32(0)')}")
        with text.nest(f"for h in T.serial({dy.height})"):
            text(*taps(problem, 0, "h", "row", number))
            with text.nest(f"for w in T.serial({dy.width})"):
                text(*taps(problem, 1, "w", "column", number))
                given = widened(dy, _element("dy", dy, "h", "w"))
                for row, down in _shares("row", problem.linear):
                    for column, across in _shares("column", problem.linear):
                        element = _element("dx", dx, row, column)
                        value = f"{widened(dx, element)} + {given}{down}{across}"
                        with text.nest(vector):
                            text(f"{element} = {narrowed(dx, value)}")
    return str(text)


def _shares(name: str, linear: bool) -> list[tuple[str, str]]:
    """(pixel of the source, factor of its share) along an axis."""
    if not linear:
        return [(f"{name}_first", "")]
    return [(f"{name}_first", f" * (T.float32(1) - {name}_share)"), (f"{name}_second", f" * {name}_share")]
