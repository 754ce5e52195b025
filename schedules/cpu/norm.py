"""Normalisation of each example by itself, on a CPU.

A thread takes a group of a slice, or a row of one where each pixel has moments of its own, and walks over it as often
as it must: for the mean, for the distances from it, for the result. Rows are summed in float32, groups in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.norm import Norm, NormBackward, NormParameters, count_of, moments_elems
from mest_compile.schedules.cpu.rows import (
    UNROLL,
    array,
    buffer,
    loop,
    narrowed,
    number,
    set_rows,
    walk_row,
    widened,
    zero,
)

Problem = Norm | NormBackward | NormParameters


@contextmanager
def _each_part(text: Text, problem: Problem) -> Iterator[None]:
    """A loop over what has moments of its own, or a row of such: sets `s`, `g`, `m_row`, where its moments start, and
    `h` where each pixel has some."""
    x, rows = problem.x, 1 if problem.pixels else problem.x.height
    with text.nest(f"for turn in {loop(x.slices * problem.groups * rows, x.elems)}"):
        text(
            f"s: T.let = turn // {problem.groups * rows}",
            f"g: T.let = turn // {rows} % {problem.groups}",
            *([] if problem.pixels else [f"h: T.let = turn % {rows}"]),
            f"m_row: T.let = turn * {x.vector if problem.pixels else x.width * x.vector}",
        )
        yield


def _walk(
    text: Text, problem: Problem, images: Mapping[str, Image], body: Callable[[str], list[str]], sums: int = 0
) -> None:
    """`body` at every element of a part, whose channel is `c`. It adds to `line_0`, ... at `{slot}`; where each pixel
    has moments these are the totals, else `total_0`, ... are, to which lines are added row by row."""
    x = problem.x
    size = x.vector if problem.pixels else x.width * x.vector
    for k in range(sums):
        name, dtype = (f"total_{k}", "float64") if problem.pixels else (f"line_{k}", "float32")
        with text.nest(f"for w in T.serial({size // x.vector})", f"for i in T.vectorized({x.vector})"):
            text(f"{name}[w * {x.vector} + i] = T.{dtype}(0)")
    loops = [f"for k in T.serial({x.channels // problem.groups})"]
    with text.nest(*loops, *([f"for h in T.serial({x.height})"] if problem.pixels else [])):
        text(f"c: T.let = g * {x.channels // problem.groups} + k", f"plane: T.let = s * {x.channels} + c")
        set_rows(text, dict(images))
        if problem.pixels:
            for k in range(sums):
                zero(text, f"line_{k}", UNROLL * x.vector, x.vector)

        def put(at: str, slot: str, live: str | None) -> list[str]:
            return [line.replace("{slot}", slot if problem.pixels else at) for line in body(at)]

        walk_row(text, replace(x, abreast=1), put)
        if problem.pixels:
            for k in range(sums):
                _fold(text, k, x.vector)


def _fold(text: Text, k: int, vector: int) -> None:
    with text.nest(f"for j in T.unroll({UNROLL})", f"for i in T.vectorized({vector})"):
        text(f'total_{k}[i] = total_{k}[i] + T.cast(line_{k}[j * {vector} + i], "float64")')


def _declare(text: Text, problem: Problem, sums: int) -> None:
    x = problem.x
    for k in range(sums):
        text.local(f"line_{k}", UNROLL * x.vector if problem.pixels else x.width * x.vector)
        if problem.pixels:
            text.local(f"total_{k}", x.vector, "float64")


def _each_moment(text: Text, problem: Problem, lines: Callable[[str], list[str]]) -> None:
    """Statements for every moment of a part, whose number within it is the argument."""
    x = problem.x
    with text.nest(f"for w in T.serial({1 if problem.pixels else x.width})", f"for i in T.vectorized({x.vector})"):
        text(*lines(f"w * {x.vector} + i"))


def _mean(problem: Problem, k: int, place: str) -> str:
    """Of what was added up, float32."""
    share = number(1 / count_of(problem.x, problem.groups, problem.pixels), "float64")
    total = f"total_{k}[{place}]" if problem.pixels else f'T.cast(line_{k}[{place}], "float64")'
    return f'T.cast({total} * {share}, "float32")'


def _moment(problem: Problem, row: int, at: str) -> str:
    """Mean (row 0) or inverse deviation (1) of the element at that place of its row."""
    start = row * moments_elems(problem.x, problem.groups, problem.pixels) // 2
    return f"moments[{start} + m_row + {'i' if problem.pixels else at}]"


def _normal(problem: Problem, at: str) -> str:
    x = widened(problem.x, f"x[x_row + {at}]")
    return f"(({x} - {_moment(problem, 0, at)}) * {_moment(problem, 1, at)})"


@schedule("norm.forward", device="cpu")
def norm_forward(problem: Norm, target: Target) -> str:
    x, y = problem.x, problem.y
    held = [name for name in ("weight", "bias") if getattr(problem, name)]
    text = Text(
        array("x", x),
        *(buffer(name, x.channels) for name in held),
        buffer("moments", moments_elems(x, problem.groups, problem.pixels)),
        array("y", y),
    )

    def result(at: str) -> list[str]:
        value = (
            _normal(problem, at) + (" * weight[c]" if problem.weight else "") + (" + bias[c]" if problem.bias else "")
        )
        return [f"y[y_row + {at}] = {narrowed(y, value)}"]

    def value(at: str) -> str:
        return widened(x, f"x[x_row + {at}]")

    def distance(at: str) -> str:
        return f"({value(at)} - {_moment(problem, 0, at)})"

    with _each_part(text, problem):
        _declare(text, problem, 1)
        _walk(text, problem, {"x": x}, lambda at: [f"line_0[{{slot}}] = line_0[{{slot}}] + {value(at)}"], 1)
        _each_moment(text, problem, lambda place: [f"{_moment(problem, 0, place)} = {_mean(problem, 0, place)}"])
        _walk(
            text,
            problem,
            {"x": x},
            lambda at: [f"line_0[{{slot}}] = line_0[{{slot}}] + {distance(at)} * {distance(at)}"],
            1,
        )
        _each_moment(
            text,
            problem,
            lambda place: [
                f"{_moment(problem, 1, place)} = "
                f"T.float32(1) / T.sqrt({_mean(problem, 0, place)} + {number(problem.eps)})"
            ],
        )
        _walk(text, problem, {"x": x, "y": y}, result)
    return str(text)


@schedule("norm.backward", device="cpu")
def norm_backward(problem: NormBackward, target: Target) -> str:
    """dx = inverse * (g - mean(g) - normal * mean(g * normal)), g being dy times the weight."""
    dy, x, dx = problem.dy, problem.x, problem.dx
    text = Text(
        array("dy", dy),
        array("x", x),
        *([buffer("weight", x.channels)] if problem.weight else []),
        buffer("moments", moments_elems(x, problem.groups, problem.pixels)),
        array("dx", dx),
    )
    size = x.vector if problem.pixels else x.width * x.vector

    def gradient(at: str) -> str:
        return widened(dy, f"dy[dy_row + {at}]") + (" * weight[c]" if problem.weight else "")

    def add(at: str) -> list[str]:
        return [
            f"line_0[{{slot}}] = line_0[{{slot}}] + {gradient(at)}",
            f"line_1[{{slot}}] = line_1[{{slot}}] + {gradient(at)} * {_normal(problem, at)}",
        ]

    def result(at: str) -> list[str]:
        place, element = "i" if problem.pixels else at, f"dx[dx_row + {at}]"
        value = f"({gradient(at)} - mean_0[{place}] - {_normal(problem, at)} * mean_1[{place}])"
        before = f"{widened(dx, element)} + " if problem.accumulate else ""
        return [f"{element} = {narrowed(dx, f'{before}{value} * {_moment(problem, 1, at)}')}"]

    with _each_part(text, problem):
        _declare(text, problem, 2)
        for k in range(2):
            text.local(f"mean_{k}", size)
        _walk(text, problem, {"dy": dy, "x": x}, add, 2)
        _each_moment(text, problem, lambda place: [f"mean_{k}[{place}] = {_mean(problem, k, place)}" for k in range(2)])
        _walk(text, problem, {"dy": dy, "x": x, "dx": dx}, result)
    return str(text)


@schedule("norm.parameters", device="cpu")
def norm_parameters(problem: NormParameters, target: Target) -> str:
    """A thread a channel."""
    dy, x, vector = problem.dy, problem.x, problem.dy.vector
    text = Text(
        array("dy", dy),
        *(
            [array("x", x), buffer("moments", moments_elems(x, problem.groups, problem.pixels))]
            if problem.weight
            else []
        ),
        *([buffer("dweight", x.channels)] if problem.weight else []),
        *([buffer("dbias", x.channels)] if problem.bias else []),
    )
    names = [name for name, there in (("dbias", problem.bias), ("dweight", problem.weight)) if there]

    def body(at: str, slot: str, live: str | None) -> list[str]:
        value = widened(dy, f"dy[dy_row + {at}]")
        return [
            f"line_{k}[{slot}] = line_{k}[{slot}] + {value}"
            + (f" * {_normal(problem, at)}" if name == "dweight" else "")
            for k, name in enumerate(names)
        ]

    with text.nest(f"for c in {loop(x.channels, x.elems)}"):
        for k in range(len(names)):
            text.local(f"line_{k}", UNROLL * vector)
            text.local(f"total_{k}", vector, "float64")
            text.local(f"joined_{k}", 1, "float64")
            zero(text, f"total_{k}", vector, vector, "float64")
        with text.nest(f"for s in T.serial({x.slices})", f"for h in T.serial({x.height})"):
            part = f"(s * {problem.groups} + c // {x.channels // problem.groups})"
            row = f"{part} * {vector}" if problem.pixels else f"({part} * {x.height} + h) * {x.width * x.vector}"
            text(f"plane: T.let = s * {x.channels} + c", f"m_row: T.let = {row}")
            set_rows(text, {"dy": dy, **({"x": x} if problem.weight else {})})
            for k in range(len(names)):
                zero(text, f"line_{k}", UNROLL * vector, vector)
            walk_row(text, replace(dy, abreast=1), body)
            for k in range(len(names)):
                _fold(text, k, vector)
        for k, name in enumerate(names):
            text(f"joined_{k}[0] = T.float64(0)")
            with text.nest(f"for i in T.serial({vector})"):
                text(f"joined_{k}[0] = joined_{k}[0] + total_{k}[i]")
            text(f'{name}[c] = T.cast(joined_{k}[0], "float32")')
    return str(text)
