"""Softmax over channels on a CPU: pixel by pixel, vectors of examples throughout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.softmax import Softmax, SoftmaxBackward
from mest_compile.schedules.cpu.rows import array, loop, narrowed, widened


@contextmanager
def _each_pixel(text: Text, images: dict[str, Image]) -> Iterator[None]:
    """A loop over the pixels of images of one size: sets `<name>_pixel`, where one lies in the first channel."""
    first = next(iter(images.values()))
    with text.nest(f"for n in {loop(first.slices * first.height, first.elems)}", f"for w in T.serial({first.width})"):
        for name, one in images.items():
            plane = f"n // {one.height} * {one.channels * one.channel_elems}"
            text(
                f"{name}_pixel: T.let = {plane} + n % {one.height} * {one.row_elems} + {one.origin} + w * {one.vector}"
            )
        yield


def _at(name: str, image: Image) -> str:
    return f"{name}[{name}_pixel + c * {image.channel_elems} + i]"


@schedule("softmax.forward", device="cpu")
def softmax_forward(problem: Softmax, target: Target) -> str:
    x, y = problem.x, problem.y
    text = Text(array("x", x), array("y", y))
    lanes, channels = f"for i in T.vectorized({x.vector})", f"for c in T.serial({x.channels})"
    here = widened(x, _at("x", x))
    with _each_pixel(text, {"x": x, "y": y}):
        text.local("most", x.vector)
        text.local("total", x.vector)
        with text.nest(lanes):
            text('most[i] = T.float32("-inf")', "total[i] = T.float32(0)")
        with text.nest(channels, lanes):
            text(f"most[i] = T.Select({here} <= most[i], most[i], {here})")  # NaN stays
        with text.nest(channels, lanes):
            text(f"total[i] = total[i] + T.exp({here} - most[i])")
        with text.nest(channels, lanes):
            text(f"{_at('y', y)} = {narrowed(y, f'T.exp({here} - most[i]) / total[i]')}")
    return str(text)


@schedule("softmax.backward", device="cpu")
def softmax_backward(problem: SoftmaxBackward, target: Target) -> str:
    dy, y, dx = problem.dy, problem.y, problem.dx
    images = {"dy": dy, "y": y, "dx": dx}
    text = Text(*(array(name, one) for name, one in images.items()))
    lanes, channels = f"for i in T.vectorized({y.vector})", f"for c in T.serial({y.channels})"
    share, due = widened(y, _at("y", y)), widened(dy, _at("dy", dy))
    with _each_pixel(text, images):
        text.local("total", y.vector)
        with text.nest(lanes):
            text("total[i] = T.float32(0)")
        with text.nest(channels, lanes):
            text(f"total[i] = total[i] + {due} * {share}")
        with text.nest(channels, lanes):
            before = f"{widened(dx, _at('dx', dx))} + " if problem.accumulate else ""
            text(f"{_at('dx', dx)} = {narrowed(dx, f'{before}{share} * ({due} - total[i])')}")
    return str(text)
