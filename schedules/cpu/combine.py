"""Values made of several, and their gradients, on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.combine import (
    NAMES,
    Combine,
    CombineBackward,
    Goal,
    Operand,
    Weights,
    formula_of,
    kept,
)
from mest_compile.schedules.cpu.rows import (
    UNROLL,
    array,
    buffer,
    each_row,
    loop,
    narrowed,
    spelled,
    walk_row,
    widened,
    zero,
)


@schedule("combine.forward", device="cpu")
def combine_forward(problem: Combine, target: Target) -> str:
    y, operands = problem.y, dict(zip(NAMES, problem.operands, strict=False))
    text = Text(*(_argument(name, one) for name, one in operands.items()), array("y", y))
    with each_row(text, {"y": y}):
        text(f"s: T.let = plane // {y.channels}")
        _set_rows(text, operands, y)

        def body(at: str, slot: str, live: str | None) -> list[str]:
            names = {name: _read(name, one, y, at) for name, one in operands.items()}
            before = f"{_read('y', y, y, at)} + " if problem.accumulate else ""
            return [f"y[y_row + {at}] = {narrowed(y, before + spelled(formula_of(problem.formula), **names))}"]

        walk_row(text, replace(y, abreast=1), body)
    return str(text)


@schedule("combine.backward", device="cpu")
def combine_backward(problem: CombineBackward, target: Target) -> str:
    """One pass over dy, in which a thread sums all that makes a row of a sum, or an element where it goes along rows.

    A row is float32; rows are added up in float64 where a sum goes over all examples, else in float32, so that rounding
    grows with height + width.
    """
    dy, summed = problem.dy, problem.summed
    operands = {name: one for name, one in zip(NAMES, problem.operands, strict=False) if one is not None}
    goals = {f"d{NAMES[goal.place]}": goal for goal in problem.goals}
    arrays: dict[str, Operand] = {"dy": dy, **operands, **{name: goal.layout for name, goal in goals.items()}}
    text = Text(*(_argument(name, one) for name, one in arrays.items()))
    examples, *axes, columns = problem.kept
    loops = {"s": (dy.slices, examples), "c": (dy.channels, axes[0]), "h": (dy.height, axes[1])}
    count = 1
    for size, own in loops.values():
        count *= size if own else 1
    width, dtype = dy.width if columns else 1, "float32" if examples else "float64"
    walked = {name: one for name, one in arrays.items() if name not in goals or goals[name] not in summed}

    def body(at: str, slot: str, live: str | None) -> list[str]:
        names, lines = {name: _read(name, one, dy, at) for name, one in {"dy": dy, **operands}.items()}, []
        for name, goal in goals.items():
            value = spelled(problem.gradient(goal), **names)
            if goal in summed:
                place = f"total_{name}[{at}]" if columns else f"line_{name}[{slot}]"
                added = f'T.cast({value}, "{dtype}")' if columns and dtype == "float64" else value
                lines.append(f"{place} = {place} + {added}")
            else:
                assert isinstance(goal.layout, Image)
                lines.append(_store(goal, name, f"{name}[{name}_row + {at}]", value))
        return lines

    with text.nest(f"for turn in {loop(count, dy.elems)}"):
        left = count
        for name, (size, own) in loops.items():
            if own:
                left //= size
                text(f"{name}: T.let = turn // {left} % {size}")
        for goal_name, goal in goals.items():
            if goal in summed:
                text.local(f"total_{goal_name}", width * dy.vector, dtype)
                with text.nest(f"for w in T.serial({width})", f"for i in T.vectorized({dy.vector})"):
                    text(f"total_{goal_name}[w * {dy.vector} + i] = T.{dtype}(0)")
                if not columns:
                    text.local(f"line_{goal_name}", UNROLL * dy.vector)
        with text.nest(*(f"for {name} in T.serial({size})" for name, (size, own) in loops.items() if not own)):
            _set_rows(text, walked, dy)
            lines = [f"line_{name}" for name, goal in goals.items() if goal in summed and not columns]
            for line in lines:
                zero(text, line, UNROLL * dy.vector, dy.vector)
            walk_row(text, replace(dy, abreast=1), body)
            for line in lines:
                total = f"total_{line.removeprefix('line_')}[i]"
                with text.nest(f"for j in T.unroll({UNROLL})", f"for i in T.vectorized({dy.vector})"):
                    part = f"{line}[j * {dy.vector} + i]"
                    text(f"{total} = {total} + " + (f'T.cast({part}, "float64")' if dtype == "float64" else part))
        for goal_name, goal in goals.items():
            if goal in summed:
                _write_sum(text, goal_name, goal, dy, width)
    return str(text)


def _write_sum(text: Text, name: str, goal: Goal, dy: Image, width: int) -> None:
    own = dict(zip("sch", kept(goal.layout, dy), strict=False))
    text(f"{name}_row: T.let = {_row(goal.layout, {axis: axis if there else '0' for axis, there in own.items()})}")
    if isinstance(goal.layout, Image):
        with text.nest(f"for w in T.serial({width})", f"for i in T.vectorized({dy.vector})"):
            at = f"w * {dy.vector} + i"
            text(_store(goal, name, f"{name}[{name}_row + {at}]", f"total_{name}[{at}]"))
        return
    with text.nest(f"for w in T.serial({width})"):
        text.local(f"joined_{name}", 1, "float64")
        text(f"joined_{name}[0] = T.float64(0)")
        with text.nest(f"for i in T.serial({dy.vector})"):
            text(f"joined_{name}[0] = joined_{name}[0] + total_{name}[w * {dy.vector} + i]")
        element = f"{name}[{name}_row + w * {goal.layout.strides[2]}]"
        before = f"{element} + " if goal.accumulate else ""
        text(f'{element} = {before}T.cast(joined_{name}[0], "float32")')


def _store(goal: Goal, name: str, element: str, value: str) -> str:
    assert isinstance(goal.layout, Image)
    before = f"{widened(goal.layout, element)} + " if goal.accumulate else ""
    return f"{element} = {narrowed(goal.layout, before + value)}"


def _argument(name: str, operand: Operand) -> str:
    return buffer(name, operand.elems) if isinstance(operand, Weights) else array(name, operand)


def _row(operand: Operand, place: Mapping[str, str]) -> str:
    """Where the row of slice, channel and row `place` begins."""
    s, c, h = (place[axis] for axis in "sch")
    if isinstance(operand, Weights):
        return f"{c} * {operand.strides[0]} + {h} * {operand.strides[1]}"
    plane = f"({s} * {operand.channels} + {c})"
    return f"{plane} * {operand.channel_elems} + {h} * {operand.row_elems} + {operand.origin}"


def _set_rows(text: Text, operands: Mapping[str, Operand], image: Image) -> None:
    """Sets `<name>_row` of each operand: where what belongs to row `h` of channel `c` of slice `s` starts."""
    for name, operand in operands.items():
        own = dict(zip("sch", kept(operand, image), strict=False))
        text(
            f"{name}_row: T.let = {_row(operand, {axis: axis if own[axis] or axis == 's' else '0' for axis in 'sch'})}"
        )


def _read(name: str, operand: Operand, image: Image, at: str) -> str:
    """The float32 that belongs to the element `at` of the image's row."""
    if isinstance(operand, Weights):
        step = operand.strides[2]
        return f"{name}[{name}_row" + (f" + ({at}) // {image.vector} * {step}]" if step else "]")
    return widened(operand, f"{name}[{name}_row + {at if operand.width == image.width else 'i'}]")
