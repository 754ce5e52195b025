"""Products of two activations on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.multiply import Multiply, MultiplyBackward, is_gate
from mest_compile.schedules.cpu.rows import UNROLL, array, each_row, loop, narrowed, set_rows, walk_row, widened, zero


@schedule("multiply.forward", device="cpu")
def multiply_forward(problem: Multiply, target: Target) -> str:
    text = Text(array("a", problem.a), array("b", problem.b), array("y", problem.y))
    with each_row(text, {"a": problem.a, "y": problem.y} | ({} if is_gate(problem.a, problem.b) else {"b": problem.b})):

        def body(at: str, slot: str, live: str | None) -> list[str]:
            factor = _factor(problem.a, problem.b, at)
            product = f"{widened(problem.a, f'a[a_row + {at}]')} * {factor}"
            return [f"y[y_row + {at}] = {narrowed(problem.y, product)}"]

        walk_row(text, problem.y, body)
    return str(text)


@schedule("multiply.backward", device="cpu")
def multiply_backward(problem: MultiplyBackward, target: Target) -> str:
    """One pass over dy. Of a gate's gradient it sums row by row, so that rounding grows with height + width."""
    dy, a, b, da, db = problem.dy, problem.a, problem.b, problem.da, problem.db
    images = {name: one for name, one in (("dy", dy), ("a", a), ("b", b), ("da", da), ("db", db)) if one}
    walked = {name: one for name, one in images.items() if not is_gate(dy, one)}
    summed = db is not None and "db" not in walked
    text = Text(*(array(name, one) for name, one in images.items()))

    def added(name: str, image: Image, element: str, value: str) -> str:
        before = f"{widened(image, element)} + " if problem.accumulate[name == "db"] else ""
        return f"{element} = {narrowed(image, before + value)}"

    def body(at: str, slot: str, live: str | None) -> list[str]:
        upstream, done = widened(dy, f"dy[dy_row + {at}]"), []
        product = f"{upstream} * {widened(a, f'a[a_row + {at}]')}" if a else ""
        if db and summed:
            done.append(f"line[{slot}] = line[{slot}] + {product}")
        elif db:
            done.append(added("db", db, f"db[db_row + {at}]", product))
        if da and b:
            done.append(added("da", da, f"da[da_row + {at}]", f"{upstream} * {_factor(dy, b, at)}"))
        return done

    vector = f"for i in T.vectorized({dy.vector})"
    with text.nest(f"for plane in {loop(dy.slices * dy.channels, dy.elems)}"):
        if summed:
            text.local("total", dy.vector)
            text.local("line", UNROLL * dy.vector)
            zero(text, "total", dy.vector, dy.vector)
        with text.nest(f"for h in T.serial({dy.height})"):
            set_rows(text, walked)
            if summed:
                zero(text, "line", UNROLL * dy.vector, dy.vector)
            walk_row(text, dy, body)
            if summed:
                with text.nest(f"for j in T.unroll({UNROLL})", vector):
                    text(f"total[i] = total[i] + line[j * {dy.vector} + i]")
        if db and summed:
            with text.nest(vector):
                text(added("db", db, f"db[plane * {db.channel_elems} + {db.origin} + i]", "total[i]"))
    return str(text)


def _factor(image: Image, b: Image, at: str) -> str:
    """What the element of `image` at that place of its row is multiplied by."""
    place = f"plane * {b.channel_elems} + {b.origin} + i" if is_gate(image, b) else f"b_row + {at}"
    return widened(b, f"b[{place}]")
