"""Softmax over channels on OpenCL: a thread for each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.softmax import Softmax, SoftmaxBackward
from mest_compile.schedules.opencl.text import DeviceText, at, full, image, vector_type, zeros


@contextmanager
def _each_pixel(text: DeviceText, layout: Image, threads: int) -> Iterator[None]:
    """Sets `s` (slice), `h` and `w`."""
    pixels = layout.height * layout.width
    with text.each(layout.slices * pixels, threads):
        text(
            f"s: T.let = n // {pixels}",
            f"h: T.let = n % {pixels} // {layout.width}",
            f"w: T.let = n % {layout.width}",
        )
        yield


@contextmanager
def _each_channel(text: DeviceText, layout: Image) -> Iterator[None]:
    with text.nest(f"for c in T.serial({layout.channels})"):
        text(f"plane: T.let = s * {layout.channels} + c")
        yield


@schedule("softmax.forward", device="opencl")
def softmax_forward(problem: Softmax, target: Target) -> str:
    x, y, vector = problem.x, problem.y, problem.x.vector
    text = DeviceText(image("x", x), image("y", y))
    least, here = full('T.float32("-inf")', vector), at("x", x)
    with _each_pixel(text, x, target.limits.threads):
        text.private("most", 1, vector_type(vector))
        text.private("total", 1, vector_type(vector))
        text(f"most[0] = {least}", f"total[0] = {zeros(vector)}")
        with _each_channel(text, x):
            text(f"most[0] = T.Select({here} <= most[0], most[0], {here})")  # NaN stays
        with _each_channel(text, x):
            text(f"total[0] = total[0] + T.exp({here} - most[0])")
        with _each_channel(text, x):
            text(f"{at('y', y)} = T.exp({here} - most[0]) / total[0]")
    return str(text)


@schedule("softmax.backward", device="opencl")
def softmax_backward(problem: SoftmaxBackward, target: Target) -> str:
    dy, y, dx, vector = problem.dy, problem.y, problem.dx, problem.y.vector
    text = DeviceText(image("dy", dy), image("y", y), image("dx", dx))
    with _each_pixel(text, y, target.limits.threads):
        text.private("total", 1, vector_type(vector))
        text(f"total[0] = {zeros(vector)}")
        with _each_channel(text, y):
            text(f"total[0] = total[0] + {at('dy', dy)} * {at('y', y)}")
        with _each_channel(text, y):
            before = f"{at('dx', dx)} + " if problem.accumulate else ""
            text(f"{at('dx', dx)} = {before}{at('y', y)} * ({at('dy', dy)} - total[0])")
    return str(text)
