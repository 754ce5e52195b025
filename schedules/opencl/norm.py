"""Normalisation of each example by itself, on OpenCL: a work-group for what has moments of its own, or a thread where
that is a pixel."""

from __future__ import annotations

from collections.abc import Sequence

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.norm import Norm, NormBackward, NormParameters, count_of, moments_elems
from mest_compile.schedules.opencl.sums import fold, tree
from mest_compile.schedules.opencl.text import (
    DeviceText,
    at,
    full,
    image,
    number,
    scalars,
    vector_type,
    vectors,
    whole_groups,
    zeros,
)

Problem = Norm | NormBackward | NormParameters


def _means(
    text: DeviceText, problem: Norm | NormBackward, target: Target, terms: Sequence[str], then: Sequence[str]
) -> None:
    """A device kernel that finds the means of the terms over each part in `sums`; the statements `then` may read
    `part`, its number, the terms `c`, `plane`, `h` and `w`."""
    x, vector = problem.x, problem.x.vector
    channels, pixels = x.channels // problem.groups, x.height * x.width
    each = 1 if problem.pixels else pixels
    parts, count = x.slices * problem.groups * each, count_of(x, problem.groups, problem.pixels)
    share = full(number(1 / count), vector)

    def place(name: str) -> list[str]:
        return [f"h: T.let = {name} % {pixels} // {x.width}", f"w: T.let = {name} % {x.width}"]

    added = [
        f"c: T.let = part // {each} % {problem.groups} * {channels} + k // {pixels if problem.pixels else 1}",
        f"plane: T.let = part // {problem.groups * each} * {x.channels} + c",
        *(place("k") if problem.pixels else []),
        *(f"sums[{k}] = sums[{k}] + {term}" for k, term in enumerate(terms)),
    ]
    cleared = [f"sums[{k}] = {zeros(vector)}" for k in range(len(terms))]
    if not problem.pixels:
        with text.each(parts, target.limits.threads):
            text.private("sums", len(terms), vector_type(vector))
            text("part: T.let = n", *place("n"), *cleared)
            with text.nest(f"for k in T.serial({count})"):
                text(*added)
            text(*(f"sums[{k}] = sums[{k}] * {share}" for k in range(len(terms))), *then)
        return
    size = whole_groups(count, target.limits.threads)
    with text.groups(size, parts):
        text.private("sums", len(terms), vector_type(vector))
        text.shared(len(terms), size, vector_type(vector))
        text("part: T.let = block", *cleared)
        with text.nest(f"for turn in T.serial({-(-count // size)})"):
            text(f"k: T.let = turn * {size} + lane")
            with text.nest(f"if k < {count}"):
                text(*added)
        text(*(f"shared_{k}[lane] = sums[{k}]" for k in range(len(terms))))
        tree(text, len(terms), size)
        with text.nest("if lane == 0"):
            text(*(f"sums[{k}] = shared_{k}[0] * {share}" for k in range(len(terms))), *then)


def _part(problem: Problem) -> str:
    """Number of the part that the pixel (h, w) of `plane` is in."""
    x, channels = problem.x, problem.x.channels // problem.groups
    group = f"(plane // {x.channels} * {problem.groups} + c // {channels})"
    return group if problem.pixels else f"({group} * {x.height * x.width} + h * {x.width} + w)"


def _moment(problem: Problem, row: int, part: str = "") -> str:
    start = row * moments_elems(problem.x, problem.groups, problem.pixels) // 2 // problem.x.vector
    return f"moments[{start} + {part or _part(problem)}]"


def _normal(problem: Problem) -> str:
    return f"(({at('x', problem.x)} - {_moment(problem, 0)}) * {_moment(problem, 1)})"


def _moments(problem: Problem) -> str:
    return vectors("moments", moments_elems(problem.x, problem.groups, problem.pixels), problem.x.vector)


