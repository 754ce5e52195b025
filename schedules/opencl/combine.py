"""Values made of several, and their gradients, on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.combine import NAMES, Combine, CombineBackward, Goal, Operand, Weights, formula_of, kept
from mest_compile.schedules.opencl.sums import fold, tree
from mest_compile.schedules.opencl.text import (
    DeviceText,
    full,
    image,
    plane_vectors,
    scalars,
    spelled,
    vector_type,
    whole_groups,
    zeros,
)

FEW = 32  # terms of a sum, from which on a work-group adds them up


@schedule("combine.forward", device="opencl")
def combine_forward(problem: Combine, target: Target) -> str:
    y, operands = problem.y, dict(zip(NAMES, problem.operands, strict=False))
    text = DeviceText(*(_argument(name, one) for name, one in operands.items()), image("y", y))
    with text.each_pixel(y, target.limits.threads):
        text(f"s: T.let = plane // {y.channels}")
        names = {name: _read(name, one, y) for name, one in operands.items()}
        result = _element("y", y, y)
        before = f"{result} + " if problem.accumulate else ""
        text(f"{result} = {before}{spelled(formula_of(problem.formula), y.vector, **names)}")
    return str(text)


@schedule("combine.backward", device="opencl")
def combine_backward(problem: CombineBackward, target: Target) -> str:
    """A thread for each pixel of what is not summed; a thread for each sum of few terms, a work-group for one of
    many."""
    dy, vector, summed = problem.dy, problem.dy.vector, problem.summed
    operands = {name: one for name, one in zip(NAMES, problem.operands, strict=False) if one is not None}
    goals = {f"d{NAMES[goal.place]}": goal for goal in problem.goals}
    text = DeviceText(
        image("dy", dy),
        *(_argument(name, one) for name, one in operands.items()),
        *(_argument(name, goal.layout) for name, goal in goals.items()),
    )
    names = {name: _read(name, one, dy) for name, one in {"dy": dy, **operands}.items()}
    values = {name: spelled(problem.gradient(goal), vector, **names) for name, goal in goals.items()}
    if len(summed) < len(goals):
        with text.each_pixel(dy, target.limits.threads):
            text(f"s: T.let = plane // {dy.channels}")
            for name, goal in goals.items():
                if goal not in summed:
                    text(_stored(name, goal, dy, values[name]))
    if not summed:
        return str(text)
    sums = [name for name, goal in goals.items() if goal in summed]
    sizes = dict(zip("schw", (dy.slices, dy.channels, dy.height, dy.width), strict=True))
    own = {axis: size for (axis, size), mine in zip(sizes.items(), problem.kept, strict=True) if mine}
    rest = {axis: size for axis, size in sizes.items() if axis not in own}
    count, terms = _product(own), _product(rest)
    added = [f"sums[{k}] = sums[{k}] + {values[name]}" for k, name in enumerate(sums)]
    written = [_stored(name, goals[name], dy, f"sums[{k}]") for k, name in enumerate(sums)]

    def start(number: str) -> None:
        text.private("sums", len(sums), vector_type(vector))
        text(*_split(number, own), *(f"sums[{k}] = {zeros(vector)}" for k in range(len(sums))))

    if terms < FEW:
        with text.each(count, target.limits.threads):
            start("n")
            with text.nest(f"for k in T.serial({terms})"):
                text(*_split("k", rest), *added)
            text(*written)
        return str(text)
    size = whole_groups(terms, target.limits.threads)
    with text.groups(size, count):
        text.shared(len(sums), size, vector_type(vector))
        start("block")
        with text.nest(f"for turn in T.serial({-(-terms // size)})"):
            text(f"k: T.let = turn * {size} + lane")
            with text.nest(f"if k < {terms}"):
                text(*_split("k", rest), *added)
        text(*(f"shared_{k}[lane] = sums[{k}]" for k in range(len(sums))))
        tree(text, len(sums), size)
        with text.nest("if lane == 0"):
            text(*(f"sums[{k}] = shared_{k}[0]" for k in range(len(sums))), *written)
    return str(text)


def _product(sizes: dict[str, int]) -> int:
    count = 1
    for size in sizes.values():
        count *= size
    return count


def _split(number: str, sizes: dict[str, int]) -> list[str]:
    """Sets the axes by that number of the elements that they span."""
    left, lines = _product(sizes), []
    for axis, size in sizes.items():
        left //= size
        lines.append(f"{axis}: T.let = {number} // {left} % {size}")
    return lines


def _argument(name: str, operand: Operand) -> str:
    return scalars(name, operand.elems) if isinstance(operand, Weights) else image(name, operand)


def _element(name: str, operand: Operand, layout: Image) -> str:
    """What belongs to the pixel (h, w) of channel `c` of slice `s` of an image: a vector, or a weight."""
    mine = kept(operand, layout)
    c, h, w = (axis if own else "0" for axis, own in zip("chw", mine[1:], strict=True))
    if isinstance(operand, Weights):
        return (
            f"{name}[{' + '.join(f'{axis} * {step}' for axis, step in zip((c, h, w), operand.strides, strict=True))}]"
        )
    top, left = operand.halo[:2]
    plane = f"(s * {operand.channels} + {c}) * {plane_vectors(operand)}"
    return f"{name}[{plane} + ({h} + {top}) * {operand.columns} + {w} + {left}]"


def _read(name: str, operand: Operand, layout: Image) -> str:
    element = _element(name, operand, layout)
    return full(element, layout.vector) if isinstance(operand, Weights) else element


def _stored(name: str, goal: Goal, layout: Image, value: str) -> str:
    element = _element(name, goal.layout, layout)
    before = f"{element} + " if goal.accumulate else ""
    return f"{element} = {before}" + (fold(value, layout.vector) if isinstance(goal.layout, Weights) else value)
