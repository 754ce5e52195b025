"""Recurrent layers on a CPU: threads take slices of examples, whose steps come one after another; a vector is the
examples of a slice."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.recurrent import DP, DX, Recurrent, RecurrentBackward, RecurrentParameters
from mest_compile.schedules.cpu.rows import array, buffer, loop, narrowed, spelled, widened

TOGETHER = (4, 2, 1)  # rows of a weight, or columns, whose sums share what they read


def _together(hidden: int) -> int:
    return next(count for count in TOGETHER if hidden % count == 0)


def _set_step(text: Text, problem: Recurrent) -> None:
    """Sets `pixel` of step `t`, `now`, where its rows start, and `before`, where those of the step before it do."""
    steps, size = problem.x.width, problem.rows * problem.x.vector
    text(
        f"pixel: T.let = {f'{steps - 1} - t' if problem.reverse else 't'}",
        f"now: T.let = (s * {steps} + t) * {size}",
        f"before: T.let = now - {size}",
    )


def _names(problem: Recurrent) -> dict[str, str]:
    """{variable of a cell: text} of hidden state `u` and lane `i`; states before the step are in `state`."""
    x, hidden, cell = problem.x, problem.y.channels, problem.of
    names = {}
    for gate in range(cell.gates):
        plane = f"(s * {x.channels} + {gate * hidden} + u) * {x.channel_elems} + {x.origin}"
        names[f"{DX}{gate}"] = widened(x, f"x[{plane} + pixel * {x.vector} + i]")
        names[f"{DP}{gate}"] = _row("now", f"{gate * hidden} + u", x.vector)
    names |= {name: f"state[{place * x.vector} + i]" for place, name in enumerate(cell.states)}
    return names | {"new_c": _row("now", f"{x.channels + hidden} + u", x.vector)}


def _row(start: str, row: str, vector: int, name: str = "kept") -> str:
    return f"{name}[{start} + ({row}) * {vector} + i]"


def _set_states(text: Text, problem: Recurrent) -> None:
    """Fills `state` with the cell's states before step `t`, of hidden state `u`."""
    vector, hidden, first = problem.x.vector, problem.y.channels, problem.x.channels
    text.local("state", len(problem.of.states) * vector)
    for place in range(len(problem.of.states)):
        for condition, value in (
            ("t > 0", _row("before", f"{first + place * hidden} + u", vector)),
            ("t == 0", "T.float32(0)"),
        ):
            with text.nest(f"if {condition}", f"for i in T.vectorized({vector})"):
                text(f"state[{place * vector} + i] = {value}")


@schedule("recurrent.forward", device="cpu")
def recurrent_forward(problem: Recurrent, target: Target) -> str:
    x, y, cell, vector, hidden = problem.x, problem.y, problem.of, problem.x.vector, problem.y.channels
    each, gates = _together(hidden), x.channels
    text = Text(
        *(array("x", x), buffer("weight", gates * hidden)),
        *([buffer("bias", gates)] if problem.bias else []),
        *(buffer("kept", problem.kept_elems), array("y", y)),
    )
    with text.nest(f"for s in {loop(x.slices, problem.kept_elems)}", f"for t in T.serial({x.width})"):
        _set_step(text, problem)
        with text.nest(f"for r in T.serial({gates // each})"):
            text.local("sums", each * vector)
            lanes = f"for j in T.unroll({each})", f"for i in T.vectorized({vector})"
            with text.nest(*lanes):
                text(f"sums[j * {vector} + i] = " + (f"bias[r * {each} + j]" if problem.bias else "T.float32(0)"))
            with text.nest("if t > 0", f"for k in T.serial({hidden})", *lanes):
                product = f"weight[(r * {each} + j) * {hidden} + k] * {_row('before', f'{gates} + k', vector)}"
                text(f"sums[j * {vector} + i] = sums[j * {vector} + i] + {product}")
            with text.nest(*lanes):
                text(f"{_row('now', f'r * {each} + j', vector)} = sums[j * {vector} + i]")
        with text.nest(f"for u in T.serial({hidden})"):
            _set_states(text, problem)
            names = _names(problem)
            with text.nest(f"for i in T.vectorized({vector})"):
                if cell.carried is not None:
                    text(f"{names['new_c']} = {spelled(cell.carried, **names)}")
                made = _row("now", f"{gates} + u", vector)
                text(f"{made} = {spelled(cell.hidden, **names)}")
                plane = f"(s * {hidden} + u) * {y.channel_elems} + {y.origin}"
                text(f"y[{plane} + pixel * {vector} + i] = {narrowed(y, made)}")
    return str(text)