@schedule("norm.forward", device="opencl")
def norm_forward(problem: Norm, target: Target) -> str:
    x, y, vector = problem.x, problem.y, problem.x.vector
    held = [name for name in ("weight", "bias") if getattr(problem, name)]
    text = DeviceText(image("x", x), *(scalars(name, x.channels) for name in held), _moments(problem), image("y", y))
    away = f"({at('x', x)} - {_moment(problem, 0)})"
    root = f"{full('T.float32(1)', vector)} / T.sqrt(sums[0] + {full(number(problem.eps), vector)})"
    _means(text, problem, target, [at("x", x)], [f"{_moment(problem, 0, 'part')} = sums[0]"])
    _means(text, problem, target, [f"{away} * {away}"], [f"{_moment(problem, 1, 'part')} = {root}"])
    value = _normal(problem) + (f" * {full('weight[c]', vector)}" if problem.weight else "")
    with text.each_pixel(y, target.limits.threads):
        text(f"{at('y', y)} = {value}" + (f" + {full('bias[c]', vector)}" if problem.bias else ""))
    return str(text)


@schedule("norm.backward", device="opencl")
def norm_backward(problem: NormBackward, target: Target) -> str:
    dy, x, dx, vector = problem.dy, problem.x, problem.dx, problem.x.vector
    text = DeviceText(
        image("dy", dy),
        image("x", x),
        *([scalars("weight", x.channels)] if problem.weight else []),
        _moments(problem),
        image("dx", dx),
    )
    elems = moments_elems(x, problem.groups, problem.pixels)
    text.scratch("means", elems)
    gradient = at("dy", dy) + (f" * {full('weight[c]', vector)}" if problem.weight else "")

    def mean(row: int, part: str, lane: int) -> str:
        return f"means[{row * elems // 2} + {part} * {vector} + {lane}]"

    def whole(row: int) -> str:
        start = f"{row * elems // 2} + {_part(problem)} * {vector}"
        return f"means[T.Ramp({start}, 1, {vector})]" if vector > 1 else f"means[{start}]"

    stored = [
        f"{mean(k, 'part', lane)} = " + (f"T.Shuffle([sums[{k}]], [{lane}])" if vector > 1 else f"sums[{k}]")
        for k in range(2)
        for lane in range(vector)
    ]
    _means(text, problem, target, [gradient, f"{gradient} * {_normal(problem)}"], stored)
    value = f"({gradient} - {whole(0)} - {_normal(problem)} * {whole(1)}) * {_moment(problem, 1)}"
    with text.each_pixel(dx, target.limits.threads):
        text(f"{at('dx', dx)} = " + (f"{at('dx', dx)} + " if problem.accumulate else "") + value)
    return str(text)


@schedule("norm.parameters", device="opencl")
def norm_parameters(problem: NormParameters, target: Target) -> str:
    """A work-group a channel."""
    dy, x, vector = problem.dy, problem.x, problem.dy.vector
    text = DeviceText(
        image("dy", dy),
        *([image("x", x), _moments(problem), scalars("dweight", x.channels)] if problem.weight else []),
        *([scalars("dbias", x.channels)] if problem.bias else []),
    )
    terms = {"dweight": f"{at('dy', dy)} * {_normal(problem)}"} if problem.weight else {}
    terms |= {"dbias": at("dy", dy)} if problem.bias else {}
    pixels = x.height * x.width
    size = whole_groups(x.slices * pixels, target.limits.threads)
    with text.groups(size, x.channels):
        text.private("sums", len(terms), vector_type(vector))
        text.shared(len(terms), size, vector_type(vector))
        text("c: T.let = block", *(f"sums[{k}] = {zeros(vector)}" for k in range(len(terms))))
        with text.nest(f"for turn in T.serial({-(-x.slices * pixels // size)})"):
            text(f"k: T.let = turn * {size} + lane")
            with text.nest(f"if k < {x.slices * pixels}"):
                text(
                    f"plane: T.let = k // {pixels} * {x.channels} + c",
                    f"h: T.let = k % {pixels} // {x.width}",
                    f"w: T.let = k % {x.width}",
                    *(f"sums[{k}] = sums[{k}] + {term}" for k, term in enumerate(terms.values())),
                )
        text(*(f"shared_{k}[lane] = sums[{k}]" for k in range(len(terms))))
        tree(text, len(terms), size)
        with text.nest("if lane == 0"):
            for k, name in enumerate(terms):
                text(f"sums[{k}] = shared_{k}[0]", f"{name}[c] = {fold(f'sums[{k}]', vector)}")
    return str(text)
