"""Pooling on OpenCL. Backward kernels ask, for every pixel, which windows hold it: nothing is scattered, so nothing
needs an atomic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.pool import AvgPoolBackward, GlobalPool, MaxPoolBackward, Pool
from mest_compile.schedules.opencl.text import (
    DeviceText,
    at,
    full,
    image,
    infinity,
    number,
    plane_vectors,
    vector_type,
    zeros,
)
from mest_compile.schedules.windows import corner_and_end, holding, share

_AXES = (("h", "top", "tall", 0), ("w", "left", "wide", 1))  # pixel, window's corner, window's size


def _set_window(text: DeviceText, problem: Pool, pixels: tuple[str, str]) -> None:
    """Sets, for a result pixel, the window's corner (`top`, `left`) in the image and its size (`tall`, `wide`) within
    the image."""
    for (_, corner, size, axis), pixel in zip(_AXES, pixels, strict=True):
        first, end = corner_and_end(problem, axis, pixel)
        text(f"{corner}: T.let = {first}", f"{size}: T.let = {end} - {corner}")


def _tap(name: str, layout: Image) -> str:
    return (
        f"{name}[plane * {plane_vectors(layout)} + (top + ky + {layout.halo[0]}) * {layout.columns} + left + "
        f"kx + {layout.halo[1]}]"
    )


def _share(problem: Pool, pixels: tuple[str, str]) -> str:
    """What each value of an average counts."""
    return share(problem, pixels, ("tall", "wide"), number)


def _forward(problem: Pool, start: str, step: str, last: str, target: Target) -> str:
    x, y = problem.x, problem.y
    text = DeviceText(image("x", x), image("y", y))
    with text.each_pixel(y, target.limits.threads):
        _set_window(text, problem, ("h", "w"))
        text.private("value", 1, vector_type(x.vector))
        text(f"value[0] = {start}")
        with text.nest("for ky in T.serial(tall)", "for kx in T.serial(wide)"):
            text(f"value[0] = {step.format(_tap('x', x))}")
        text(f"{at('y', y)} = {last}")
    return str(text)


@schedule("max_pool2d.forward", device="opencl")
def max_pool_forward(problem: Pool, target: Target) -> str:
    vector = problem.x.vector
    # NaN stays, as in torch
    larger = f"T.Select({{0}} <= {infinity(vector)}, T.Select({{0}} > value[0], {{0}}, value[0]), {{0}})"
    return _forward(problem, full('T.float32("-inf")', vector), larger, "value[0]", target)


@schedule("avg_pool2d.forward", device="opencl")
def avg_pool_forward(problem: Pool, target: Target) -> str:
    vector = problem.x.vector
    part = full(_share(problem, ("h", "w")), vector)
    return _forward(problem, zeros(vector), "value[0] + {}", f"value[0] * {part}", target)


@contextmanager
def _each_window_of(text: DeviceText, problem: Pool) -> Iterator[None]:
    """Loops `oy`, `ox` over the result pixels whose windows hold the pixel (h, w), in reading order; sets their
    windows."""
    loops = []
    for (pixel, _, _, axis), name in zip(_AXES, ("y", "x"), strict=True):
        first, last = holding(problem, axis, pixel)
        text(f"first_{name}: T.let = {first}", f"count_{name}: T.let = T.max({last} - first_{name} + 1, 0)")
        loops.append(f"for k{name}_window in T.serial(count_{name})")
    with text.nest(*loops):
        text("oy: T.let = first_y + ky_window", "ox: T.let = first_x + kx_window")
        _set_window(text, problem, ("oy", "ox"))
        yield


def _result(name: str, layout: Image) -> str:
    return (
        f"{name}[plane * {plane_vectors(layout)} + (oy + {layout.halo[0]}) * {layout.columns} + ox + {layout.halo[1]}]"
    )


def _store(text: DeviceText, problem: MaxPoolBackward | AvgPoolBackward) -> None:
    here = at("dx", problem.dx)
    text(f"{here} = {here} + total[0]" if problem.accumulate else f"{here} = total[0]")


@schedule("max_pool2d.backward", device="opencl")
def max_pool_backward(problem: MaxPoolBackward, target: Target) -> str:
    """A pixel has a window's gradient where no earlier value of the window is as large and no later one is larger. NaN
    is larger than any number and, as in torch, than the NaN before it.
    """
    x, dx, vector = problem.forward.x, problem.dx, problem.dx.vector
    text = DeviceText(image("dy", problem.dy), image("x", x), image("dx", dx))
    with text.each_pixel(dx, target.limits.threads):
        text.private("total", 1, vector_type(vector))
        text.private("open", 1, vector_type(vector))
        text(f"total[0] = {zeros(vector)}")
        with _each_window_of(text, problem.forward):
            text(f"open[0] = {_result('dy', problem.dy)}")
            with text.nest("for ky in T.serial(tall)", "for kx in T.serial(wide)"):
                tap, here = _tap("x", x), at("x", x)
                with text.nest("if top + ky < h or (top + ky == h and left + kx < w)"):
                    text(
                        f"open[0] = T.Select({tap} < {here}, open[0], T.Select({here} <= {infinity(vector)}, "
                        f"{zeros(vector)}, open[0]))"
                    )
                with text.nest("else", "if top + ky > h or left + kx > w"):
                    least = f"T.Select({here} <= {infinity(vector)}, {here}, {infinity(vector)})"
                    text(f"open[0] = T.Select({tap} <= {least}, open[0], {zeros(vector)})")
            text("total[0] = total[0] + open[0]")
        _store(text, problem)
    return str(text)


@schedule("avg_pool2d.backward", device="opencl")
def avg_pool_backward(problem: AvgPoolBackward, target: Target) -> str:
    dx, vector = problem.dx, problem.dx.vector
    text = DeviceText(image("dy", problem.dy), image("dx", dx))
    with text.each_pixel(dx, target.limits.threads):
        text.private("total", 1, vector_type(vector))
        text(f"total[0] = {zeros(vector)}")
        part = _share(problem.forward, ("oy", "ox"))
        with _each_window_of(text, problem.forward):
            text(f"total[0] = total[0] + {_result('dy', problem.dy)} * {full(part, vector)}")
        _store(text, problem)
    return str(text)


@schedule("global_avg_pool.forward", device="opencl")
def global_avg_pool_forward(problem: GlobalPool, target: Target) -> str:
    """Sums row by row, so that rounding grows with height + width and not with their product."""
    x, y, vector = problem.x, problem.y, problem.x.vector
    text = DeviceText(image("x", x), image("y", y))
    with text.each(x.slices * x.channels, target.limits.threads):
        text("plane: T.let = n")
        for name in "total", "line":
            text.private(name, 1, vector_type(vector))
        text(f"total[0] = {zeros(vector)}")
        with text.nest(f"for h in T.serial({x.height})"):
            text(f"line[0] = {zeros(vector)}")
            with text.nest(f"for w in T.serial({x.width})"):
                text(f"line[0] = line[0] + {at('x', x)}")
            text("total[0] = total[0] + line[0]")
        text(
            f"y[plane * {plane_vectors(y)} + {y.halo[0] * y.columns + y.halo[1]}] = "
            f"total[0] * {full(number(1 / (x.height * x.width)), vector)}"
        )
    return str(text)


@schedule("global_avg_pool.backward", device="opencl")
def global_avg_pool_backward(problem: GlobalPool, target: Target) -> str:
    dx, dy, vector = problem.x, problem.y, problem.x.vector
    text = DeviceText(image("dy", dy), image("dx", dx))
    with text.each_pixel(dx, target.limits.threads):
        value = (
            f"dy[plane * {plane_vectors(dy)} + {dy.halo[0] * dy.columns + dy.halo[1]}] * "
            f"{full(number(1 / (dx.height * dx.width)), vector)}"
        )
        text(f"{at('dx', dx)} = " + (f"{at('dx', dx)} + " if problem.accumulate else "") + value)
    return str(text)
