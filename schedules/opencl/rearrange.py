"""Images of other sizes with the same numbers, on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.rearrange import Rearrange
from mest_compile.schedules.arranging import place
from mest_compile.schedules.opencl.text import DeviceText, at, image, plane_vectors


@schedule("rearrange.forward", device="opencl")
def rearrange(problem: Rearrange, target: Target) -> str:
    """A thread for each vector that is written."""
    x, y = problem.x, problem.y
    units = {"C": plane_vectors(x), "H": x.columns, "W": 1}
    text = DeviceText(image("x", x), image("y", y))
    with text.each_pixel(y, target.limits.threads):
        start = f"plane // {y.channels} * {x.channels * plane_vectors(x)} + {x.halo[0] * x.columns + x.halo[1]}"
        text(f"from_x: T.let = {start} + " + place({"C": "c", "H": "h", "W": "w"}, problem.parts, units))
        here = at("y", y)
        text(f"{here} = {here} + x[from_x]" if problem.accumulate else f"{here} = x[from_x]")
    return str(text)
