"""Pooling on a CPU, vectors over the batch. Backward kernels scatter, so threads share channels only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware import Target
from mest_compile.operators.pool import AvgPoolBackward, GlobalPool, MaxPoolBackward, Pool
from mest_compile.registry import schedule
from mest_compile.schedules.cpu_rows import Text, buffer, each_row, loop, number
from mest_compile.spec import Image


def _set_window(text: Text, problem: Pool) -> None:
    """Sets, for the result pixel (h, w), the window's corner (`top`, `left`) in the image and its size (`tall`, `wide`)."""
    for corner, size, pixel, axis, extent in (("top", "tall", "h", 0, problem.x.height), ("left", "wide", "w", 1, problem.x.width)):
        kernel, stride, padding = problem.kernel[axis], problem.stride[axis], problem.padding[axis]
        if padding:
            text(f"{corner}: T.let = T.max({pixel} * {stride} - {padding}, 0)",
                 f"{size}: T.let = T.min({pixel} * {stride} + {kernel - padding}, {extent}) - {corner}")
        else:
            text(f"{corner}: T.let = {pixel} * {stride}")


@contextmanager
def _each_tap(text: Text, problem: Pool) -> Iterator[None]:
    """Loops `ky`, `kx` over the window that `_set_window` found."""
    loops = [f"for {name} in " + (f"T.serial({size})" if problem.padding[axis] else f"T.unroll({problem.kernel[axis]})")
             for axis, (name, size) in enumerate((("ky", "tall"), ("kx", "wide")))]
    with text.nest(*loops):
        yield


def _tap(name: str, image: Image) -> str:
    return (f"{name}[plane * {image.channel_elems} + {image.origin} + (top + ky) * {image.row_elems} + "
            f"(left + kx) * {image.vector} + i]")


def _pixel(name: str, image: Image) -> str:
    return f"{name}[plane * {image.channel_elems} + {image.origin} + h * {image.row_elems} + w * {image.vector} + i]"


def _share(problem: Pool) -> str:
    """What each value of an average counts."""
    if problem.count_include_pad or not any(problem.padding):
        return number(1 / (problem.kernel[0] * problem.kernel[1]))
    tall, wide = ((size if problem.padding[axis] else str(problem.kernel[axis])) for axis, size in enumerate(("tall", "wide")))
    return f'(T.float32(1) / T.cast({tall} * {wide}, "float32"))'


def _forward(problem: Pool, start: str, step: str, last: str) -> str:
    x, y = problem.x, problem.y
    text = Text(buffer("x", x.elems), buffer("y", y.elems))
    vector = f"for i in T.vectorized({x.vector})"
    with each_row(text, {"y": y}):
        with text.nest(f"for w in T.serial({y.width})"):
            _set_window(text, problem)
            text.local("value", x.vector)
            with text.nest(vector):
                text(f"value[i] = {start}")
            with _each_tap(text, problem), text.nest(vector):
                text(f"value[i] = {step.format(_tap('x', x))}")
            with text.nest(vector):
                text(f"{_pixel('y', y)} = {last}")
    return str(text)


@schedule("max_pool2d.forward", device="cpu")
def max_pool_forward(problem: Pool, target: Target) -> str:
    return _forward(problem, 'T.float32("-inf")', "T.max(value[i], {})", "value[i]")


@schedule("avg_pool2d.forward", device="cpu")
def avg_pool_forward(problem: Pool, target: Target) -> str:
    return _forward(problem, "T.float32(0)", "value[i] + {}", f"value[i] * {_share(problem)}")


def _written_once(problem: Pool) -> bool:
    """Every pixel of x is in exactly one window."""
    return problem.kernel == problem.stride and problem.padding == (0, 0) and \
        (problem.x.height, problem.x.width) == (problem.y.height * problem.stride[0], problem.y.width * problem.stride[1])


@contextmanager
def _each_window_of_gradient(text: Text, problem: MaxPoolBackward | AvgPoolBackward) -> Iterator[None]:
    """Loops over channels of slices and result pixels; clears dx first where sums are to gather in it."""
    forward, dx = problem.forward, problem.dx
    with text.nest(f"for plane in {loop(dx.slices * dx.channels, dx.elems)}"):
        if not (problem.accumulate or _written_once(forward)):
            with text.nest(f"for h, w in T.grid({dx.height}, {dx.width})",
                           f"for i in T.vectorized({dx.vector})"):
                text(f"{_pixel('dx', dx)} = T.float32(0)")
        with text.nest(f"for h, w in T.grid({forward.y.height}, {forward.y.width})"):
            _set_window(text, forward)
            yield


