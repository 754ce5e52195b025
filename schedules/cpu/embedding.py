"""Rows of a table on a CPU: threads take slices of examples, and for gradients columns of the table, so that no two add
to one number."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.embedding import Embedding, EmbeddingBackward
from mest_compile.schedules.cpu.rows import array, buffer, loop, narrowed, widened


def _set_row(text: Text, x: Image, rows: int) -> None:
    """Sets `row`, which pixel `k` of the example in lane `i` of slice `s` names."""
    named = widened(x, f"x[(s * {x.channels} + k) * {x.channel_elems} + {x.origin} + i]")
    text(f'row: T.let = T.min(T.max(T.cast({named}, "int32"), 0), {rows - 1})')


@schedule("embedding.forward", device="cpu")
def embedding_forward(problem: Embedding, target: Target) -> str:
    x, y, rows = problem.x, problem.y, problem.rows
    text = Text(array("x", x), buffer("weight", rows * y.channels), array("y", y))
    with text.nest(
        f"for s in {loop(x.slices, y.elems)}", f"for k in T.serial({x.channels})", f"for i in T.serial({x.vector})"
    ):
        _set_row(text, x, rows)
        with text.nest(f"for c in T.serial({y.channels})"):
            at = f"(s * {y.channels} + c) * {y.channel_elems} + {y.origin} + k * {y.vector} + i"
            text(f"y[{at}] = {narrowed(y, f'weight[row * {y.channels} + c]')}")
    return str(text)


@schedule("embedding.backward", device="cpu")
def embedding_backward(problem: EmbeddingBackward, target: Target) -> str:
    x, dy, rows = problem.x, problem.dy, problem.rows
    text = Text(array("dy", dy), array("x", x), buffer("dweight", rows * dy.channels))
    with text.nest(f"for c in {loop(dy.channels, dy.elems)}"):
        with text.nest(f"for r in T.serial({rows})"):
            text(f"dweight[r * {dy.channels} + c] = T.float32(0)")
        loops = (f"for s in T.serial({x.slices})", f"for k in T.serial({x.channels})", f"for i in T.serial({x.vector})")
        with text.nest(*loops):
            _set_row(text, x, rows)
            with text.nest(*([f"if row != {problem.padding}"] if problem.padding >= 0 else [])):
                at = f"(s * {dy.channels} + c) * {dy.channel_elems} + {dy.origin} + k * {dy.vector} + i"
                sum_of = f"dweight[row * {dy.channels} + c]"
                text(f"{sum_of} = {sum_of} + {widened(dy, f'dy[{at}]')}")
    return str(text)
