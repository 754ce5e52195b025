"""Pooling on a CPU, vectors over the batch. Backward kernels scatter, so threads share channels only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.pool import AvgPoolBackward, GlobalPool, MaxPoolBackward, Pool
from mest_compile.schedules.cpu.rows import array, each_row, loop, narrowed, number, widened
from mest_compile.schedules.windows import corner_and_end, most, share


def _set_window(text: Text, problem: Pool) -> None:
    """Sets, for the result pixel (h, w), the window's corner (`top`, `left`) in the image and its size (`tall`,
    `wide`)."""
    for axis, (corner, size, pixel) in enumerate((("top", "tall", "h"), ("left", "wide", "w"))):
        first, end = corner_and_end(problem, axis, pixel)
        text(f"{corner}: T.let = {first}")
        if not problem.fits(axis):
            text(f"{size}: T.let = {end} - {corner}")


@contextmanager
def _each_tap(text: Text, problem: Pool) -> Iterator[None]:
    """Loops `ky`, `kx` over the window that `_set_window` found."""
    loops = [
        f"for {name} in " + (f"T.unroll({most(problem, axis)})" if problem.fits(axis) else f"T.serial({size})")
        for axis, (name, size) in enumerate((("ky", "tall"), ("kx", "wide")))
    ]
    with text.nest(*loops):
        yield


def _tap(name: str, image: Image) -> str:
    return (
        f"{name}[plane * {image.channel_elems} + {image.origin} + (top + ky) * {image.row_elems} + "
        f"(left + kx) * {image.vector} + i]"
    )


def _pixel(name: str, image: Image) -> str:
    return f"{name}[plane * {image.channel_elems} + {image.origin} + h * {image.row_elems} + w * {image.vector} + i]"


def _share(problem: Pool) -> str:
    """What each value of an average counts."""
    return share(problem, ("h", "w"), ("tall", "wide"), number)


# Bytes. Where more is computed of a tap, fewer taps are under way at once; rows as long as this are asked for as far
# ahead. On a Zen core a maximum over 64x32x32x64 then takes 1.03 to 1.07 times as long as without a look at NaN, else
# 1.2 to 1.4; shorter rows, whose loops are unrolled, it slows down.
AHEAD = 1024


def _ask_ahead(text: Text, problem: Pool) -> None:
    """Asks for what a window AHEAD of this one has in rows that the window above it did not have."""
    x = problem.x
    if problem.kernel is None or x.width * x.vector * x.item_bytes < AHEAD:
        return
    rows = min(problem.kernel[0], problem.stride[0])
    place = f"(top + {problem.kernel[0] - rows} + row) * {x.row_elems} + left * {x.vector} + {AHEAD // x.item_bytes}"
    element = f"x[plane * {x.channel_elems} + {x.origin} + {place}]"
    with text.nest(f"for row in T.unroll({rows})"):
        text(f"T.evaluate(T.call_llvm_intrin('void', 'llvm.prefetch', T.address_of({element}), 0, 3, 1))")


def _forward(problem: Pool, steps: dict[str, tuple[str, str]], last: str, ahead: bool = False) -> str:
    """steps: name of a vector -> (what it is at first, what a tap makes of it). ahead: `_ask_ahead` at each window."""
    x, y = problem.x, problem.y
    text = Text(array("x", x), array("y", y))
    vector = f"for i in T.vectorized({x.vector})"
    with each_row(text, {"y": y}), text.nest(f"for w in T.serial({y.width})"):
        _set_window(text, problem)
        if ahead:
            _ask_ahead(text, problem)
        for name in steps:
            text.local(name, x.vector)
        with text.nest(vector):
            text(*(f"{name}[i] = {start}" for name, (start, _) in steps.items()))
        with _each_tap(text, problem), text.nest(vector):
            text(*(f"{name}[i] = {step.format(widened(x, _tap('x', x)))}" for name, (_, step) in steps.items()))
        with text.nest(vector):
            text(f"{_pixel('y', y)} = {narrowed(y, last)}")
    return str(text)


@schedule("max_pool2d.forward", device="cpu")
def max_pool_forward(problem: Pool, target: Target) -> str:
    """NaN stays, as in torch: T.max passes over it, but the sum of squares is NaN where a tap is, and nowhere else."""
    steps = {
        "value": ('T.float32("-inf")', "T.max(value[i], {0})"),
        "squares": ("T.float32(0)", "squares[i] + {0} * {0}"),
    }
    return _forward(problem, steps, 'T.Select(squares[i] <= T.float32("inf"), value[i], squares[i])', True)


@schedule("avg_pool2d.forward", device="cpu")
def avg_pool_forward(problem: Pool, target: Target) -> str:
    return _forward(problem, {"value": ("T.float32(0)", "value[i] + {}")}, f"value[i] * {_share(problem)}")


def _written_once(problem: Pool) -> bool:
    """Every pixel of x is in exactly one window."""
    return (
        problem.kernel == problem.stride
        and problem.padding == (0, 0)
        and (problem.x.height, problem.x.width)
        == (problem.y.height * problem.stride[0], problem.y.width * problem.stride[1])
    )


@contextmanager
def _each_window_of_gradient(text: Text, problem: MaxPoolBackward | AvgPoolBackward) -> Iterator[None]:
    """Loops over channels of slices and result pixels; clears dx first where sums are to gather in it."""
    forward, dx = problem.forward, problem.dx
    with text.nest(f"for plane in {loop(dx.slices * dx.channels, dx.elems)}"):
        if not (problem.accumulate or _written_once(forward)):
            with text.nest(f"for h, w in T.grid({dx.height}, {dx.width})", f"for i in T.vectorized({dx.vector})"):
                text(f"{_pixel('dx', dx)} = {narrowed(dx, 'T.float32(0)')}")
        with text.nest(f"for h, w in T.grid({forward.y.height}, {forward.y.width})"):
            _set_window(text, forward)
            yield


def _give(problem: MaxPoolBackward | AvgPoolBackward, share: str) -> str:
    """The statement that gives dx its share."""
    dx, element = problem.dx, _tap("dx", problem.dx)
    once = _written_once(problem.forward) and not problem.accumulate
    return f"{element} = {narrowed(dx, share if once else f'{widened(dx, element)} + {share}')}"


@schedule("max_pool2d.backward", device="cpu")
def max_pool_backward(problem: MaxPoolBackward, target: Target) -> str:
    """Finds again which tap of a window is its maximum, then gives each tap what is its own.

    As in torch the last NaN of a window is: in the place of a NaN `best` is infinite, so that only another NaN is not
    <= it.
    """
    x, vector = problem.forward.x, f"for i in T.vectorized({problem.dx.vector})"
    text = Text(array("dy", problem.dy), array("x", x), array("dx", problem.dx))
    tap = widened(x, _tap("x", x))
    with _each_window_of_gradient(text, problem):
        text.local("best", x.vector)
        text.local("winner", x.vector, "int32")
        text.local("value", x.vector)
        with text.nest(vector):
            text(
                'best[i] = T.float32("-inf")',
                "winner[i] = 0",
                f"value[i] = {widened(problem.dy, _pixel('dy', problem.dy))}",
            )
        number_of = f"ky * {most(problem.forward, 1)} + kx"
        with _each_tap(text, problem.forward), text.nest(vector):
            text(
                f"winner[i] = T.Select({tap} <= best[i], winner[i], {number_of})",
                f'best[i] = T.max(T.Select({tap} < T.float32("inf"), {tap}, T.float32("inf")), best[i])',
            )
        with _each_tap(text, problem.forward), text.nest(vector):
            text(_give(problem, f"T.Select(winner[i] == {number_of}, value[i], T.float32(0))"))
    return str(text)


@schedule("avg_pool2d.backward", device="cpu")
def avg_pool_backward(problem: AvgPoolBackward, target: Target) -> str:
    vector = f"for i in T.vectorized({problem.dx.vector})"
    text = Text(array("dy", problem.dy), array("dx", problem.dx))
    with _each_window_of_gradient(text, problem):
        text.local("value", problem.dx.vector)
        with text.nest(vector):
            text(f"value[i] = {widened(problem.dy, _pixel('dy', problem.dy))} * {_share(problem.forward)}")
        with _each_tap(text, problem.forward), text.nest(vector):
            text(_give(problem, "value[i]"))
    return str(text)


@schedule("global_avg_pool.forward", device="cpu")
def global_avg_pool_forward(problem: GlobalPool, target: Target) -> str:
    """Sums row by row, so that rounding grows with height + width and not with their product."""
    x, y = problem.x, problem.y
    vector = f"for i in T.vectorized({x.vector})"
    text = Text(array("x", x), array("y", y))
    with text.nest(f"for plane in {loop(x.slices * x.channels, x.elems)}"):
        text.local("total", x.vector)
        text.local("line", x.vector)
        with text.nest(vector):
            text("total[i] = T.float32(0)")
        with text.nest(f"for h in T.serial({x.height})"):
            with text.nest(vector):
                text("line[i] = T.float32(0)")
            with text.nest(f"for w in T.serial({x.width})", vector):
                text(f"line[i] = line[i] + {widened(x, _pixel('x', x))}")
            with text.nest(vector):
                text("total[i] = total[i] + line[i]")
        with text.nest(vector):
            mean = f"total[i] * {number(1 / (x.height * x.width))}"
            text(f"y[plane * {y.channel_elems} + {y.origin} + i] = {narrowed(y, mean)}")
    return str(text)


@schedule("global_avg_pool.backward", device="cpu")
def global_avg_pool_backward(problem: GlobalPool, target: Target) -> str:
    dx, dy = problem.x, problem.y
    text = Text(array("dy", dy), array("dx", dx))
    with each_row(text, {"dx": dx}), text.nest(f"for w in T.serial({dx.width})"):  # noqa: SIM117
        with text.nest(f"for i in T.vectorized({dx.vector})"):
            element = _pixel("dx", dx)
            value = (
                widened(dy, f"dy[plane * {dy.channel_elems} + {dy.origin} + i]")
                + f" * {number(1 / (dx.height * dx.width))}"
            )
            text(f"{element} = {narrowed(dx, f'{widened(dx, element)} + {value}' if problem.accumulate else value)}")
    return str(text)