@schedule("recurrent.backward", device="cpu")
def recurrent_backward(problem: RecurrentBackward, target: Target) -> str:
    forward, dy, dx = problem.forward, problem.dy, problem.dx
    x, cell, vector, hidden = forward.x, forward.of, forward.x.vector, forward.y.channels
    each, gates, size = _together(hidden), x.channels, forward.rows * vector
    text = Text(
        *(array("dy", dy), array("x", x), buffer("weight", gates * hidden), buffer("kept", forward.kept_elems)),
        *(buffer("dues", forward.kept_elems), array("dx", dx)),
    )
    with text.nest(f"for s in {loop(x.slices, forward.kept_elems)}", f"for turn in T.serial({x.width})"):
        text(f"t: T.let = {x.width - 1} - turn")
        _set_step(text, forward)
        with text.nest(f"for u in T.serial({hidden})"):
            _set_states(text, forward)
            text.local("due", len(cell.states) * vector)
            plane = f"(s * {hidden} + u) * {dy.channel_elems} + {dy.origin}"
            given = widened(dy, f"dy[{plane} + pixel * {vector} + i]"), "T.float32(0)"
            for place, value in zip(range(len(cell.states)), given, strict=False):
                due = f"due[{place * vector} + i]"
                with text.nest(f"for i in T.vectorized({vector})"):
                    text(f"{due} = {value}")
                with text.nest("if turn > 0", f"for i in T.vectorized({vector})"):
                    text(f"{due} = {due} + {_row(f'now + {size}', f'{gates + place * hidden} + u', vector, 'dues')}")
            names = _names(forward) | {f"d{name}": f"due[{k * vector} + i]" for k, name in enumerate(cell.states)}
            with text.nest(f"for i in T.vectorized({vector})"):
                for gate in range(cell.gates):
                    plane = f"(s * {gates} + {gate * hidden} + u) * {dx.channel_elems} + {dx.origin}"
                    result = f"dx[{plane} + pixel * {vector} + i]"
                    before = f"{widened(dx, result)} + " if problem.accumulate else ""
                    text(f"{result} = {narrowed(dx, before + spelled(cell.slope(f'{DX}{gate}'), **names))}")
                    due = _row("now", f"{gate * hidden} + u", vector, "dues")
                    text(f"{due} = {spelled(cell.slope(f'{DP}{gate}'), **names)}")
                for place, name in enumerate(cell.states):
                    due = _row("now", f"{gates + place * hidden} + u", vector, "dues")
                    text(f"{due} = {spelled(cell.slope(name), **names)}")
        with text.nest(f"for k in T.serial({hidden // each})"):
            text.local("sums", each * vector)
            lanes = f"for j in T.unroll({each})", f"for i in T.vectorized({vector})"
            with text.nest(*lanes):
                text(f"sums[j * {vector} + i] = T.float32(0)")
            with text.nest(f"for r in T.serial({gates})", *lanes):
                product = f"weight[r * {hidden} + k * {each} + j] * {_row('now', 'r', vector, 'dues')}"
                text(f"sums[j * {vector} + i] = sums[j * {vector} + i] + {product}")
            with text.nest(*lanes):
                due = _row("now", f"{gates} + k * {each} + j", vector, "dues")
                text(f"{due} = {due} + sums[j * {vector} + i]")
    return str(text)


@schedule("recurrent.parameters", device="cpu")
def recurrent_parameters(problem: RecurrentParameters, target: Target) -> str:
    """Steps of a slice are summed in float32, slices in float64."""
    hidden, gates, vector, rows = problem.hidden, problem.gates, problem.vector, problem.rows
    slices, steps, each = problem.lanes // vector, problem.steps, _together(problem.hidden)
    elems = problem.lanes * steps * rows
    text = Text(
        *(buffer("kept", elems), buffer("dues", elems), buffer("dweight", gates * hidden)),
        *([buffer("dbias", gates)] if problem.bias else []),
    )

    def summed(count: int, first: int, term: str, result: str) -> None:
        """Sums `count` rows of `term` over steps from `first` on and slices; `now` is where a step's rows start."""
        text.local("total", count * vector, "float64")
        lanes = f"for j in T.unroll({count})", f"for i in T.vectorized({vector})"
        with text.nest(*lanes):
            text(f"total[j * {vector} + i] = T.float64(0)")
        if steps > first:
            with text.nest(f"for s in T.serial({slices})"):
                text.local("part", count * vector)
                with text.nest(*lanes):
                    text(f"part[j * {vector} + i] = T.float32(0)")
                with text.nest(f"for t in T.serial({steps - first})"):
                    text(f"now: T.let = (s * {steps} + t + {first}) * {rows * vector}")
                    with text.nest(*lanes):
                        text(f"part[j * {vector} + i] = part[j * {vector} + i] + {term}")
                with text.nest(*lanes):
                    place = f"j * {vector} + i"
                    text(f'total[{place}] = total[{place}] + T.cast(part[{place}], "float64")')
        with text.nest(f"for j in T.serial({count})"):
            text.local("joined", 1, "float64")
            text("joined[0] = T.float64(0)")
            with text.nest(f"for i in T.serial({vector})"):
                text(f"joined[0] = joined[0] + total[j * {vector} + i]")
            text(f'{result} = T.cast(joined[0], "float32")')

    with text.nest(f"for r in {loop(gates, elems)}"):
        with text.nest(f"for k in T.serial({hidden // each})"):
            due, state = _row("now", "r", vector, "dues"), f"{gates} + k * {each} + j"
            term = f"{due} * {_row(f'now - {rows * vector}', state, vector)}"
            summed(each, 1, term, f"dweight[r * {hidden} + k * {each} + j]")
        if problem.bias:
            summed(1, 0, _row("now", "r", vector, "dues"), "dbias[r + j]")
    return str(text)