def _target(problem: MaxPoolBackward | AvgPoolBackward) -> str:
    """Left side and start of the right side of the statement that gives dx its share."""
    element = _tap("dx", problem.dx)
    return f"{element} = " if _written_once(problem.forward) and not problem.accumulate else f"{element} = {element} + "


@schedule("max_pool2d.backward", device="cpu")
def max_pool_backward(problem: MaxPoolBackward, target: Target) -> str:
    """Finds the window's maximum again, then walks the window until it meets it."""
    x, vector = problem.forward.x, f"for i in T.vectorized({problem.dx.vector})"
    text = Text(buffer("dy", problem.dy.elems), buffer("x", x.elems), buffer("dx", problem.dx.elems))
    with _each_window_of_gradient(text, problem):
        text.local("best", x.vector)
        text.local("open", x.vector)  # dy until the maximum has been met, 0 from then on
        with text.nest(vector):
            text('best[i] = T.float32("-inf")', f"open[i] = {_pixel('dy', problem.dy)}")
        with _each_tap(text, problem.forward), text.nest(vector):
            text(f"best[i] = T.max(best[i], {_tap('x', x)})")
        with _each_tap(text, problem.forward), text.nest(vector):
            found = f"{_tap('x', x)} == best[i]"
            text(f"{_target(problem)}T.Select({found}, open[i], T.float32(0))", f"open[i] = T.Select({found}, T.float32(0), open[i])")
    return str(text)


@schedule("avg_pool2d.backward", device="cpu")
def avg_pool_backward(problem: AvgPoolBackward, target: Target) -> str:
    vector = f"for i in T.vectorized({problem.dx.vector})"
    text = Text(buffer("dy", problem.dy.elems), buffer("dx", problem.dx.elems))
    with _each_window_of_gradient(text, problem):
        text.local("value", problem.dx.vector)
        with text.nest(vector):
            text(f"value[i] = {_pixel('dy', problem.dy)} * {_share(problem.forward)}")
        with _each_tap(text, problem.forward), text.nest(vector):
            text(f"{_target(problem)}value[i]")
    return str(text)


@schedule("global_avg_pool.forward", device="cpu")
def global_avg_pool_forward(problem: GlobalPool, target: Target) -> str:
    """Sums row by row, so that rounding grows with height + width and not with their product."""
    x, y = problem.x, problem.y
    vector = f"for i in T.vectorized({x.vector})"
    text = Text(buffer("x", x.elems), buffer("y", y.elems))
    with text.nest(f"for plane in {loop(x.slices * x.channels, x.elems)}"):
        text.local("total", x.vector)
        text.local("line", x.vector)
        with text.nest(vector):
            text("total[i] = T.float32(0)")
        with text.nest(f"for h in T.serial({x.height})"):
            with text.nest(vector):
                text("line[i] = T.float32(0)")
            with text.nest(f"for w in T.serial({x.width})", vector):
                text(f"line[i] = line[i] + {_pixel('x', x)}")
            with text.nest(vector):
                text("total[i] = total[i] + line[i]")
        with text.nest(vector):
            text(f"y[plane * {y.channel_elems} + {y.origin} + i] = total[i] * {number(1 / (x.height * x.width))}")
    return str(text)


@schedule("global_avg_pool.backward", device="cpu")
def global_avg_pool_backward(problem: GlobalPool, target: Target) -> str:
    dx, dy = problem.x, problem.y
    text = Text(buffer("dy", dy.elems), buffer("dx", dx.elems))
    with each_row(text, {"dx": dx}), text.nest(f"for w in T.serial({dx.width})"):
        with text.nest(f"for i in T.vectorized({dx.vector})"):
            value = f"dy[plane * {dy.channel_elems} + {dy.origin} + i] * {number(1 / (dx.height * dx.width))}"
            text(f"{_pixel('dx', dx)} = " + (f"{_pixel('dx', dx)} + " if problem.accumulate else "") + value)
    return str(text)
