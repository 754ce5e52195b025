"""Recurrent layers on OpenCL: a work-group takes a slice of examples and keeps its hidden states in local memory; a
thread takes every so many of them."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.recurrent import DP, DX, Recurrent, RecurrentBackward, RecurrentParameters
from mest_compile.schedules.opencl.sums import fold
from mest_compile.schedules.opencl.text import (
    DeviceText,
    full,
    image,
    plane_vectors,
    scalars,
    spelled,
    vector_type,
    vectors,
    whole_groups,
    zeros,
)


def _element(name: str, layout: Image, channel: str) -> str:
    first = layout.halo[0] * layout.columns + layout.halo[1]
    return f"{name}[(block * {layout.channels} + {channel}) * {plane_vectors(layout)} + {first} + pixel]"


def _names(problem: Recurrent) -> dict[str, str]:
    """{variable of a cell: text} of hidden state `u`; those of the step before are in `state`."""
    hidden, cell = problem.y.channels, problem.of
    names = {}
    for gate in range(cell.gates):
        names[f"{DX}{gate}"] = _element("x", problem.x, f"{gate * hidden} + u")
        names[f"{DP}{gate}"] = f"kept[now + {gate * hidden} + u]"
    names |= {name: f"state[{place}]" for place, name in enumerate(cell.states)}
    return names | {"new_c": f"kept[now + {problem.x.channels + hidden} + u]"}


def _set_step(text: DeviceText, problem: Recurrent) -> None:
    steps = problem.x.width
    text(
        f"pixel: T.let = {f'{steps - 1} - t' if problem.reverse else 't'}",
        f"now: T.let = (block * {steps} + t) * {problem.rows}",
        f"before: T.let = (block * {steps} + T.max(t - 1, 0)) * {problem.rows}",
    )


def _set_states(text: DeviceText, problem: Recurrent) -> None:
    for place in range(len(problem.of.states)):
        held = f"kept[before + {problem.x.channels + place * problem.y.channels} + u]"
        text(f"state[{place}] = {zeros(problem.x.vector)}")
        with text.nest("if t > 0"):
            text(f"state[{place}] = {held}")


@schedule("recurrent.forward", device="opencl")
def recurrent_forward(problem: Recurrent, target: Target) -> str:
    """A thread's new states wait in registers until all threads have read the old ones."""
    x, cell, vector, hidden, gates = problem.x, problem.of, problem.x.vector, problem.y.channels, problem.x.channels
    size = whole_groups(hidden, target.limits.threads)
    turns = -(-hidden // size)
    text = DeviceText(
        *(image("x", x), scalars("weight", gates * hidden)),
        *([scalars("bias", gates)] if problem.bias else []),
        *(vectors("kept", problem.kept_elems, vector), image("y", problem.y)),
    )
    with text.groups(size, x.slices):
        text.shared(1, hidden, vector_type(vector))
        for name, elems in (("state", len(cell.states)), ("sum", 1), ("new", turns)):
            text.private(name, elems, vector_type(vector))
        with text.nest(f"for t in T.serial({x.width})"):
            _set_step(text, problem)
            with text.nest(f"for turn in T.serial({turns})"):
                text(f"u: T.let = turn * {size} + lane")
                with text.nest(f"if u < {hidden}"):
                    for gate in range(cell.gates):
                        row = f"({gate * hidden} + u)"
                        text("sum[0] = " + (full(f"bias[{row}]", vector) if problem.bias else zeros(vector)))
                        with text.nest("if t > 0", f"for k in T.serial({hidden})"):
                            text(f"sum[0] = sum[0] + {full(f'weight[{row} * {hidden} + k]', vector)} * shared_0[k]")
                        text(f"kept[now + {row}] = sum[0]")
                    _set_states(text, problem)
                    names = _names(problem)
                    if cell.carried is not None:
                        text(f"{names['new_c']} = {spelled(cell.carried, vector, **names)}")
                    text(
                        f"new[turn] = {spelled(cell.hidden, vector, **names)}",
                        f"kept[now + {gates} + u] = new[turn]",
                        f"{_element('y', problem.y, 'u')} = new[turn]",
                    )
            text.barrier()
            with text.nest(f"for turn in T.serial({turns})"):
                text(f"u: T.let = turn * {size} + lane")
                with text.nest(f"if u < {hidden}"):
                    text("shared_0[u] = new[turn]")
            text.barrier()
    return str(text)


@schedule("recurrent.backward", device="opencl")
def recurrent_backward(problem: RecurrentBackward, target: Target) -> str:
    """The gates' gradients of a step go through local memory to what the states before it get."""
    forward, dy, dx = problem.forward, problem.dy, problem.dx
    x, cell, vector, hidden = forward.x, forward.of, forward.x.vector, forward.y.channels
    gates, states = x.channels, len(forward.of.states)
    size = whole_groups(hidden, target.limits.threads)
    turns = -(-hidden // size)
    text = DeviceText(
        *(image("dy", dy), image("x", x), scalars("weight", gates * hidden)),
        *(vectors("kept", forward.kept_elems, vector), vectors("dues", forward.kept_elems, vector), image("dx", dx)),
    )
    with text.groups(size, x.slices):
        text.shared(1, gates, vector_type(vector))
        for name, elems in (("state", states), ("due", states), ("sum", 1), ("left", turns * states)):
            text.private(name, elems, vector_type(vector))
        with text.nest(f"for turn in T.serial({turns * states})"):
            text(f"left[turn] = {zeros(vector)}")
        with text.nest(f"for late in T.serial({x.width})"):
            text(f"t: T.let = {x.width - 1} - late")
            _set_step(text, forward)
            with text.nest(f"for turn in T.serial({turns})"):
                text(f"u: T.let = turn * {size} + lane")
                with text.nest(f"if u < {hidden}"):
                    _set_states(text, forward)
                    text(*(f"due[{place}] = left[turn * {states} + {place}]" for place in range(states)))
                    text(f"due[0] = due[0] + {_element('dy', dy, 'u')}")
                    names = _names(forward) | {f"d{name}": f"due[{place}]" for place, name in enumerate(cell.states)}
                    for gate in range(cell.gates):
                        row, result = f"{gate * hidden} + u", _element("dx", dx, f"{gate * hidden} + u")
                        before = f"{result} + " if problem.accumulate else ""
                        text(f"{result} = {before}{spelled(cell.slope(f'{DX}{gate}'), vector, **names)}")
                        text(f"sum[0] = {spelled(cell.slope(f'{DP}{gate}'), vector, **names)}")
                        text(f"dues[now + {row}] = sum[0]", f"shared_0[{row}] = sum[0]")
                    for place, name in enumerate(cell.states):
                        text(f"left[turn * {states} + {place}] = {spelled(cell.slope(name), vector, **names)}")
            text.barrier()
            with text.nest(f"for turn in T.serial({turns})"):
                text(f"u: T.let = turn * {size} + lane")
                with text.nest(f"if u < {hidden}"):
                    text(f"sum[0] = {zeros(vector)}")
                    with text.nest(f"for r in T.serial({gates})"):
                        text(f"sum[0] = sum[0] + {full(f'weight[r * {hidden} + u]', vector)} * shared_0[r]")
                    text(f"left[turn * {states}] = left[turn * {states}] + sum[0]")
                    for place in range(states):
                        row = f"{gates + place * hidden} + u"
                        text(f"dues[now + {row}] = left[turn * {states} + {place}]")
            text.barrier()
    return str(text)


@schedule("recurrent.parameters", device="opencl")
def recurrent_parameters(problem: RecurrentParameters, target: Target) -> str:
    """A thread for each weight, then for each bias."""
    hidden, gates, vector, rows, steps = problem.hidden, problem.gates, problem.vector, problem.rows, problem.steps
    slices, elems = problem.lanes // vector, problem.lanes * steps * rows
    text = DeviceText(
        *(vectors("kept", elems, vector), vectors("dues", elems, vector), scalars("dweight", gates * hidden)),
        *([scalars("dbias", gates)] if problem.bias else []),
    )

    def summed(first: int, term: str, result: str) -> None:
        text.private("total", 1, vector_type(vector))
        text(f"total[0] = {zeros(vector)}")
        if steps > first:
            with text.nest(f"for s in T.serial({slices})", f"for t in T.serial({steps - first})"):
                text(f"now: T.let = (s * {steps} + t + {first}) * {rows}", f"total[0] = total[0] + {term}")
        text(f"{result} = {fold('total[0]', vector)}")

    with text.each(gates * hidden, target.limits.threads):
        term = f"dues[now + n // {hidden}] * kept[now - {rows} + {gates} + n % {hidden}]"
        summed(1, term, "dweight[n]")
    if problem.bias:
        with text.each(gates, target.limits.threads):
            summed(0, "dues[now + n]", "dbias[n]")
    return str(text)
