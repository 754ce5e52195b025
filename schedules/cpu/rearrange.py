"""Images of other sizes with the same numbers, on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.arrangement import inverse
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.rearrange import Rearrange
from mest_compile.schedules.arranging import place
from mest_compile.schedules.cpu.rows import array, each_row, narrowed, widened


@schedule("rearrange.forward", device="cpu")
def rearrange(problem: Rearrange, target: Target) -> str:
    """Row by row of the wider of both images; a loop for each part of a row, so that no pixel is divided for."""
    x, y = problem.x, problem.y
    walked, other, parts = ("y", "x", problem.parts) if y.width >= x.width else ("x", "y", inverse(problem.parts))
    images = {"x": x, "y": y}
    mine, theirs = images[walked], images[other]
    units = {"C": theirs.channel_elems, "H": theirs.row_elems, "W": theirs.vector}
    loops, column, far, apart = [], [], [], mine.width
    for number, part in enumerate(parts["W"]):
        apart //= part.size
        loops.append(f"for w{number} in T.serial({part.size})")
        column.append(f"w{number} * {apart * mine.vector}")
        far.append(f"w{number} * {part.stride * units[part.dim]}")
    text = Text(*(array(name, image) for name, image in images.items()))
    with each_row(text, {walked: mine}):
        text(
            f"start: T.let = plane // {mine.channels} * {theirs.slice_elems} + {theirs.origin} + "
            + place({"C": "c", "H": "h"}, parts, units)
        )
        with text.nest(*loops, f"for i in T.vectorized({mine.vector})"):
            elements = {
                walked: f"{walked}[{' + '.join([f'{walked}_row', *column, 'i'])}]",
                other: f"{other}[{' + '.join(['start', *far, 'i'])}]",
            }
            value = elements["x"]
            if problem.accumulate:
                value = narrowed(y, f"{widened(y, elements['y'])} + {widened(x, value)}")
            elif x.dtype != y.dtype:
                value = narrowed(y, widened(x, value))
            text(f"{elements['y']} = {value}")
    return str(text)
